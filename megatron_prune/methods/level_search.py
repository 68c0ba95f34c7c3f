"""How a sparse method's ratio is divided among layers: an evolutionary search, after EvoPress (2410.14649).

A layer's level says how many steps its ratio is above (or below) the one that was asked for; levels sum to 0, so every
allocation removes as much. The search starts from level 0 everywhere. In every generation offspring are drawn from the
best allocation so far: one to three times a layer goes up and another down, by one step or a few. They are run on the
calibration text by successive halving (``halving.py``), and what is left replaces the parent if its loss on all of the
text is lower. So the result is never worse than equal ratios on that text, with the masks that the search uses.

The published search keeps the same elite of one and draws the number of swaps in the same way, the lower of two draws
from one to three, each by one step; it has 64 offspring and fixed numbers of tokens and survivors for each stage. Far
allocations are a hill away at times, so half of the swaps here are by more than one step.

A step is a whole number of inputs of every matrix (``LevelGrid``), so that levels remove exactly as many as each other.
Pure mathematics: ``sparse/level_masks.py`` runs the model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_prune.errors import UsageError
from megatron_prune.methods import halving

GENERATIONS = 50
OFFSPRING = 16
MOST_SWAPS = 3
_STRIDES = (1, 1, 2, 4)
_STEP = Fraction(1, 40)  # about
_SPAN = Fraction(1, 5)  # at most this much above or below the ratio that was asked for

Levels = tuple[int, ...]
Losses = Callable[[Sequence[Levels], int, int], list[float]]  # of allocations, on the windows from … to …


@dataclass(frozen=True)
class LevelSearch:
    """The settings of ``--allocation search``."""

    generations: int
    seed: int

    def __post_init__(self) -> None:
        if self.generations < 1:
            raise UsageError("--search-generations", got=self.generations, expected="at least 1")

    def describe(self) -> dict[str, Any]:
        return {"name": "search", "generations": self.generations, "seed": self.seed}


@dataclass(frozen=True)
class LevelGrid:
    """Levels from ``lowest`` to ``highest``, ``step`` apart."""

    step: Fraction
    lowest: int
    highest: int

    @staticmethod
    def of(inputs: Iterable[int], ratios: Iterable[float]) -> LevelGrid:
        """For matrices with so many ``inputs`` that lose these ``ratios``; UsageError if they have no common step."""
        unit = math.gcd(*inputs)
        step = Fraction(max(1, round(unit * _STEP)), unit)
        exact = [Fraction(str(ratio)) for ratio in ratios]
        below = min(_SPAN, *exact)
        above = min(_SPAN, *((1 - ratio) - step for ratio in exact))  # something stays
        grid = LevelGrid(step, -math.floor(below / step), max(0, math.floor(above / step)))
        if not grid.lowest < 0 < grid.highest:
            raise UsageError(
                "--allocation", got="search", expected="owl or uniform",
                why=f"the matrices' numbers of inputs divide into steps of {float(step):.3g}, which leaves no room at "
                "this ratio",
            )  # fmt: skip
        return grid

    @property
    def levels(self) -> range:
        return range(self.lowest, self.highest + 1)


@dataclass(frozen=True)
class Found:
    """The best allocation after ``generation`` generations; losses are on all windows."""

    levels: Levels
    loss: float
    uniform: float  # the loss of equal ratios
    generation: int = 0
    passes: int = 0  # of one window through the model

    def to_json(self) -> dict[str, Any]:
        return {
            "levels": list(self.levels), "loss": self.loss, "uniform": self.uniform, "generation": self.generation,
            "passes": self.passes,
        }  # fmt: skip

    @staticmethod
    def from_json(content: dict[str, Any]) -> Found:
        return Found(**{**content, "levels": tuple(content["levels"])})


def begin(layers: int, windows: int, losses: Losses) -> Found:
    """Equal ratios."""
    levels = (0,) * layers
    (loss,) = losses([levels], 0, windows)
    return Found(levels, loss, loss, passes=windows)


def generation(found: Found, search: LevelSearch, grid: LevelGrid, windows: int, losses: Losses) -> Found:
    """``found`` after one more generation. A function of its arguments: nothing else is remembered."""
    draw = random.Random(f"{search.seed} {found.generation}")
    standing, passes = offspring(found.levels, grid, draw), found.passes
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
        return replace(after, levels=standing[0], loss=loss)
    return after


def offspring(parent: Levels, grid: LevelGrid, draw: random.Random) -> list[Levels]:
    """Up to ``OFFSPRING`` different allocations that differ from ``parent`` by one to three swaps."""
    found: dict[Levels, None] = {}
    for _ in range(4 * OFFSPRING):  # few layers have few neighbours
        child = list(parent)
        for _ in range(min(draw.randint(1, MOST_SWAPS), draw.randint(1, MOST_SWAPS))):
            up, down = draw.sample(range(len(child)), 2)
            steps = min(draw.choice(_STRIDES), grid.highest - child[up], child[down] - grid.lowest)
            child[up], child[down] = child[up] + steps, child[down] - steps
        if tuple(child) != parent:
            found[tuple(child)] = None
        if len(found) == OFFSPRING:
            break
    return list(found)
