"""How a ratio is divided among layers: OWL (2310.05175), outlier-weighed layerwise sparsity.

An outlier is a weight whose |W_ij|·√a_j (Wanda's score, see ``wanda.py``) is more than M times the mean over its
layer. With D_l the share of outliers in layer l of the dense model, and d_l = (D_l − min D) / (max D − min D), layer l
removes

    s_l = s + 2λ·(mean d − d_l)

of its weights: less where outliers are dense. These are the published code's numbers. Its ratios span 2λ; the paper
states |s_l − s| ≤ λ, which a single layer far from the others exceeds there and here. The mean of d is over weights, so
that the layers together lose s where their sizes differ too; the published code, for layers of one shape, takes it over
layers, which is the same there.

Ratios are rounded to whole inputs: of a matrix with n inputs, every row (on average, for methods that compare whole
matrices) loses k_l of them, with k_l within one of n·s_l, and Σ k_l = ⌊n·s·layers⌋. So a row loses over all layers
exactly what was asked for, rounded down once. Where layers differ, it is the matrices' weights that add up to this, to
less than one input of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_prune.errors import UsageError

# The multiples M of the mean for which ``calibrate`` counts outliers for methods that cut units.
THRESHOLDS = (3.0, 5.0, 7.0, 10.0)


@dataclass(frozen=True)
class OutlierWeighing:
    """The settings of OWL: an outlier is above ``threshold`` times the mean; ratios span 2 · ``bound``."""

    threshold: float
    bound: float

    @staticmethod
    def of(threshold: float | None, bound: float | None) -> OutlierWeighing:
        """With the paper's settings where None is given."""
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
