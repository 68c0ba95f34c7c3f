"""Write the weights of one checkpoint in several processes, each its share.

``Blocks`` says where the numbers come from, in a form that a new process can be told: paths, not open files. Every
process writes its share as a part (``parts.py``); ``CheckpointWriter.add_all`` makes the parts one checkpoint. A
process whose parent is killed dies with it, so that nobody writes into a folder that a rerun has taken over.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.layout import WeightLayout
from megatron_prune.checkpoint.memory import keep_freed_memory
from megatron_prune.checkpoint.parts import Part, read_part, write_part
from megatron_prune.errors import CheckpointError, UsageError


class Blocks:
    """The weights that are to be written, as blocks of rows; subclasses are dataclasses of what can be pickled.

    What else they hold (open checkpoints, as ``cached_property``) does not travel to other processes.
    """

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """Consecutive blocks of rows of the weight ``name``, of its ``dtype``."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """The type that the weight is stored as."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


def check_workers(workers: int) -> int:
    """``workers``, or UsageError."""
    if workers < 1:
        raise UsageError("--workers", given=workers, allowed="a number of processes, at least 1")
    return workers


def write_shares(folder: Path, layouts: Sequence[WeightLayout], blocks: Blocks, workers: int) -> list[Part]:
    """Write ``layouts`` in ``workers`` processes under ``folder``. Errors of theirs are raised here."""
    sizes = {layout.name: layout.numel * blocks.dtype(layout.name).itemsize for layout in layouts}
    work = [(folder / str(i), share, blocks) for i, share in enumerate(shares(sizes, workers))]
    run(_write_share, work, workers)
    return [read_part(place) for place, _, _ in work]


def shares(sizes: dict[str, int], number: int) -> list[list[str]]:
    """Names in at most ``number`` groups of nearly the same size, each in the order of ``sizes``."""
    groups: list[list[str]] = [[] for _ in range(number)]
    totals = [0] * number
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = totals.index(min(totals))
        groups[least].append(name)
        totals[least] += sizes[name]
    order = {name: i for i, name in enumerate(sizes)}
    return [sorted(group, key=order.__getitem__) for group in groups if group]


def run(function: Callable[..., Any], work: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """``function(*arguments)`` for every entry of ``work`` in ``workers`` new processes; the results in order."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once; forks of this process may hang
    context.set_forkserver_preload([__name__])
    watched, held = context.Pipe(duplex=False)  # this process alone holds the other end
    prepared = (watched, dict(os.environ))
    with held, ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=prepared) as pool:
        futures = [pool.submit(function, *arguments) for arguments in work]
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise CheckpointError(
                "a process of --workers died (killed, or out of memory): nothing was kept; try fewer"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(watched: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server's is of the time when it was started
    threading.Thread(target=_die_with_caller, args=(watched,), daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()


def _die_with_caller(watched: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        watched.recv()  # nothing is ever sent: the pipe ends when the caller does
    os._exit(1)


def _write_share(folder: Path, names: list[str], blocks: Blocks) -> None:
    def shards() -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
        for name in names:
            row = 0
            for block in blocks.rows(name):
                yield name, (row, *(0 for _ in block.shape[1:])), block.to(blocks.dtype(name))
                row += len(block)

    write_part(folder, shards())
