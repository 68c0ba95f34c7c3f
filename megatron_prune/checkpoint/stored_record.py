"""Where the numbers of a stored tensor lie in its file: the records that ``torch.save`` writes, never unpickled
into tensors. ``locate`` reads a record's own index and gives the byte range; nothing in it is executed."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prune import storage
from megatron_prune.checkpoint.safe_objects import refuse_compression
from megatron_prune.errors import CheckpointError, StorageError


@dataclass(frozen=True)
class Record:
    """Where the numbers of one stored tensor lie: byte ``offset`` in its file, and their strides."""

    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for extent, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True


_STORAGE_DTYPES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}


class _TensorUnpickler(pickle.Unpickler):
    """Understands exactly what ``torch.save(tensor)`` writes, and builds no tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return dtype, str(key), int(numel)


def locate(handle: storage.LocalBytes | storage.StoredBytes, start: int, length: int, origin: str) -> Record:
    """Find the raw numbers of the ``torch.save`` record in bytes [start, start + length) of an open file.

    Nothing in the record is executed. Raises CheckpointError naming ``origin`` for a record that is
    truncated, compressed, big-endian, or not one plain tensor.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(storage.Window(handle, start, length))) as archive:
            refuse_compression(archive)
            entries = {name.split("/", 1)[-1]: entry for name, entry in archive.NameToInfo.items()}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError("its numbers are big-endian")
            (dtype, key, numel), first, size, stride = _TensorUnpickler(
                io.BytesIO(archive.read(entries["data.pkl"]))
            ).load()
            entry = entries[f"data/{key}"]
        # The local header says how much padding precedes the numbers.
        header = handle.read(30, start + entry.header_offset)
        if header[:4] != b"PK\x03\x04" or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its numbers are compressed or missing")
        begin = (
            entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        last = first + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) + 1
        empty = 0 in size
        if numel * dtype.itemsize != entry.file_size or begin + entry.file_size > length:
            raise ValueError("it is shorter than it says")
        if not all(isinstance(v, int) and v >= 0 for v in (first, *size, *stride)) or (not empty and last > numel):
            raise ValueError("its view reaches beyond its storage")
    except StorageError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(f"{origin} is truncated or damaged: {error}") from error
    return Record(start + begin + first * dtype.itemsize, dtype, size, stride)
