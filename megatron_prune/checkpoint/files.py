"""The numbers in the files of a `torch_dist` directory, read by byte range. Nothing in them is executed."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_prune import storage
from megatron_prune.checkpoint import stored_record
from megatron_prune.checkpoint.index import Box, Piece
from megatron_prune.errors import CheckpointError


class StoredFiles:
    """Open files of ``directory``; usable from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, storage.LocalBytes | storage.StoredBytes] = {}
        self._records: dict[tuple[str, int], stored_record.Record] = {}

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

    def record(self, piece: Piece) -> stored_record.Record:
        """Where the numbers of a piece lie. Raises CheckpointError where its record is damaged or another's."""
        place = (piece.file, piece.start)
        if place not in self._records:
            origin = f"{self._directory / piece.file} (the shard of {piece.key} at {list(piece.offsets)})"
            record = stored_record.locate(self._open(piece.file), piece.start, piece.length, origin)
            if (record.dtype, torch.Size(record.size).numel()) != (piece.dtype, torch.Size(piece.sizes).numel()):
                raise CheckpointError(
                    f"{origin} holds {record.dtype} {list(record.size)}, "
                    f"the index says {piece.dtype} {list(piece.sizes)}"
                )
            self._records[place] = record
        return self._records[place]

    def read_bytes(self, name: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a file. Raises CheckpointError where it ends before."""
        found = self._open(name).read(length, start)
        if len(found) < length:
            raise CheckpointError(f"{self._directory / name} is truncated: it ends before {start + length}")
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
                    f"{self._directory / name} is truncated: {len(view) - done} bytes are missing at {start + done}"
                )
            done += got
