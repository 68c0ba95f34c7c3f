"""Parts: written by several processes, read back at any position, and moved into a checkpoint without copying."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from megatron_prune.checkpoint import parallel as parts_module
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.parallel import read_part, write_part
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.errors import CheckpointError
from tests.checkpoint import small

FC2 = "decoder.layers.1.mlp.linear_fc2.weight"  # [32, 48]
QKV = "decoder.layers.2.self_attention.linear_qkv.weight"  # [64, 32]


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> list[Path]:
    """Two parts: column halves of one weight, uneven row blocks of another."""
    write_part(folder / "a", [(FC2, (0, 0), tensors[FC2][:, :24]), (QKV, (0, 0), tensors[QKV][:40])])
    write_part(folder / "b", [(FC2, (0, 24), tensors[FC2][:, 24:]), (QKV, (40, 0), tensors[QKV][40:])])
    return [folder / "a", folder / "b"]


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_adopts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    monkeypatch.setattr(parts_module, "RECORD_BYTES", 1000)  # several records per shard
    if not links:  # a file system without them

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    tensors = small.tensors()
    parts = [read_part(folder) for folder in write(tmp_path, tensors)]
    assert len(parts[0].pieces) > 4
    with CheckpointWriter(tmp_path / "made", args=small.ARGS, dtype=torch.float32, parts=parts) as writer:
        for weight in weights(ModelShape.from_args(small.ARGS)):
            if weight.name not in (FC2, QKV):
                writer.add(weight.name, weight.shape, [tensors[weight.name]])
        with pytest.raises(CheckpointError, match="expected each weight once"):
            writer.add(FC2, tensors[FC2].shape, [tensors[FC2]])
    checkpoint = open_checkpoint(tmp_path / "made")
    checkpoint.verify(hashes=True)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in checkpoint.names)
    (one,) = [path for path in checkpoint.directory.glob("__1_*.distcp")]
    assert one.stat().st_nlink == (2 if links else 1)


def test_any_rectangle_is_read_back(tmp_path: Path) -> None:
    tensors = small.tensors()
    parts = [read_part(folder) for folder in write(tmp_path, tensors)]
    for name, rows, columns in ((FC2, slice(3, 20), slice(10, 40)), (QKV, slice(39, 41), slice(0, 32))):
        expected = tensors[name][rows, columns]
        found = torch.full_like(expected, float("nan"))
        assert sum(part.fill(name, (rows.start, columns.start), found) for part in parts) == expected.numel()
        assert torch.equal(found, expected)
    assert parts[0].fill(FC2, (0, 24), torch.empty(32, 24)) == 0


def test_refuses_parts_that_do_not_make_a_checkpoint(tmp_path: Path) -> None:
    tensors = small.tensors()
    one, _ = (read_part(folder) for folder in write(tmp_path, tensors))
    rest = [w for w in weights(ModelShape.from_args(small.ARGS)) if w.name not in (FC2, QKV)]
    with (
        pytest.raises(CheckpointError, match=r"shards of .*: expected .* covered exactly once"),
        CheckpointWriter(tmp_path / "half", args=small.ARGS, dtype=torch.float32, parts=[one]) as writer,
    ):
        for weight in rest:
            writer.add(weight.name, weight.shape, [tensors[weight.name]])
    write_part(tmp_path / "odd", [("decoder.layers.9.mlp.linear_fc2.weight", (0, 0), torch.zeros(2, 2))])
    with (
        pytest.raises(
            CheckpointError, match="expected weights of this model, got decoder.layers.9.mlp.linear_fc2.weight"
        ),
        CheckpointWriter(
            tmp_path / "odd-made", args=small.ARGS, dtype=torch.float32, parts=[read_part(tmp_path / "odd")]
        ),
    ):
        pass
    assert not (tmp_path / "half").exists() and not (tmp_path / "odd-made").exists()
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "json", "elsewhere"])
def test_a_damaged_part_is_refused(tmp_path: Path, damage: str) -> None:
    folder, _ = write(tmp_path, small.tensors())
    (file,) = folder.glob("*.distcp")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    else:
        path = folder / parts_module.PART_FILE
        text = path.read_text()
        path.write_text(text.replace('"sizes"', '"size"') if damage == "json" else text.replace("__0_0", "../b/__0_0"))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_part(folder)
