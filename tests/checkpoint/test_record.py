"""Records against torch: ``torch.load`` reads what we build."""

from __future__ import annotations

import hashlib
import io

import pytest
import torch

from megatron_prune import storage
from megatron_prune.checkpoint import record, torch_dist


def assembled(tensor, start):
    return b"".join(record.tensor_record(tensor, start))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1, 4, 6), (300, 70)])
@pytest.mark.parametrize("start", [0, 1, 63, 64, 1000003])
def test_torch_loads_it_and_the_numbers_are_aligned(dtype, shape, start):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    payload = assembled(tensor, start)
    loaded = torch.load(io.BytesIO(payload), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == shape and loaded.is_contiguous()
    assert torch.equal(loaded, tensor)
    numbers = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    if tensor.numel() > 20:  # long enough to stand once in the record
        assert (start + payload.index(numbers)) % record.ALIGNMENT == 0


def test_the_numbers_are_not_copied():
    tensor = torch.zeros(1000)
    tensor_memory = tensor.data_ptr()
    views = [s for s in record.tensor_record(tensor, 0) if isinstance(s, memoryview)]
    tensor[5] = 1.0
    assert any(bytes(view) == tensor.numpy().tobytes() for view in views) and tensor.data_ptr() == tensor_memory


def test_files_have_the_hashes_and_ranges_that_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FILE_BYTES", 3000)
    files = record.RecordFiles(tmp_path)
    tensors = [torch.randn(20, 10) for _ in range(7)]
    places = [files.append(record.tensor_record, tensor) for tensor in tensors]
    places.append(files.append(record.object_record, {"a": 1}))
    files.close()
    files.shutdown()
    assert {name for name, _, _ in places} == set(files.hashes) == {path.name for path in tmp_path.iterdir()}
    assert len(files.hashes) > 2
    for name, digest in files.hashes.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    for (name, start, length), tensor in zip(places[:7], tensors, strict=True):
        payload = (tmp_path / name).read_bytes()[start : start + length]
        assert torch.equal(torch.load(io.BytesIO(payload), weights_only=True), tensor)
        found = torch_dist.locate(storage.open_bytes(tmp_path / name), start, length, "test")
        assert found.size == (20, 10) and found.contiguous and found.offset % record.ALIGNMENT == 0


def test_records_written_by_torch_itself_are_located_too(tmp_path):
    """With every stride and offset that ``torch.save`` can write."""
    base = torch.arange(60.0).view(6, 10)
    for tensor in (base, base.T, base[2:4], base[:, 3:5], base[1], base[:, 0], torch.tensor(3.0)):
        path = tmp_path / "x"
        with open(path, "wb") as handle:
            handle.write(b"?" * 13)
            torch.save(tensor, handle)
            length = handle.tell() - 13
        found = torch_dist.locate(storage.open_bytes(path), 13, length, "test")
        rest = bytearray(path.read_bytes()[found.offset :])
        numbers = torch.frombuffer(rest[: len(rest) // 4 * 4], dtype=found.dtype)
        assert torch.equal(numbers.as_strided(found.size, found.stride), tensor)
        assert found.contiguous == tensor.is_contiguous()
