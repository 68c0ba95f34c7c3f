"""The weights of a checkpoint in Megatron's `torch_dist` format: an index and numbered files of records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_prune.checkpoint import index, safe, safe_objects
from megatron_prune.checkpoint.files import StoredFiles
from megatron_prune.checkpoint.index import Box
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout
from megatron_prune.errors import CheckpointError


class TorchDistSource:
    """What ``Checkpoint`` reads, from a `torch_dist` directory: ``common`` state, ``stored`` tensors, numbers."""

    format = "torch_dist"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = StoredFiles(directory)
        metadata = safe.load_metadata(directory)
        self.common: dict[str, Any] = self._load_common(metadata)
        self.stored = index.stored_tensors(metadata, directory)

    def _load_common(self, metadata: Metadata) -> dict[str, Any]:
        older = self._directory / "common.pt"
        if older.is_file():
            return safe_objects.load_common(older.read_bytes(), str(older))
        for entry, info in metadata.storage_data.items():
            if entry.fqn.split("/")[0] == "common_state":
                path = self._directory / info.relative_path
                index.check_files(self._directory, {info.relative_path: info.offset + info.length})
                payload = self._files.read_bytes(path.name, info.offset, info.length)
                return safe_objects.load_common(payload, str(path))
        raise CheckpointError(
            f"{self._directory} holds neither common_state nor common.pt: it was not saved by Megatron"
        )

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
