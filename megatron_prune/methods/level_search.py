"""Levels of a sparse method's ratio, which ``evolution.py`` searches.

A layer's level says how many steps its ratio is above (or below) the one that was asked for; levels sum to 0, so every
allocation removes as much. The search starts from level 0 everywhere. A swap moves one layer up and another down.

A step is a whole number of inputs of every matrix (``LevelGrid``), so that levels remove exactly as many as each other.
Pure mathematics: ``sparse/level_masks.py`` runs the model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from megatron_prune.errors import UsageError
from megatron_prune.methods import evolution

_STEP = Fraction(1, 40)  # about
_SPAN = Fraction(1, 5)  # at most this much above or below the ratio that was asked for

Levels = tuple[int, ...]


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
                "--allocation", got="search", expected="global, owl or uniform",
                why=f"the matrices' numbers of inputs divide into steps of {float(step):.3g}, which leaves no room at "
                "this ratio",
            )  # fmt: skip
        return grid

    @property
    def levels(self) -> range:
        return range(self.lowest, self.highest + 1)

    def offspring(self, parent: Levels, draw: random.Random) -> list[Levels]:
        """Different allocations that are a few swaps away."""
        return evolution.mutations(parent, self._swap, draw)

    def _swap(self, levels: Levels, draw: random.Random) -> Levels:
        changed = list(levels)
        up, down = draw.sample(range(len(levels)), 2)
        steps = min(draw.choice(evolution.STRIDES), self.highest - levels[up], levels[down] - self.lowest)
        changed[up], changed[down] = levels[up] + steps, levels[down] - steps
        return tuple(changed)
