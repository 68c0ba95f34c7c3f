"""The weights of a checkpoint in Megatron's `torch_dist` format: an index and numbered files of records.

Opening a checkpoint vets every object in it, including those not used here, because Megatron unpickles them all.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_prune import storage
from megatron_prune.checkpoint import index, safe, safe_objects
from megatron_prune.checkpoint.index import Box, Piece
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout
from megatron_prune.checkpoint.pickle_limits import refuse_absurd
from megatron_prune.checkpoint.safe_objects import MOST_OBJECT_BYTES, open_archive
from megatron_prune.errors import CheckpointError, StorageError
from megatron_prune.untrusted import read_bytes, reason

_COMMON = "common_state/shard_0_1"  # the only one that Megatron reads
_MOST_ENTRIES, _MOST_PICKLE = 64, 1 << 14  # of the record of one tensor


class TorchDistSource:
    """A ``Checkpoint``'s source of a `torch_dist` directory: ``common`` state, ``stored`` tensors, and their data."""

    format = "torch_dist"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = StoredFiles(directory)
        metadata = safe.load_metadata(directory)
        self.common: dict[str, Any] = self._load_common(metadata)
        vet_objects(metadata, self._files, directory)
        self.stored = index.stored_tensors(metadata, directory)

    def _load_common(self, metadata: Metadata) -> dict[str, Any]:
        older = self._directory / "common.pt"
        if older.is_file():
            return safe_objects.load_common(read_bytes(older, MOST_OBJECT_BYTES), str(older))
        for entry, info in metadata.storage_data.items():
            if entry.fqn == _COMMON:
                payload = _content(info, self._files, self._directory)
                return safe_objects.load_common(payload, str(self._directory / info.relative_path))
        raise CheckpointError(
            f"{self._directory}: expected common_state or common.pt, which Megatron saves, got neither"
        )

    def refuse_damaged(self) -> None:
        """Raises CheckpointError, naming the tensor, for a record (also of the optimizer) that is not ``torch.save``'s
        format."""
        for tensor in self.stored.values():
            for piece in tensor.pieces:
                self._files.record(piece)

    def locate(self, layouts: Mapping[str, WeightLayout], shape: ModelShape) -> dict[str, tuple[Box, ...]]:
        """The boxes of every logical weight. Raises CheckpointError if a weight is missing or has the wrong shape, and
        for unknown stored weights."""
        boxes = {name: index.locate(layout, shape, self.stored, self._directory) for name, layout in layouts.items()}
        known = {box.piece.key for found in boxes.values() for box in found}
        index.refuse_unknown(self.stored, known, self._directory)
        return boxes

    def fill(self, target: torch.Tensor, box: Box, first: int) -> None:
        """Copy rows of a box, from its row ``first`` on, into ``target`` [rows, ...]."""
        self._files.fill(target, box, first)

    def whole(self, key: str) -> torch.Tensor:
        """A stored tensor. CheckpointError if one of its shards is missing or duplicated."""
        stored = self.stored[key]
        boxes = [Box(piece, piece.offsets, piece.sizes, 0) for piece in stored.pieces]
        if not index.covers(boxes, stored.shape):
            raise CheckpointError(f"{self._directory}: a shard of {key} is missing or duplicated")
        found = torch.empty(stored.shape, dtype=stored.dtype)
        for box in boxes:
            place = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))
            self.fill(found[place], box, 0)
        return found

    def element(self, box: Box, number: int) -> bytes:
        """The bytes of one number of a box, counted in row-major order."""
        record = self._files.record(box.piece)
        if not record.contiguous:
            width = torch.Size(box.sizes[1:]).numel()
            row = torch.empty((1, *box.sizes[1:]), dtype=record.dtype)
            self._files.fill(row, box, number // width)
            return row.view(-1)[number % width].reshape(1).view(torch.uint8).numpy().tobytes()
        itemsize = record.dtype.itemsize
        return self._files.read_bytes(box.piece.file, record.offset + (box.skip + number) * itemsize, itemsize)


def vet_objects(metadata: Metadata, files: StoredFiles, directory: Path) -> None:
    """Raises CheckpointError, naming the record, if an object record of the index is not safe to load."""
    objects = [
        (entry.fqn, info)
        for entry, info in metadata.storage_data.items()
        if entry.offset is None or not isinstance(metadata.state_dict_metadata.get(entry.fqn), TensorStorageMetadata)
    ]
    vetted: set[tuple[bool, bytes]] = set()  # most module states are identical bytes

    def vet(found: tuple[str, Any]) -> None:
        key, info = found
        payload = _content(info, files, directory)
        if (safe_objects.is_module_state(key), payload) not in vetted:
            safe_objects.vet(payload, key, str(directory / info.relative_path))
            vetted.add((safe_objects.is_module_state(key), payload))

    storage.each(vet, objects, directory)


def _content(info: Any, files: StoredFiles, directory: Path) -> bytes:
    index.check_files(directory, {info.relative_path: info.offset + info.length})
    if info.length > MOST_OBJECT_BYTES:
        raise CheckpointError(
            f"{directory / info.relative_path}: expected objects of at most {MOST_OBJECT_BYTES:,} bytes, "
            f"got one of {info.length:,}"
        )
    return files.read_bytes(info.relative_path, info.offset, info.length)


# Reading tensor data by byte range.


class StoredFiles:
    """The open record files of ``directory``. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, storage.LocalBytes | storage.StoredBytes] = {}
        self._records: dict[tuple[str, int], StoredRecord] = {}

    def fill(self, target: torch.Tensor, box: Box, first: int) -> None:
        """Copy rows of a box, from its row ``first`` on, into ``target`` [rows, ...]."""
        record = self.record(box.piece)
        row = torch.Size(box.sizes[1:]).numel()
        if not record.contiguous:
            reach = sum((extent - 1) * step for extent, step in zip(record.size, record.stride, strict=True)) + 1
            storage = torch.empty(reach, dtype=record.dtype)
            self._read_into(storage, box.piece.file, record.offset)
            flat = storage.as_strided(record.size, record.stride).reshape(-1)[box.skip + first * row :]
            target.copy_(flat[: target.numel()].view(target.shape))
            return
        begin = record.offset + (box.skip + first * row) * record.dtype.itemsize
        if target.is_contiguous():
            self._read_into(target, box.piece.file, begin)
        else:
            buffer = torch.empty(target.shape, dtype=record.dtype)
            self._read_into(buffer, box.piece.file, begin)
            target.copy_(buffer)

    def record(self, piece: Piece) -> StoredRecord:
        """Where the data of a piece are. Raises CheckpointError if its record is damaged or contradicts the index."""
        place = (piece.file, piece.start)
        if place not in self._records:
            origin = f"{self._directory / piece.file} (the shard of {piece.key} at {list(piece.offsets)})"
            record = locate(self._open(piece.file), piece.start, piece.length, origin)
            if (record.dtype, math.prod(record.size)) != (piece.dtype, math.prod(piece.sizes)):
                raise CheckpointError(
                    f"{origin}: expected {piece.dtype} {list(piece.sizes)} from the index, got "
                    f"{record.dtype} {list(record.size)}"
                )
            self._records[place] = record
        return self._records[place]

    def read_bytes(self, name: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a file. Raises CheckpointError if the file is shorter."""
        found = self._open(name).read(length, start)
        if len(found) < length:
            raise CheckpointError(
                f"{self._directory / name} is truncated: expected at least {start + length} bytes; copy the "
                "checkpoint again"
            )
        return found

    def _open(self, name: str) -> storage.LocalBytes | storage.StoredBytes:
        if name not in self._handles:
            try:
                self._handles[name] = storage.open_bytes(self._directory / name)
            except OSError as error:
                raise CheckpointError(f"{self._directory / name} cannot be read: {error.strerror or error}") from error
        return self._handles[name]

    def _read_into(self, target: torch.Tensor, name: str, start: int) -> None:
        if target.numel() == 0:
            return
        view = memoryview(target.view(-1).view(torch.uint8).numpy())
        handle = self._open(name)
        done = 0
        while done < len(view):
            got = handle.read_into(view[done:], start + done)
            if got == 0:
                raise CheckpointError(
                    f"{self._directory / name} is truncated: {len(view) - done} bytes are missing at {start + done}; "
                    "copy the checkpoint again"
                )
            done += got


# Locating the data inside a ``torch.save`` record without unpickling it into a tensor.


@dataclass(frozen=True)
class StoredRecord:
    """Where the data of one stored tensor are: byte ``offset`` in its file, type, size and strides (in elements)."""

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
    """Accepts exactly what ``torch.save(tensor)`` writes, and builds no tensor."""

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


def locate(handle: storage.LocalBytes | storage.StoredBytes, start: int, length: int, origin: str) -> StoredRecord:
    """Find the raw data of the ``torch.save`` record in bytes [start, start + length) of an open file.

    Executes nothing. Raises CheckpointError, naming ``origin``, for a record that is truncated,
    compressed, big-endian, or not a single plain tensor.
    """
    try:
        window = io.BufferedReader(storage.Window(handle, start, length))
        with open_archive(window, _MOST_ENTRIES) as archive:
            entries = {name.split("/", 1)[-1]: entry for name, entry in archive.NameToInfo.items()}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError("its data are big-endian")
            if entries["data.pkl"].file_size > _MOST_PICKLE:
                raise ValueError("it is more than one tensor")
            pickled = archive.read(entries["data.pkl"])
            refuse_absurd(pickled, _MOST_PICKLE)
            (dtype, key, numel), first, size, stride = _TensorUnpickler(io.BytesIO(pickled)).load()
            entry = entries[f"data/{key}"]
        # The padding before the data is only in the local header.
        header = handle.read(30, start + entry.header_offset)
        if header[:4] != b"PK\x03\x04" or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its data are compressed or missing")
        begin = (
            entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        if not all(isinstance(v, int) and 0 <= v < 1 << 62 for v in (numel, first, *size, *stride)):
            raise ValueError("its sizes are not numbers")
        last = first + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) + 1
        empty = 0 in size
        if numel * dtype.itemsize != entry.file_size or begin + entry.file_size > length:
            raise ValueError("it is shorter than its header says")
        if not empty and last > numel:
            raise ValueError("its view reaches beyond its storage")
        if math.prod(size) > numel:
            raise ValueError("it shows the same numbers again and again")
    except StorageError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(f"{origin} is truncated or damaged: {reason(error)}") from error
    return StoredRecord(start + begin + first * dtype.itemsize, dtype, size, stride)
