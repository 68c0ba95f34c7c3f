"""Ratios by layer against the published formula, and that nothing is lost in rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.errors import UsageError
from megatron_prune.methods.allocation import OutlierWeighing, whole_inputs


@pytest.mark.parametrize("seed", range(3))
def test_shifts_are_the_published_ones(seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = generator.integers(0, 5000, 7 + seed)
    share = counts / 100_003
    scaled = (share - share.min()) / (share.max() - share.min()) * 2 * 0.08  # kept more where outliers are dense
    density = scaled - scaled.mean() + (1 - 0.7)
    found = OutlierWeighing(5, 0.08).shifts([Fraction(int(count), 100_003) for count in counts], [9] * len(counts))
    assert [0.7 + float(shift) for shift in found] == pytest.approx(1 - density, rel=1e-12)
    assert sum(found) == 0
    assert found[int(counts.argmax())] == min(found)  # the most outliers, the least removed


def test_layers_alike_are_pruned_alike() -> None:
    assert OutlierWeighing(5, 0.08).shifts([Fraction(1, 7)] * 3, [5, 6, 7]) == [0, 0, 0]
    assert whole_inputs([(7, 100)] * 3, 0.29, [Fraction(0)] * 3) == [
        29,
        29,
        29,
    ]  # not 28: 0.29 · 100 is 28.999… as a float
    assert whole_inputs([(5, 3)] * 4, 0.5, [Fraction(0)] * 4) == [2, 2, 1, 1]


@given(
    inputs=st.integers(1, 300),
    ratio=st.integers(200, 800),
    outliers=st.lists(st.integers(0, 50), min_size=1, max_size=12),
)
def test_the_total_is_exact(inputs: int, ratio: int, outliers: list[int]) -> None:
    shifts = OutlierWeighing(5, 0.0999).shifts([Fraction(count, 1000) for count in outliers], [1] * len(outliers))
    counts = whole_inputs([(7, inputs)] * len(outliers), ratio / 1000, shifts)
    assert sum(counts) == inputs * ratio * len(outliers) // 1000
    for count, shift in zip(counts, shifts, strict=True):
        assert abs(count - inputs * (Fraction(ratio, 1000) + shift)) < 1
        assert 0 <= count <= inputs


@given(
    layers=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(0, 50)), min_size=1, max_size=12),
    ratio=st.integers(200, 800),
)
def test_layers_of_different_sizes_lose_together_what_was_asked_for(
    layers: list[tuple[int, int, int]], ratio: int
) -> None:
    """In weights: to less than one input of a matrix."""
    sizes = [(rows, inputs) for rows, inputs, _ in layers]
    weights = [rows * inputs for rows, inputs in sizes]
    shifts = OutlierWeighing(5, 0.0999).shifts([Fraction(count, 1000) for _, _, count in layers], weights)
    assert sum(weight * shift for weight, shift in zip(weights, shifts, strict=True)) == 0
    counts = whole_inputs(sizes, ratio / 1000, shifts)
    lost = sum(rows * count for (rows, _), count in zip(sizes, counts, strict=True))
    assert 0 <= Fraction(ratio, 1000) * sum(weights) - lost < max(rows for rows, _ in sizes)
    for (_, inputs), count, shift in zip(sizes, counts, shifts, strict=True):
        assert abs(count - inputs * (Fraction(ratio, 1000) + shift)) < 1
        assert 0 <= count <= inputs


@pytest.mark.parametrize(("threshold", "bound"), [(0, 0.08), (5, -0.1), (5, 0.15), (float("nan"), 0.08)])
def test_settings_that_could_empty_a_layer_are_refused(threshold: float, bound: float) -> None:
    OutlierWeighing(5, 0.08).check(0.7, "--ratio")
    with pytest.raises(UsageError, match="--owl-(threshold|bound): expected"):
        OutlierWeighing(threshold, bound).check(0.7, "--ratio")
