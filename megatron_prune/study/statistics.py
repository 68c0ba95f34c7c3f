"""Differences between paired runs: a mean, and with several seeds a t interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Scratch minus pruned, so that positive says that pruning won. One seed has no interval."""

    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def degrees_of_freedom(self) -> int:
        return self.seeds - 1

    @property
    def winner(self) -> str:
        """``pruned`` or ``scratch``; ``neither`` where the interval holds 0 (or the two are equal)."""
        low = self.mean if self.low is None else self.low
        high = self.mean if self.high is None else self.high
        return "pruned" if low > 0 else "scratch" if high < 0 else "neither"


def paired(pruned: Sequence[float], scratch: Sequence[float]) -> Difference:
    """The paired difference over seeds, with a two-sided 95% t interval from two seeds on."""
    differences = [s - p for p, s in zip(pruned, scratch, strict=True)]
    seeds = len(differences)
    mean = sum(differences) / seeds
    if seeds == 1:
        return Difference(1, mean)
    from scipy import stats

    error = stats.sem(differences)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * float(error)
    return Difference(seeds, mean, mean - reach, mean + reach)
