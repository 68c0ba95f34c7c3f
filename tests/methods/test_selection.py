"""Exact counts, and between equal scores the lower index stays: against Python's sort, on scores full of ties."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.masks.pattern import Pattern
from megatron_prune.methods.base import Sparsity
from megatron_prune.methods.selection import Rows, filled_bins, histogram, lowest_in_groups, lowest_in_rows
from megatron_prune.sparse.weights_only import BlockChoice, LowestInGroups, LowestOfAll
from tests.methods import oracles

# Few distinct values, zeros, subnormals and the largest float: values that tie or whose bits are special.
VALUES = st.sampled_from([0.0, 1e-45, 1e-39, 0.5, 1.0, 1.0000001, 1.0000002, 3.0, 3e38]) | st.floats(0, 4, width=32)


def matrices(rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
    return st.tuples(rows, columns).flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=VALUES))


SCORES = matrices(st.integers(1, 6), st.integers(1, 12))


def in_blocks(scores: torch.Tensor, made: BlockChoice, rows: int = 2) -> np.ndarray:
    """The result of a choice that gets ``rows`` rows at a time."""
    while made.counts:
        for block in scores.split(rows):
            made.count(block)
        made.narrow()
    return torch.cat([made.lowest(block) for block in scores.split(rows)]).numpy()


def mask_of(shape: tuple[int, ...], chosen: list[int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask.ravel()[chosen] = True
    return mask


@settings(deadline=None, max_examples=200)
@given(SCORES, st.data())
def test_lowest_in_rows(scores: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, scores.shape[1]))
    found = lowest_in_rows(torch.from_numpy(scores), count).numpy()
    for row, chosen in zip(scores, found, strict=True):
        assert sorted(oracles.lowest(row.tolist(), count)) == np.flatnonzero(chosen).tolist()


@settings(deadline=None, max_examples=200)
@given(SCORES, st.data())
@example(np.zeros((3, 4), np.float32), None)
def test_lowest_of_a_whole_matrix(scores: np.ndarray, data: st.DataObject | None) -> None:
    count = 5 if data is None else data.draw(st.integers(0, scores.size))
    expected = mask_of(scores.shape, oracles.lowest(scores.ravel().tolist(), count))
    given_scores = torch.from_numpy(scores)
    assert np.array_equal(Rows.all(len(scores)).lowest(given_scores, count).numpy(), expected)
    # In column-major layout, as in SparseGPT's blocks, indices still count row by row.
    transposed = given_scores.t().contiguous().t()
    assert np.array_equal(Rows.all(len(scores)).lowest(transposed, count).numpy(), expected)
    assert np.array_equal(in_blocks(given_scores, LowestOfAll(count)), expected)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 32), st.data())
def test_lowest_in_groups(m: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, m - 1))
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    scores = data.draw(arrays.arrays(np.float32, (rows, groups * m), elements=VALUES))
    found = lowest_in_groups(torch.from_numpy(scores), m - keep, m).numpy()
    assert np.array_equal(found, oracles.lowest_of_each_group(scores, keep, m))
    assert (found.reshape(-1, m).sum(1) == m - keep).all()
    assert np.array_equal(in_blocks(torch.from_numpy(scores), LowestInGroups(m - keep, m)), found)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([torch.bfloat16, torch.float16]), SCORES, st.data())
def test_halves_are_chosen_as_what_they_are_in_fp32(kind: torch.dtype, found: np.ndarray, data: st.DataObject) -> None:
    scores = torch.from_numpy(found).clamp(max=6e4).to(kind)
    count, m = data.draw(st.integers(0, scores.numel())), scores.shape[1]
    assert np.array_equal(in_blocks(scores, LowestOfAll(count)), in_blocks(scores.float(), LowestOfAll(count)))
    lowest = [in_blocks(some, LowestInGroups(m // 2, m), 1) for some in (scores, scores.float())]
    assert np.array_equal(*lowest)


def test_a_matrix_of_more_than_one_slice() -> None:
    scores = torch.randint(0, 7, (3000, 128), generator=torch.Generator().manual_seed(0)).float()
    for n, m in ((2, 4), (1, 2), (5, 8), (1, 32)):
        ranked = scores.view(-1, m).sort(dim=1, stable=True, descending=True).indices  # the lower index first
        expected = torch.ones(len(ranked), m, dtype=torch.bool).scatter_(1, ranked[:, :n], False)
        assert torch.equal(lowest_in_groups(scores, m - n, m), expected.view(scores.shape))


@pytest.mark.parametrize("broken", [float("inf"), float("nan"), -float("nan")])
def test_what_is_not_finite_is_refused(broken: float) -> None:
    scores = torch.ones(4, 8)
    scores[2, 3] = broken
    for choose in (
        lambda: lowest_in_rows(scores, 2),
        lambda: lowest_in_groups(scores, 2, 4),
        lambda: Rows.all(4).lowest(scores, 3),
        *(
            functools.partial(in_blocks, scores.to(kind), made)
            for kind in (torch.float32, torch.bfloat16, torch.float16)
            for made in (LowestOfAll(3), LowestInGroups(2, 4))
        ),
    ):
        with pytest.raises(CheckpointError, match="not finite"):
            choose()


@settings(max_examples=300)
@given(st.integers(0, 10**9), st.integers(1, 9999))
@example(100, 2900)  # 100 * 0.29 is 28.999999999999996 in floats
def test_counts_take_the_ratio_as_it_is_written(count: int, ten_thousandths: int) -> None:
    ratio = float(f"{ten_thousandths / 10000:.4f}")
    assert Sparsity(ratio, Pattern()).removed(count) == Fraction(ten_thousandths, 10000) * count // 1


def test_ratio_and_pattern() -> None:
    assert Sparsity.parse(0.3, "unstructured") == Sparsity(0.3, Pattern())
    assert Sparsity.parse(None, "1:4") == Sparsity.parse(0.75, "1:4") == Sparsity(0.75, Pattern(1, 4))
    assert Sparsity.parse(0.333333333333, "2:3") == Sparsity.parse(None, "2:3")
    for ratio, pattern, message in (
        (0.5, "1:4", r"--ratio: expected no such flag, or 0.75, got 0.5 \(1:4 removes 0.75\)"),
        (None, "unstructured", "--ratio: expected .*, got nothing"),
        (0.0, "unstructured", "--ratio: expected the fraction to remove, a number between 0 and 1, got 0.0"),
        (1.0, "2:4", "--ratio: expected .*, got 1.0"),
        (float("nan"), "unstructured", "--ratio: expected .*, got nan"),
    ):
        with pytest.raises(UsageError, match=message):
            Sparsity.parse(ratio, pattern)
    with pytest.raises(UsageError, match="fc2=: expected .*, got 2"):
        Sparsity.parse(2, "unstructured", "--module-ratio fc2=")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bins_are_the_upper_halves_of_fp32_numbers(dtype: torch.dtype) -> None:
    scores = (torch.randn(7, 300, generator=torch.Generator().manual_seed(2)).abs() * 1e-3).to(dtype)
    scores[0, :5] = 0
    upper = np.frombuffer(scores.float().numpy().tobytes(), dtype="<u2")[1::2]  # little-endian: the second half
    numbers, counts = np.unique(upper, return_counts=True)
    found = filled_bins(histogram(scores))
    assert found == [[int(number), int(count)] for number, count in zip(numbers, counts, strict=True)]
    assert found[0] == [0, 5] and sum(count for _, count in found) == scores.numel()
    for broken in (torch.inf, torch.nan, -torch.nan):
        scores[3, 1] = broken
        with pytest.raises(CheckpointError, match="not finite"):
            filled_bins(histogram(scores))
