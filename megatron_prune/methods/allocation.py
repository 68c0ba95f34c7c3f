"""How a sparse method's ratio is divided among layers: OWL (2310.05175), outlier-weighed layerwise sparsity.

An outlier is a weight whose |W_ij|·√a_j (Wanda's score, see ``wanda.py``) is more than M times the mean over its
layer. With D_l the share of outliers in layer l of the dense model, and d_l = (D_l − min D) / (max D − min D), layer l
removes

    s_l = s + 2λ·(mean d − d_l)

of its weights: less where outliers are dense. These are the published code's numbers. Its ratios span 2λ; the paper
states |s_l − s| ≤ λ, which a single layer far from the others exceeds there and here. All layers have the same shapes,
so the mean over layers is the mean over weights.

Ratios are rounded to whole inputs: of a matrix with n inputs, every row (on average, for methods that compare whole
matrices) loses k_l of them, with k_l within one of n·s_l, and Σ k_l = ⌊n·s·layers⌋. So a row loses over all layers
exactly what was asked for, rounded down once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_prune.errors import UsageError


@dataclass(frozen=True)
class OutlierWeighing:
    """The settings of OWL: an outlier is above ``threshold`` times the mean; ratios span 2 · ``bound``."""

    threshold: float
    bound: float

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

    def shifts(self, outliers: Sequence[Fraction]) -> list[Fraction]:
        """s_l − s for every layer, from the share of outliers in each; they sum to 0."""
        low, high = min(outliers), max(outliers)
        if low == high:
            return [Fraction(0)] * len(outliers)
        scaled = [(share - low) / (high - low) for share in outliers]
        mean = sum(scaled) / Fraction(len(scaled))
        return [2 * Fraction(str(self.bound)) * (mean - one) for one in scaled]


def whole_inputs(inputs: int, ratio: float, shifts: Sequence[Fraction]) -> list[int]:
    """How many of ``inputs`` a row loses in each layer, if layer l is to lose the fraction ``ratio`` + shifts[l].

    Each is within one of its quota, and together they are what ``ratio`` asks for, rounded down once. Among equal
    remainders the lower layer is rounded up.
    """
    quotas = [inputs * (Fraction(str(ratio)) + shift) for shift in shifts]
    counts = [quota.numerator // quota.denominator for quota in quotas]
    left = int(sum(quotas)) - sum(counts)
    for layer in sorted(range(len(quotas)), key=lambda layer: counts[layer] - quotas[layer])[:left]:
        counts[layer] += 1
    return counts
