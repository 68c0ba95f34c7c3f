"""The weights of a checkpoint in Megatron's `torch_dist` format: an index and numbered files of records.

Every object in it is vetted when it is opened, whether or not anybody here needs it: Megatron unpickles them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_prune import storage
from megatron_prune.checkpoint import index, safe, safe_objects
from megatron_prune.checkpoint.files import StoredFiles
from megatron_prune.checkpoint.index import Box
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout
from megatron_prune.errors import CheckpointError

_COMMON = "common_state/shard_0_1"  # the one that Megatron reads


class TorchDistSource:
    """What ``Checkpoint`` reads, from a `torch_dist` directory: ``common`` state, ``stored`` tensors, numbers."""

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
            return safe_objects.load_common(older.read_bytes(), str(older))
        for entry, info in metadata.storage_data.items():
            if entry.fqn == _COMMON:
                payload = _content(info, self._files, self._directory)
                return safe_objects.load_common(payload, str(self._directory / info.relative_path))
        raise CheckpointError(
            f"{self._directory} holds neither common_state nor common.pt: it was not saved by Megatron"
        )

    def refuse_damaged(self) -> None:
        """Refuse a tensor, of an optimizer too, whose record is not what ``torch.save`` writes, naming it."""
        for tensor in self.stored.values():
            for piece in tensor.pieces:
                self._files.record(piece)

    def locate(self, layouts: Mapping[str, WeightLayout], shape: ModelShape) -> dict[str, tuple[Box, ...]]:
        """The boxes of every logical weight. Raises CheckpointError where one is missing, or in the wrong shape, and
        for stored weights that are none of them."""
        boxes = {name: index.locate(layout, shape, self.stored, self._directory) for name, layout in layouts.items()}
        known = {box.piece.key for found in boxes.values() for box in found}
        index.refuse_unknown(self.stored, known, self._directory)
        return boxes

    def fill(self, target: torch.Tensor, box: Box, first: int) -> None:
        """Copy rows of a box, from its row ``first`` on, into ``target`` [rows, ...]."""
        self._files.fill(target, box, first)

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
    """Refuse (CheckpointError, naming it) a record of an index that is no tensor's, unless all of it may be loaded."""
    objects = [
        (entry.fqn, info)
        for entry, info in metadata.storage_data.items()
        if entry.offset is None or not isinstance(metadata.state_dict_metadata.get(entry.fqn), TensorStorageMetadata)
    ]
    vetted: set[tuple[bool, bytes]] = set()  # most modules' states are the same bytes

    def vet(found: tuple[str, Any]) -> None:
        key, info = found
        payload = _content(info, files, directory)
        if (safe_objects.is_module_state(key), payload) not in vetted:
            safe_objects.vet(payload, key, str(directory / info.relative_path))
            vetted.add((safe_objects.is_module_state(key), payload))

    storage.each(vet, objects, directory)


def _content(info: Any, files: StoredFiles, directory: Path) -> bytes:
    index.check_files(directory, {info.relative_path: info.offset + info.length})
    return files.read_bytes(info.relative_path, info.offset, info.length)
