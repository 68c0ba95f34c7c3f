"""Batch schedules: how many samples of every corpus each step of a run takes, where that changes as the run goes on.

Sheared-LLaMA (2310.06694, Algorithm 1) loads its batches by what is left to learn. With validation losses l and
reference losses r by corpus, the proportions p become

    p · exp(max(l − r, 0)),   normalised, and mixed with 1e-4 of equal proportions, so that no corpus is lost.

A run is divided into blocks of ``every`` steps. Each block has fixed proportions, and from these and what earlier
blocks took follow its samples, exactly: whole numbers by largest remainder, with what rounding owes to a corpus carried
into the next block. So the samples of a run are a function of the recorded losses. These are in thousandths of a nat:
another layout, whose losses differ in the last digits, has the same samples.

A corpus gives its samples in the order that it has in the stream (``streams.py``): of corpus i a run takes the samples
[begins_i, begins_i + taken_i), without a gap, and no sample twice. One that has no sample left gives no more, and the
others give its share.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prune import artifacts
from megatron_prune.data.streams import Stream, epoch_seed
from megatron_prune.errors import DataError, MegatronPruneError

FILE = "batch_schedule.json"
VERSION = 1
DIGITS = 3  # of a loss, after the point
UNIFORM = 1e-4  # of equal proportions, in every update


def updated(proportions: Sequence[float], losses: Sequence[float], references: Sequence[float]) -> tuple[float, ...]:
    """The proportions after an update (float64). All three are by corpus; ``losses`` and ``references`` in nats."""
    excess = [max(loss - reference, 0.0) for loss, reference in zip(losses, references, strict=True)]
    highest = max(excess)  # exp of a large loss would overflow; the factor cancels
    raised = [p * math.exp(one - highest) for p, one in zip(proportions, excess, strict=True)]
    total = math.fsum(raised)
    return tuple((1 - UNIFORM) * one / total + UNIFORM / len(raised) for one in raised)


def allocate(proportions: Sequence[float], samples: int, owed: Sequence[float], left: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers that sum to ``samples``, as near to their share as can be: ``proportions · samples + owed``.

    ``owed``: what rounding has kept from each before. ``left``: how many each has; DataError if that is not enough.
    """
    if sum(left) < samples:
        raise DataError(
            f"{samples} samples are to be drawn, and all corpora together have {sum(left)} left: give more text"
        )
    wanted = [max(p * samples + due, 0.0) for p, due in zip(proportions, owed, strict=True)]
    found, rest, open_ = [0] * len(wanted), samples, [i for i, most in enumerate(left) if most]
    while True:
        total = math.fsum(wanted[i] for i in open_)
        share = {i: wanted[i] * rest / total if total else rest / len(open_) for i in open_}
        spent = [i for i in open_ if share[i] > left[i]]
        if not spent:
            break
        for i in spent:
            found[i] = left[i]
            rest -= left[i]
            open_.remove(i)
    for i in open_:
        found[i] = math.floor(share[i])
    behind = sorted((i for i in open_ if found[i] < left[i]), key=lambda i: (found[i] - share[i], i))
    for i in behind[: samples - sum(found)]:
        found[i] += 1
    return tuple(found)


@dataclass(frozen=True)
class Block:
    """Steps with fixed proportions."""

    step: int  # the first, from 0
    losses: tuple[float, ...] | None  # by corpus, measured before that step; None where nothing was measured
    proportions: tuple[float, ...]
    counts: tuple[int, ...]  # samples of each corpus


@dataclass
class Schedule:
    """The blocks of a run so far, oldest first; ``extend`` adds the next one."""

    stream: Mapping[str, Any]  # as ``Stream.describe``
    start: int  # of the run's range in the stream
    steps: int
    global_batch_size: int
    every: int
    permutation_seed: int | None
    begins: tuple[int, ...]  # first sample of each corpus
    available: tuple[int, ...]  # samples of each corpus from there on
    settings: Mapping[str, Any]  # references, validation, samples; or follows
    blocks: list[Block] = field(default_factory=list)
    edges: tuple[int, ...] = ()  # further steps at which a block begins, where a run follows a shorter one

    def _starts(self) -> list[int]:
        """First steps of all blocks, up to the end of the run."""
        parts = itertools.pairwise([0, *self.edges, self.steps])
        return [step for first, end in parts for step in range(first, end, self.every)]

    @property
    def next_step(self) -> int | None:
        """The first step of the block that is not there yet; None where the schedule is whole."""
        starts = self._starts()
        return starts[len(self.blocks)] if len(self.blocks) < len(starts) else None

    @property
    def taken(self) -> tuple[int, ...]:
        """Samples of each corpus in all blocks."""
        return tuple(map(sum, zip(*(block.counts for block in self.blocks), strict=True))) or (0,) * len(self.begins)

    @property
    def domains(self) -> list[list[int]]:
        """The samples of each corpus: [first, end)."""
        return [[begin, begin + taken] for begin, taken in zip(self.begins, self.taken, strict=True)]

    def extend(self, proportions: Sequence[float], losses: Sequence[float] | None = None) -> Block:
        """Add the next block. DataError if the corpora have too few samples left."""
        step = self.next_step
        assert step is not None
        ends = [*self._starts(), self.steps]
        samples = (ends[len(self.blocks) + 1] - step) * self.global_batch_size
        taken = self.taken
        left = [most - used for most, used in zip(self.available, taken, strict=True)]
        counts = allocate(proportions, samples, self._owed(), left)
        block = Block(step, None if losses is None else tuple(losses), tuple(proportions), counts)
        self.blocks.append(block)
        return block

    def _owed(self) -> list[float]:
        """What rounding owes to each corpus: below one sample, where no corpus was at its end."""
        owed = [0.0] * len(self.begins)
        for block in self.blocks:
            samples = sum(block.counts)
            found = zip(owed, block.proportions, block.counts, strict=True)
            owed = [min(max(due + p * samples - count, -1.0), 1.0) for due, p, count in found]
        return owed

    def spent(self) -> list[int]:
        """The corpora that have no sample left."""
        return [i for i, taken in enumerate(self.taken) if taken == self.available[i]]

    @property
    def hash(self) -> str:
        """What decides the samples of every step: two runs with one hash read the same."""
        blocks = [[block.step, list(block.counts)] for block in self.blocks]
        return artifacts.sha256_json(
            {"stream": self.stream["id"], "batch": self.global_batch_size, "permutation": self.permutation_seed,
             "begins": list(self.begins), "blocks": blocks}
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As the file holds it: lists, no tuples."""
        plain: dict[str, Any] = artifacts.with_nulls({"version": VERSION, **asdict(self)})
        return plain

    def write(self, path: str | Path) -> None:
        """Write the file atomically."""
        artifacts.write_json(path, self.to_json())

    @staticmethod
    def read(path: str | Path) -> Schedule:
        """DataError if there is no such file, or it is damaged."""
        try:
            return Schedule.of(artifacts.read_json(path))
        except MegatronPruneError as error:
            raise DataError(str(error)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is not a batch schedule, or damaged: {error!r}") from error

    @staticmethod
    def of(held: Mapping[str, Any]) -> Schedule:
        """From ``to_json``. Raises ValueError, KeyError or TypeError for anything else."""
        held = dict(held)
        if held.pop("version") != VERSION:
            raise ValueError("another version")
        blocks = [
            Block(one["step"], None if one["losses"] is None else tuple(one["losses"]), tuple(one["proportions"]),
                  tuple(one["counts"]))
            for one in held.pop("blocks")
        ]  # fmt: skip
        lists: dict[str, Any] = {name: tuple(held.pop(name)) for name in ("begins", "available", "edges")}
        found = Schedule(**held, **lists, blocks=blocks)
        found._check()
        return found

    def _check(self) -> None:
        """ValueError unless the blocks are those of the run, and each is full."""
        starts = self._starts()
        ends = [*starts[1:], self.steps]
        if [block.step for block in self.blocks] != starts[: len(self.blocks)] or not self.blocks:
            raise ValueError("its blocks are not those of its steps")
        for block, end in zip(self.blocks, ends, strict=False):
            if sum(block.counts) != (end - block.step) * self.global_batch_size or min(block.counts) < 0:
                raise ValueError(f"the block of step {block.step} is not full")
        sizes = {len(block.counts) for block in self.blocks} | {len(block.proportions) for block in self.blocks}
        if sizes != {len(self.begins)} or len(self.available) != len(self.begins):
            raise ValueError("its blocks are for different numbers of corpora")

    # -- samples --------------------------------------------------------------------------------------------------

    def order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Corpus and sample number of every place of block ``number``, each [samples of the block].

        Every corpus is spread evenly over the block, or all are shuffled with the permutation seed.
        """
        block, earlier = self.blocks[number], self.blocks[:number]
        first = np.array([self.begins, *(one.counts for one in earlier)]).sum(axis=0)
        corpora = np.repeat(np.arange(len(block.counts)), block.counts)
        within = np.concatenate([np.arange(count) for count in block.counts])
        sizes = np.asarray(block.counts)[corpora]
        places = np.lexsort((corpora, (2 * within + 1) / (2 * sizes)))  # equal fractions are equal floats
        if self.permutation_seed is not None:
            # RandomState, as in all of data/: NumPy guarantees that its numbers never change.
            np.random.RandomState(epoch_seed(self.permutation_seed, 1 + block.step)).shuffle(places)
        return corpora[places], (first[corpora] + within)[places]


def followed(earlier: Schedule, steps: int) -> Schedule:
    """The schedule of a run of ``steps`` that follows ``earlier``, which is whole: its blocks, and after its end its
    last proportions, again in blocks. Raises DataError as ``Schedule.extend``."""
    made = Schedule(
        stream=earlier.stream, start=earlier.start, steps=steps, global_batch_size=earlier.global_batch_size,
        every=earlier.every, permutation_seed=earlier.permutation_seed, begins=earlier.begins,
        available=earlier.available, settings={"follows": earlier.hash}, blocks=list(earlier.blocks),
        edges=(*earlier.edges, earlier.steps),
    )  # fmt: skip
    while made.next_step is not None:
        made.extend(made.blocks[-1].proportions)
    return made


class ScheduledRange(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples of a run under a schedule, which may grow while they are read; the counterpart of ``StreamRange``."""

    def __init__(self, stream: Stream, schedule: Schedule):
        self.stream, self.schedule = stream, schedule
        self._held = -1, np.empty(0, int), np.empty(0, int)  # a block: its number, corpora and samples

    def __len__(self) -> int:
        return self.schedule.steps * self.schedule.global_batch_size

    def sample(self, position: int) -> tuple[int, int]:
        """(corpus, number of its sample) at ``position`` of this range. LookupError for a block that is yet to come."""
        schedule = self.schedule
        step = position // schedule.global_batch_size
        number = bisect.bisect_right(schedule.blocks, step, key=lambda block: block.step) - 1
        block = schedule.blocks[number]
        place = position - block.step * schedule.global_batch_size
        if not 0 <= place < sum(block.counts):
            raise LookupError(f"the proportions of step {step} are not known yet")
        if self._held[0] != number:
            self._held = number, *schedule.order(number)
        return int(self._held[1][place]), int(self._held[2][place])

    def __getitem__(self, position: int) -> dict[str, Any]:
        corpus, number = self.sample(int(position))
        found: dict[str, Any] = self.stream.members[corpus][number]
        return {**found, "dataset_id": corpus}
