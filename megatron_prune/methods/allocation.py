"""How a ratio is divided among layers: by outliers (OWL), or by one ranking of all weights.

OWL (2310.05175) is outlier-weighed layerwise sparsity. An outlier is a weight whose |W_ij|·√a_j (Wanda's score, see
``wanda.py``) is more than M times the mean over its layer. With D_l the share of outliers in layer l of the dense
model, and d_l = (D_l − min D) / (max D − min D), layer l removes

    s_l = s + 2λ·(mean d − d_l)

of its weights: less where outliers are dense. These are the published code's numbers. Its ratios span 2λ; the paper
states |s_l − s| ≤ λ, which a single layer far from the others exceeds there and here. The mean of d is over weights, so
that the layers together lose s where their sizes differ too; the published code, for layers of one shape, takes it over
layers, which is the same there.

``global`` removes from layer l the share of its weights that lie below one threshold, below which the fraction s of all
layers' weights lies. With magnitudes this is global magnitude pruning (Han et al., 1506.02626, with one threshold for
all layers as in Frankle & Carbin, 1803.03635). Wanda's own comparisons are within a row. Scores are counted by the
upper 16 bits of their fp32 representation, which sort like the scores: seven bits of precision below the leading one.
Of the bin that the threshold falls into, every layer gives the same fraction, so that Σ s_l·N_l = s·N exactly.

Ratios are rounded to whole inputs: of a matrix with n inputs, every row (on average, for methods that compare whole
matrices) loses k_l of them, with k_l within one of n·s_l, and Σ k_l = ⌊n·s·layers⌋. So a row loses over all layers
exactly what was asked for, rounded down once. Where layers differ, it is the matrices' weights that add up to this, to
less than one input of a matrix.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_prune.errors import UsageError

OUTLIERS = "outliers"  # the statistic of them: weights of a layer, and how many are above M times their mean score
# The multiples M of the mean for which ``calibrate`` counts outliers for methods that cut units.
THRESHOLDS = (3.0, 5.0, 7.0, 10.0)
SCORE_BINS = 1 << 15  # values of the upper 16 bits of an fp32 number that is not negative


@dataclass(frozen=True)
class OutlierWeighing:
    """The settings of OWL: an outlier is above ``threshold`` times the mean; ratios span 2 · ``bound``."""

    threshold: float
    bound: float

    @staticmethod
    def of(threshold: float | None, bound: float | None) -> OutlierWeighing:
        """With the paper's settings for models of the LLaMA family where None is given."""
        return OutlierWeighing(5.0 if threshold is None else threshold, 0.08 if bound is None else bound)

    def check(self, ratio: float, flag: str) -> None:
        """UsageError if a layer might keep or lose everything. ``flag`` gave ``ratio``."""
        if not self.threshold > 0:
            raise UsageError("--owl-threshold", got=self.threshold, expected="a number above 0")
        room = min(Fraction(str(ratio)), 1 - Fraction(str(ratio))) / 2  # as decimals: 1 - 0.7 is 0.3
        if not 0 <= self.bound < float(room):
            raise UsageError(
                "--owl-bound",
                got=self.bound,
                expected=f"at least 0 and less than {float(room):g}",
                why=f"a layer's ratio may differ by twice as much from {flag} {ratio:g}",
            )

    def describe(self) -> dict[str, Any]:
        return {"name": "owl", "threshold": self.threshold, "bound": self.bound}

    def shifts(self, outliers: Sequence[Fraction], weights: Sequence[int]) -> list[Fraction]:
        """s_l − s for every layer, from the share of outliers in each; over their ``weights`` they sum to 0."""
        low, high = min(outliers), max(outliers)
        if low == high:
            return [Fraction(0)] * len(outliers)
        scaled = [(share - low) / (high - low) for share in outliers]
        mean = sum(size * one for size, one in zip(weights, scaled, strict=True)) / Fraction(sum(weights))
        return [2 * Fraction(str(self.bound)) * (mean - one) for one in scaled]


@dataclass(frozen=True)
class GlobalRanking:
    """One ranking of all layers' weights; every layer keeps at least the fraction ``least_kept`` of its own."""

    least_kept: float = 0.0

    def check(self, ratio: float, flag: str) -> None:
        """UsageError if layers that all keep ``least_kept`` cannot lose ``ratio``, which ``flag`` gave."""
        room = 1 - Fraction(str(ratio))  # as decimals: 1 - 0.7 is 0.3
        if Fraction(str(self.least_kept)) > room:
            raise UsageError(
                "--least-kept",
                got=self.least_kept,
                expected=f"at most {float(room):g}",
                why=f"{flag} {ratio:g} goes of all layers together",
            )

    def check_layers(self, ratio: float, most: Sequence[Fraction], weights: Sequence[int]) -> None:
        """UsageError if layers with so many ``weights`` that lose at most the fractions ``most`` cannot lose
        ``ratio``."""
        room = sum(share * size for share, size in zip(most, weights, strict=True)) / Fraction(sum(weights))
        if Fraction(str(ratio)) > room:
            raise UsageError(
                "--ratio", got=ratio, expected=f"at most {math.floor(room * 10**4) / 10**4:g} with --allocation global",
                why="every layer keeps at least one input of a row"
                + f", and the fraction {self.least_kept:g} of them" * bool(self.least_kept),
            )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {"name": "global"} | ({"least_kept": self.least_kept} if self.least_kept else {})

    def most(self, inputs: Iterable[int]) -> Fraction:
        """The largest ratio of a layer whose matrices have so many ``inputs``. Whole inputs, so that rounding keeps to
        it; at least one stays."""
        least = Fraction(str(self.least_kept))
        return min(1 - Fraction(max(1, math.ceil(least * number)), number) for number in inputs)

    def shifts(
        self, ratio: float, scores: Sequence[Sequence[tuple[int, int]]], most: Sequence[Fraction]
    ) -> list[Fraction]:
        """s_l − s for every layer; over the layers' weights they sum to 0.

        ``scores`` are a layer's filled bins and how many weights each has, ``most`` the largest s_l. What a layer keeps
        for that reason, the others lose: the threshold is higher.
        """
        asked, below = Fraction(str(ratio)), [_below(layer) for layer in scores]
        limits = [share * int(counts[-1]) for share, counts in zip(most, below, strict=True)]

        def lost(threshold: Fraction | int) -> list[Fraction]:
            """Weights that each layer loses: those of the whole bins below, and of the next bin that fraction."""
            whole, part = divmod(Fraction(threshold), 1)
            return [
                min(limit, int(counts[whole]) + part * int(counts[whole + 1] - counts[whole]))
                for limit, counts in zip(limits, below, strict=True)
            ]

        def together(threshold: Fraction | int) -> Fraction:
            return sum(lost(threshold), Fraction(0))

        goal = asked * sum(int(counts[-1]) for counts in below)
        upper = bisect_left(range(SCORE_BINS), goal, key=together)  # the threshold is in the bin before
        # In this bin all lose in proportion to the threshold, up to where a layer reaches its limit.
        corners = [Fraction(upper - 1), Fraction(upper)]
        for limit, counts in zip(limits, below, strict=True):
            first, last = int(counts[upper - 1]), int(counts[upper])
            if first < limit < last:
                corners.append(upper - 1 + (limit - first) / (last - first))
        corners.sort()
        place = bisect_left(corners, goal, key=together)
        low, high = corners[place - 1], corners[place]
        part = (goal - together(low)) / (together(high) - together(low))
        found = lost(low + part * (high - low))
        return [one / int(counts[-1]) - asked for one, counts in zip(found, below, strict=True)]


def _below(scores: Sequence[tuple[int, int]]) -> np.ndarray:
    """How many scores are in bins below each, int64 [SCORE_BINS + 2]; the last two entries are all of them."""
    found = np.zeros(SCORE_BINS + 2, dtype=np.int64)
    for number, count in scores:
        found[number + 1] = count
    return found.cumsum()


def whole_inputs(sizes: Sequence[tuple[int, int]], ratio: float, shifts: Sequence[Fraction]) -> list[int]:
    """How many inputs a row loses in each layer, if layer l is to lose the fraction ``ratio`` + shifts[l].

    ``sizes`` are (rows, inputs) of every layer. Each number is within one of its quota, and the weights that go are
    together at most those of all quotas, rounded down once if all layers have as many rows. The largest remainders are
    rounded up, as far as that allows; among equal ones the lower layer's.
    """
    quotas = [inputs * (Fraction(str(ratio)) + shift) for (_, inputs), shift in zip(sizes, shifts, strict=True)]
    counts = [quota.numerator // quota.denominator for quota in quotas]
    asked = sum(rows * quota for (rows, _), quota in zip(sizes, quotas, strict=True))
    left = asked - sum(rows * count for (rows, _), count in zip(sizes, counts, strict=True))
    for layer in sorted(range(len(quotas)), key=lambda layer: counts[layer] - quotas[layer]):
        if (rows := sizes[layer][0]) <= left and counts[layer] < quotas[layer]:
            counts[layer], left = counts[layer] + 1, left - rows
    return counts
