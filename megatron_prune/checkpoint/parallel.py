"""Write the weights of one checkpoint in several processes.

``Blocks`` describes the source of the weights in picklable form: paths, not open files. Each process writes its share
as a ``Part``; ``CheckpointWriter.add_all`` joins the parts into one checkpoint. A process dies with its parent, so that
no orphan writes into a folder that a rerun is using.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy
import torch

from megatron_prune import screen
from megatron_prune.artifacts import atomic_directory, bound_workers, read_json, write_json
from megatron_prune.checkpoint.layout import LAYERS, WeightLayout
from megatron_prune.checkpoint.record import RecordFiles, tensor_record
from megatron_prune.errors import CheckpointError

_LOOK_SECONDS = 1.0  # between updates of the progress bar


class Blocks:
    """The weights to write, as blocks of rows. Subclasses are dataclasses with picklable fields.

    Only the fields are pickled; anything else (open checkpoints, as ``cached_property``) is left out.
    """

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """Consecutive blocks of rows of the weight ``name``, of its ``dtype``."""
        raise NotImplementedError

    allow_non_finite = False

    def dtype(self, name: str) -> torch.dtype:
        """The type in which the weight is stored."""
        raise NotImplementedError

    def allowing(self, non_finite: bool) -> Self:
        """These blocks; with ``non_finite``, NaN and infinities in them are not refused."""
        self.allow_non_finite = non_finite
        return self

    def checked_rows(self, name: str) -> Iterator[torch.Tensor]:
        """``rows``. Raises CheckpointError at the first number that is not finite, unless they are allowed."""
        return self.rows(name) if self.allow_non_finite else finite(name, self.rows(name))

    def __getstate__(self) -> dict[str, Any]:
        state = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {**state, "allow_non_finite": self.allow_non_finite}


def finite(name: str, blocks: Iterable[torch.Tensor], row: int = 0) -> Iterator[torch.Tensor]:
    """Yield the consecutive ``blocks`` of the weight ``name``, from ``row`` on. Raises CheckpointError, with the place,
    at the first NaN or infinity."""
    for block in blocks:
        # A sum is not finite if one of its numbers is not: one pass, and no copy.
        if block.numel() and not math.isfinite(float(block.sum(dtype=torch.float32))):
            odd = torch.isfinite(block).logical_not_().view(-1)
            if bool(odd.any()):
                first = int(odd.to(torch.uint8).argmax())
                place = [int(i) for i in numpy.unravel_index(first, tuple(block.shape))]
                raise CheckpointError(
                    f"{name}[{', '.join(map(str, [row + place[0], *place[1:]]))}] is {float(block.view(-1)[first])}: "
                    "expected finite weights; the training that made them diverged, or a file is damaged "
                    "(--allow-non-finite lets them pass)"
                )
        row += len(block)
        yield block


def check_workers(workers: int) -> int:
    """Returns ``workers``, or what the machine gives; raises UsageError if it is less than 1."""
    return bound_workers("--workers", workers)


def write_shares(folder: Path, layouts: Sequence[WeightLayout], blocks: Blocks, workers: int) -> list[Part]:
    """Write ``layouts`` in ``workers`` processes under ``folder``. Their errors are raised here."""
    sizes = {layout.name: layout.numel * blocks.dtype(layout.name).itemsize for layout in layouts}
    work = [(folder / str(i), share, blocks) for i, share in enumerate(shares(sizes, workers))]
    run(_write_share, work, workers, writing=folder, size=sum(sizes.values()))
    return [read_part(place) for place, _, _ in work]


def shares(sizes: dict[str, int], number: int) -> list[list[str]]:
    """The names in at most ``number`` groups of nearly equal size, each in the order of ``sizes``."""
    groups: list[list[str]] = [[] for _ in range(number)]
    totals = [0] * number
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = totals.index(min(totals))
        groups[least].append(name)
        totals[least] += sizes[name]
    order = {name: i for i, name in enumerate(sizes)}
    return [sorted(group, key=order.__getitem__) for group in groups if group]


def run(
    function: Callable[..., Any],
    work: Sequence[tuple[Any, ...]],
    workers: int,
    *,
    writing: Path | None = None,
    size: int = 0,
) -> list[Any]:
    """Call ``function(*arguments)`` for every entry of ``work`` in ``workers`` new processes; results in order.

    Shows how many of ``size`` bytes are in the folder ``writing``, if given. Raises CheckpointError if a worker dies.
    """
    context = multiprocessing.get_context("forkserver")  # imports torch once; forking this process can hang
    context.set_forkserver_preload([__name__])
    watched, held = context.Pipe(duplex=False)  # only this process holds the other end
    prepared = (watched, dict(os.environ))
    with held, ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=prepared) as pool:
        futures = [pool.submit(function, *arguments) for arguments in work]
        try:
            with screen.Bar(size, f"writing with {workers} processes", "B") as bar:
                while wait(futures, _LOOK_SECONDS, return_when=FIRST_EXCEPTION).not_done:
                    if any(future.done() and future.exception() for future in futures):
                        break
                    if writing is not None:
                        bar.reach(min(size, _bytes_in(writing)))
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise CheckpointError(
                "a worker process died (killed, or out of memory), and nothing was kept: use fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _bytes_in(folder: Path) -> int:
    """Total size of the files in ``folder``, which may be renamed meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _prepare(watched: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the fork server has the environment of its start
    for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)  # the caller's to handle
    threading.Thread(target=_die_with_caller, args=(watched,), daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()


def _die_with_caller(watched: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        watched.recv()  # nothing is ever sent: the pipe closes when the caller exits
    os._exit(1)


def _write_share(folder: Path, names: list[str], blocks: Blocks) -> None:
    def shards() -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
        for name in names:
            row = 0
            for block in blocks.checked_rows(name):
                yield name, (row, *(0 for _ in block.shape[1:])), block.to(blocks.dtype(name))
                row += len(block)

    write_part(folder, shards())


# Parts of an unfinished checkpoint. A part is a folder with shards of logical weights, as records (``record.py``), and
# ``part.json``, which lists them. It is written atomically. ``CheckpointWriter`` adopts parts without copying them.


PART_FILE = "part.json"
RECORD_BYTES = 256 << 20  # largest record, because Megatron reads whole records


@dataclass(frozen=True)
class WrittenPiece:
    """One record: a rectangle of a weight, and the bytes of a file that hold it."""

    name: str  # of the logical weight
    offsets: tuple[int, ...]  # of the first element
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Part:
    """A finished part: its pieces, and the SHA-256 of each of its files."""

    folder: Path
    pieces: tuple[WrittenPiece, ...]
    hashes: dict[str, str]

    def fill(self, name: str, offsets: Sequence[int], target: torch.Tensor) -> int:
        """Copy this part's share of the rectangle of ``name`` at ``offsets`` into ``target``; returns its elements."""
        return sum(
            copy_overlap(self._read(piece), piece.offsets, target, offsets)
            for piece in self.pieces
            if piece.name == name and _overlap(piece.offsets, piece.sizes, offsets, target.shape)
        )

    def _read(self, piece: WrittenPiece) -> torch.Tensor:
        with open(self.folder / piece.file, "rb") as handle:
            handle.seek(piece.start)
            tensor: torch.Tensor = torch.load(io.BytesIO(handle.read(piece.length)), weights_only=True)
        return tensor.view(piece.sizes)


def copy_overlap(source: torch.Tensor, at: Sequence[int], target: torch.Tensor, offsets: Sequence[int]) -> int:
    """Copy the intersection of ``source`` at ``at`` and ``target`` at ``offsets``; returns its number of elements."""
    common = _overlap(at, source.shape, offsets, target.shape)
    if common is None:
        return 0
    found = source[tuple(slice(a - o, b - o) for (a, b), o in zip(common, at, strict=True))]
    target[tuple(slice(a - o, b - o) for (a, b), o in zip(common, offsets, strict=True))] = found
    return found.numel()


def _overlap(
    at: Sequence[int], size: Sequence[int], other: Sequence[int], other_size: Sequence[int]
) -> list[tuple[int, int]] | None:
    """[start, end) of the intersection of two rectangles along each axis; None if it is empty."""
    sides = zip(at, size, other, other_size, strict=True)
    common = [(max(a, b), min(a + m, b + n)) for a, m, b, n in sides]
    return common if all(a < b for a, b in common) else None


def write_part(folder: Path, shards: Iterable[tuple[str, Sequence[int], torch.Tensor]]) -> None:
    """Write ``folder``, replacing its old content. ``shards`` yields (logical weight, offsets, CPU tensor)."""
    with atomic_directory(folder, replace=True) as scratch:
        files = RecordFiles(scratch)
        pieces: list[WrittenPiece] = []
        try:
            for name, offsets, tensor in shards:
                rows = max(1, RECORD_BYTES // max(1, tensor[:1].nbytes))
                for first in range(0, len(tensor), rows):
                    block = tensor[first : first + rows].contiguous()
                    # Weights of layers are stacked: [1, rows, ...].
                    stored = block.unsqueeze(0) if name.startswith(LAYERS) else block
                    file, start, length = files.append(tensor_record, stored)
                    place = (offsets[0] + first, *offsets[1:])
                    pieces.append(WrittenPiece(name, place, tuple(block.shape), block.dtype, file, start, length))
            files.close()
        finally:
            files.shutdown()
        listed = [asdict(piece) | {"dtype": str(piece.dtype).removeprefix("torch.")} for piece in pieces]
        write_json(scratch / PART_FILE, {"pieces": listed, "hashes": files.hashes})


def read_part(folder: Path) -> Part:
    """Read what ``write_part`` wrote to ``folder``. Raises CheckpointError if it is damaged."""
    found = read_json(folder / PART_FILE)
    try:
        pieces = tuple(
            WrittenPiece(
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
            raise CheckpointError(
                f"{folder / PART_FILE}: expected names of files in that folder, got {name}; delete {folder}"
            )
    ends: dict[str, int] = {}
    for piece in pieces:
        ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.length)
    for name, end in ends.items():
        if name not in hashes or not (folder / name).is_file() or os.path.getsize(folder / name) < end:
            raise CheckpointError(f"{folder / name} is missing or truncated: delete {folder}")
    return Part(folder, pieces, hashes)


# Allocator settings for processes that stream blocks of a few megabytes.


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST, _KEPT = 32 << 20, 256 << 20  # largest block to keep when freed, and total to keep


def keep_freed_memory() -> None:
    """Make malloc reuse freed blocks instead of returning them to the system; page faults took half the time."""
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
