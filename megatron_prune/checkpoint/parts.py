"""Parts of a checkpoint that is not there yet: each process writes what it has, and goes on.

A part is a folder with shards of logical weights, as records in the form that the finished checkpoint wants
(``record.py``), and ``part.json``, which says what lies where. It appears whole or not at all, and can be read
back. ``CheckpointWriter.adopt`` makes parts belong to a checkpoint without copying them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_prune.artifacts import atomic_directory, read_json, write_json
from megatron_prune.checkpoint.layout import LAYERS
from megatron_prune.checkpoint.record import RecordFiles, tensor_record
from megatron_prune.errors import CheckpointError

PART_FILE = "part.json"
RECORD_BYTES = 256 << 20  # Megatron reads whole records: none is larger


@dataclass(frozen=True)
class Piece:
    """One record: a rectangle of a weight, and the bytes of a file that hold it."""

    name: str  # of the logical weight
    offsets: tuple[int, ...]  # of its first entry
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Part:
    """A part that was written: its pieces, and the SHA-256 of its files."""

    folder: Path
    pieces: tuple[Piece, ...]
    hashes: dict[str, str]

    def fill(self, name: str, offsets: Sequence[int], target: torch.Tensor) -> int:
        """Copy what this part has of the rectangle of ``name`` at ``offsets`` into ``target``; how many entries."""
        return sum(
            copy_overlap(self._read(piece), piece.offsets, target, offsets)
            for piece in self.pieces
            if piece.name == name and _overlap(piece.offsets, piece.sizes, offsets, target.shape)
        )

    def _read(self, piece: Piece) -> torch.Tensor:
        with open(self.folder / piece.file, "rb") as handle:
            handle.seek(piece.start)
            tensor: torch.Tensor = torch.load(io.BytesIO(handle.read(piece.length)), weights_only=True)
        return tensor.view(piece.sizes)


def copy_overlap(source: torch.Tensor, at: Sequence[int], target: torch.Tensor, offsets: Sequence[int]) -> int:
    """Copy what two rectangles of one tensor, ``source`` at ``at`` and ``target`` at ``offsets``, share; how much."""
    common = _overlap(at, source.shape, offsets, target.shape)
    if common is None:
        return 0
    found = source[tuple(slice(a - o, b - o) for (a, b), o in zip(common, at, strict=True))]
    target[tuple(slice(a - o, b - o) for (a, b), o in zip(common, offsets, strict=True))] = found
    return found.numel()


def _overlap(
    at: Sequence[int], size: Sequence[int], other: Sequence[int], other_size: Sequence[int]
) -> list[tuple[int, int]] | None:
    """First and end, along each axis, of what two rectangles share; None where it is nothing."""
    sides = zip(at, size, other, other_size, strict=True)
    common = [(max(a, b), min(a + m, b + n)) for a, m, b, n in sides]
    return common if all(a < b for a, b in common) else None


def write_part(folder: Path, shards: Iterable[tuple[str, Sequence[int], torch.Tensor]]) -> None:
    """Write ``folder``, replacing what was there. ``shards`` gives (logical weight, offsets, CPU tensor)."""
    with atomic_directory(folder, replace=True) as scratch:
        files = RecordFiles(scratch)
        pieces: list[Piece] = []
        try:
            for name, offsets, tensor in shards:
                rows = max(1, RECORD_BYTES // max(1, tensor[:1].nbytes))
                for first in range(0, len(tensor), rows):
                    block = tensor[first : first + rows].contiguous()
                    # In a layer it is stacked with it: [1, rows, ...].
                    stored = block.unsqueeze(0) if name.startswith(LAYERS) else block
                    file, start, length = files.append(tensor_record, stored)
                    place = (offsets[0] + first, *offsets[1:])
                    pieces.append(Piece(name, place, tuple(block.shape), block.dtype, file, start, length))
            files.close()
        finally:
            files.shutdown()
        listed = [asdict(piece) | {"dtype": str(piece.dtype).removeprefix("torch.")} for piece in pieces]
        write_json(scratch / PART_FILE, {"pieces": listed, "hashes": files.hashes})


def read_part(folder: Path) -> Part:
    """What ``write_part`` wrote to ``folder``. CheckpointError where it is damaged."""
    found = read_json(folder / PART_FILE)
    try:
        pieces = tuple(
            Piece(
                **piece
                | {
                    "offsets": tuple(piece["offsets"]),
                    "sizes": tuple(piece["sizes"]),
                    "dtype": getattr(torch, piece["dtype"]),
                }
            )
            for piece in found["pieces"]
        )
        hashes = dict(found["hashes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / PART_FILE} is damaged ({error!r}): delete {folder}") from error
    for name in hashes:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / PART_FILE} names {name}, which is no file of its own")
    ends: dict[str, int] = {}
    for piece in pieces:
        ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.length)
    for name, end in ends.items():
        if name not in hashes or not (folder / name).is_file() or os.path.getsize(folder / name) < end:
            raise CheckpointError(f"{folder / name} is missing or truncated: delete {folder}")
    return Part(folder, pieces, hashes)
