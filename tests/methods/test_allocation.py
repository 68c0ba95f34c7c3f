"""Ratios by layer against the published formula, or a sorted ranking, and that nothing is lost in rounding."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_prune.errors import UsageError
from megatron_prune.methods.allocation import SCORE_BINS, GlobalRanking, OutlierWeighing, whole_inputs


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


# ------------------------------------------------------------------ one ranking of all weights

BINS = st.one_of(st.integers(0, 5), st.integers(0, SCORE_BINS - 1), st.just(SCORE_BINS - 1))
SCORES = st.dictionaries(BINS, st.integers(1, 40), min_size=1, max_size=6)
LAYERS = st.lists(SCORES, min_size=1, max_size=6)
INPUTS = st.lists(st.integers(2, 30), min_size=1, max_size=3)


def ratios(layers: list[dict[int, int]], ratio: float, most: list[Fraction] | None = None) -> list[Fraction]:
    """What every layer loses; everything, if need be, where the most that it may lose is not given."""
    limits = [Fraction(1)] * len(layers) if most is None else most
    scores = [list(layer.items()) for layer in layers]
    return [Fraction(str(ratio)) + shift for shift in GlobalRanking().shifts(ratio, scores, limits)]


@settings(deadline=None)
@given(layers=LAYERS, permille=st.integers(1, 999))
def test_what_is_lost_are_the_lowest_of_all_scores(layers: list[dict[int, int]], permille: int) -> None:
    """Sorted, the lowest s·N go; of the equal ones at the end every layer loses the same fraction."""
    every = sorted(number for layer in layers for number, count in layer.items() for _ in range(count))
    goal = Fraction(permille, 1000) * len(every)
    last = every[-(-goal.numerator // goal.denominator) - 1]
    part = (goal - sum(number < last for number in every)) / Fraction(every.count(last))
    for layer, found in zip(layers, ratios(layers, permille / 1000), strict=True):
        below = sum(count for number, count in layer.items() if number < last)
        assert found == (below + part * layer.get(last, 0)) / sum(layer.values())


@settings(deadline=None)
@given(layers=LAYERS, permille=st.integers(1, 999), inputs=st.lists(INPUTS, min_size=6, max_size=6),
       least=st.sampled_from([0.0, 0.1, 0.35]))  # fmt: skip
def test_together_what_was_asked_for_and_no_layer_below_its_floor(
    layers: list[dict[int, int]], permille: int, inputs: list[list[int]], least: float
) -> None:
    ranking, ratio = GlobalRanking(least), permille / 1000
    most = [ranking.most(of_layer) for of_layer in inputs[: len(layers)]]
    sizes = [sum(layer.values()) for layer in layers]
    room = sum(share * size for share, size in zip(most, sizes, strict=True)) / sum(sizes)
    if Fraction(permille, 1000) > room:
        with pytest.raises(UsageError, match="--ratio: expected at most"):
            ranking.check_layers(ratio, most, sizes)
        return
    ranking.check_layers(ratio, most, sizes)
    found = ratios(layers, ratio, most)
    assert sum(size * one for size, one in zip(sizes, found, strict=True)) == Fraction(permille, 1000) * sum(sizes)
    for one, share, of_layer in zip(found, most, inputs, strict=False):
        assert 0 <= one <= share
        for number in of_layer:  # whole inputs: rounded up, a row still keeps one, and the floor
            gone = math.ceil(one * number)
            assert number - gone >= max(1, Fraction(str(least)) * number)
    # Those that may lose more lose what lies below one threshold: no score stays below one that goes.
    gone, kept = [0], [SCORE_BINS]
    for layer, one, share in zip(layers, found, most, strict=True):
        lost = one * sum(layer.values())
        gone += [number for number, below in cumulated(layer) if below - layer[number] < lost]
        kept += [number for number, below in cumulated(layer) if below > lost and one < share]
    assert max(gone) <= min(kept)


def cumulated(layer: dict[int, int]) -> list[tuple[int, int]]:
    """Every bin, ascending, with how many scores are in it or below."""
    return [(number, sum(count for other, count in layer.items() if other <= number)) for number in sorted(layer)]


@settings(deadline=None)
@given(layers=LAYERS, low=st.integers(1, 999), high=st.integers(1, 999))
def test_who_loses_more_together_loses_no_less_anywhere(layers: list[dict[int, int]], low: int, high: int) -> None:
    assume(low <= high)
    less, more = ratios(layers, low / 1000), ratios(layers, high / 1000)
    assert all(one <= other for one, other in zip(less, more, strict=True))


@settings(deadline=None)
@given(layer=SCORES, number=st.integers(1, 5), permille=st.integers(1, 999))
def test_layers_with_the_same_scores_lose_the_same(layer: dict[int, int], number: int, permille: int) -> None:
    twice = {bin_: 2 * count for bin_, count in layer.items()}  # a larger layer with the same distribution
    assert set(ratios([layer] * number + [twice], permille / 1000)) == {Fraction(permille, 1000)}


def test_a_layer_with_tiny_scores_is_stripped_but_never_empty() -> None:
    layers = [{7: 480}, {20000: 480}, {20001: 480}]
    most = [GlobalRanking().most([48, 96])] * 3
    assert most[0] == Fraction(47, 48)  # the smaller matrix keeps one input of a row
    found = ratios(layers, 0.5, most)
    assert found == [Fraction(47, 48), Fraction(1, 2) * 3 - Fraction(47, 48), 0]
    assert GlobalRanking(0.26).most([50, 8]) == Fraction(5, 8)  # 3 of 8 are 0.375, 2 are too few; 13 of 50 are 0.26
    assert GlobalRanking().describe() == {"name": "global"}
    assert GlobalRanking(0.3).describe() == {"name": "global", "least_kept": 0.3}


def test_a_floor_above_what_stays_is_refused() -> None:
    GlobalRanking(0.3).check(0.7, "--ratio")
    with pytest.raises(UsageError, match=r"--least-kept: expected at most 0\.3, got 0\.31 \(--ratio 0\.7"):
        GlobalRanking(0.31).check(0.7, "--ratio")
    with pytest.raises(UsageError, match=r"--ratio: expected at most 0\.9791 with --allocation global, got 0\.98"):
        GlobalRanking().check_layers(0.98, [Fraction(47, 48)] * 2, [480, 960])
