"""An evolutionary search for how a budget is divided among layers, after EvoPress (2410.14649).

What is searched is an allocation: levels of a sparse method's ratio (``level_search.py``) or sizes of layers
(``size_search.py``). In every generation offspring are drawn from the best allocation so far: one to three times a
layer gives something up and another gets it. They are run on the calibration text by successive halving
(``halving.py``), and what is left replaces the parent if its loss on all of the text is lower. So the result is never
worse than where the search began, on that text and run in that way.

The published search keeps the same elite of one and draws the number of swaps in the same way, the lower of two draws
from one to three, each by one step; it has 64 offspring and fixed numbers of tokens and survivors for each stage. Far
allocations are a hill away at times, so half of the swaps here are by more than one step.

Pure mathematics: what runs the model is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune.errors import UsageError
from megatron_prune.methods import halving

GENERATIONS = 50
OFFSPRING = 16
STRIDES = (1, 1, 2, 4)  # steps of a swap
_MOST_SWAPS = 3

type Losses[A] = Callable[[Sequence[A], int, int], list[float]]  # of allocations, on the windows from … to …


@dataclass(frozen=True)
class Evolution:
    """The settings of ``--allocation search``."""

    generations: int
    seed: int

    @staticmethod
    def of(generations: int | None, seed: int) -> Evolution:
        """From ``--search-generations``."""
        return Evolution(GENERATIONS if generations is None else generations, seed)

    def __post_init__(self) -> None:
        if self.generations < 1:
            raise UsageError("--search-generations", got=self.generations, expected="at least 1")

    def describe(self) -> dict[str, Any]:
        return {"name": "search", "generations": self.generations, "seed": self.seed}


@dataclass(frozen=True)
class Found[A]:
    """The best allocation after ``generation`` generations; losses are on all windows."""

    allocation: A
    loss: float
    uniform: float  # the loss of the allocation that treats all layers alike
    generation: int = 0
    passes: int = 0  # of one window through the model

    def to_json(self) -> dict[str, Any]:
        return {
            "allocation": self.allocation, "loss": self.loss, "uniform": self.uniform, "generation": self.generation,
            "passes": self.passes,
        }  # fmt: skip


def begin[A](starts: Sequence[A], windows: int, losses: Losses[A]) -> Found[A]:
    """The best of ``starts``, of which the first treats all layers alike."""
    found = losses(starts, 0, windows)
    usable, _ = halving.better(found, 1)
    best = usable[0] if usable else 0
    return Found(starts[best], found[best], found[0], passes=windows * len(starts))


def generation[A](
    found: Found[A],
    search: Evolution,
    offspring: Callable[[A, random.Random], list[A]],
    windows: int,
    losses: Losses[A],
) -> Found[A]:
    """``found`` after one more generation. A function of its arguments: nothing else is remembered."""
    draw = random.Random(f"{search.seed} {found.generation}")
    standing, passes = offspring(found.allocation, draw), found.passes
    sums, read = [0.0] * len(standing), 0
    rounds = halving.schedule(len(standing), windows, last=1)
    for number, round in enumerate(rounds):
        means = losses(standing, read, round.windows)
        sums = [total + (round.windows - read) * mean for total, mean in zip(sums, means, strict=True)]
        passes, read = passes + len(standing) * (round.windows - read), round.windows
        kept, _ = halving.better(sums, rounds[number + 1].candidates if number + 1 < len(rounds) else 1)
        standing, sums = [standing[i] for i in kept], [sums[i] for i in kept]
    after = replace(found, generation=found.generation + 1, passes=passes)
    if standing and (loss := sums[0] / windows) < found.loss:
        return replace(after, allocation=standing[0], loss=loss)
    return after


def mutations[A: Hashable](parent: A, swap: Callable[[A, random.Random], A], draw: random.Random) -> list[A]:
    """Up to ``OFFSPRING`` different allocations that differ from ``parent`` by one to three swaps."""
    found: dict[A, None] = {}
    for _ in range(4 * OFFSPRING):  # few layers have few neighbours
        child = parent
        for _ in range(min(draw.randint(1, _MOST_SWAPS), draw.randint(1, _MOST_SWAPS))):
            child = swap(child, draw)
        if child != parent:
            found[child] = None
        if len(found) == OFFSPRING:
            break
    return list(found)
