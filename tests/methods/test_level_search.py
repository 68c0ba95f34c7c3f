"""The evolutionary search over levels of layers: against all allocations, on made-up losses."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.errors import UsageError
from megatron_prune.methods import evolution, halving
from megatron_prune.methods.allocation import whole_inputs
from megatron_prune.methods.evolution import OFFSPRING, Evolution, Found
from megatron_prune.methods.level_search import LevelGrid, Levels

WEIGHTS = (5.0, 1.0, 3.0, 0.5)  # what a step costs in each layer
GRID = LevelGrid(Fraction(1, 40), -3, 3)


def loss(levels: Levels, window: int) -> float:
    """Convex: a layer that has lost much loses more with the next step. Windows differ, and a little by allocation."""
    cost = sum(weight * 1.2**level for weight, level in zip(WEIGHTS, levels, strict=True))
    return cost + math.sin(window) + 0.01 * math.sin(31 * hash(levels) % 97 + window)


class Model:
    """Losses, with a record of what was run."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, int, int]] = []

    def __call__(self, allocations: Sequence[Levels], first: int, last: int) -> list[float]:
        self.ran.append((len(allocations), first, last))
        return [sum(loss(levels, w) for w in range(first, last)) / (last - first) for levels in allocations]


def run(windows: int, generations: int, seed: int = 0) -> tuple[list[Found[Levels]], Model]:
    model, search = Model(), Evolution(generations, seed)
    found = [evolution.begin([(0,) * 4], windows, model)]
    while found[-1].generation < generations:
        found.append(evolution.generation(found[-1], search, GRID.offspring, windows, model))
    return found, model


@pytest.mark.parametrize(("windows", "seed"), [(3, 0), (7, 1), (40, 2)])
def test_it_finds_the_best_of_all_allocations(windows: int, seed: int) -> None:
    every = [levels for levels in itertools.product(GRID.levels, repeat=4) if sum(levels) == 0]
    best = min(every, key=lambda levels: sum(loss(levels, w) for w in range(windows)))
    found, _ = run(windows, 60, seed)
    assert found[-1].allocation == best
    assert found[-1].loss == pytest.approx(sum(loss(best, w) for w in range(windows)) / windows)
    assert found[0].allocation == (0, 0, 0, 0) and found[-1].uniform == found[0].loss
    for before, after in itertools.pairwise(found):
        assert sum(after.allocation) == 0 and after.loss <= before.loss
        assert (after.loss < before.loss) == (after.allocation != before.allocation)


def test_offspring_are_run_on_more_and_more_text() -> None:
    found, model = run(40, 2)
    assert model.ran[0] == (1, 0, 40)
    rounds = halving.schedule(OFFSPRING, 40, last=1)
    assert [(one.candidates, one.windows) for one in rounds] == [(16, 5), (6, 14), (2, 40)]
    assert model.ran[1:4] == [(16, 0, 5), (6, 5, 14), (2, 14, 40)]
    assert found[1].passes == 40 + 16 * 5 + 6 * 9 + 2 * 26
    assert model.ran == [(n, first, last) for n, first, last in model.ran if first < last]


def test_a_generation_depends_on_its_number_and_seed_alone() -> None:
    found, _ = run(20, 10)
    again = Found(**found[4].to_json())
    search = Evolution(10, 0)
    for expected in found[5:]:
        again = evolution.generation(again, search, GRID.offspring, 20, Model())
        assert again == expected
    assert run(20, 10, seed=3)[0][1:] != found[1:]


def test_losses_that_are_not_finite_never_win() -> None:
    def broken(allocations: Sequence[Levels], first: int, last: int) -> list[float]:
        return [math.nan if levels[0] > 0 else 3.0 - levels[0] * -0.1 for levels in allocations]

    found = evolution.begin([(0,) * 3], 5, broken)
    for _ in range(30):
        found = evolution.generation(found, Evolution(30, 0), GRID.offspring, 5, broken)
    assert found.allocation[0] == GRID.lowest and math.isfinite(found.loss)


@given(layers=st.integers(2, 6), seed=st.integers(0, 1000), data=st.data())
def test_offspring_stay_on_the_grid_and_on_the_total(layers: int, seed: int, data: st.DataObject) -> None:
    grid = LevelGrid(Fraction(1, 40), *data.draw(st.sampled_from([(-1, 1), (-3, 2), (-2, 5)])))
    parent = tuple([0] * layers)
    for _ in range(20):
        children = grid.offspring(parent, random.Random(seed))
        assert children and len(children) <= OFFSPRING and len(set(children)) == len(children)
        for child in children:
            assert sum(child) == 0 and child != parent
            assert all(level in grid.levels for level in child)
            assert sum(abs(a - b) for a, b in zip(child, parent, strict=True)) <= 3 * 2 * 4  # three swaps of four steps
        parent = children[-1]


@given(
    unit=st.sampled_from([48, 64, 192, 2048]),
    factors=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    ratio=st.floats(0.1, 0.9),
    data=st.data(),
)
def test_levels_remove_as_much_as_equal_ratios(
    unit: int, factors: list[int], ratio: float, data: st.DataObject
) -> None:
    """Layer by layer what the masks of a level remove, and in all what was asked for."""
    sizes = [unit * factor for factor in (1, *factors)]
    grid = LevelGrid.of(sizes, [ratio])
    layers = data.draw(st.integers(2, 9))
    levels = [0] * layers
    for _ in range(data.draw(st.integers(0, 20))):
        up, down = data.draw(st.permutations(range(layers)))[:2]
        if levels[up] < grid.highest and levels[down] > grid.lowest:
            levels[up], levels[down] = levels[up] + 1, levels[down] - 1
    for size in sizes:
        equal = whole_inputs([(3, size)] * layers, ratio, [Fraction(0)] * layers)
        found = whole_inputs([(3, size)] * layers, ratio, [level * grid.step for level in levels])
        assert found == [count + level * grid.step * size for count, level in zip(equal, levels, strict=True)]
        assert sum(found) == sum(equal) and all(0 <= count < size for count in found)


def test_the_step_of_usual_models() -> None:
    llama = LevelGrid.of([4096, 4096, 14336], [0.5])
    assert llama.step == Fraction(51, 2048) and (llama.lowest, llama.highest) == (-8, 8)
    smollm2 = LevelGrid.of([576, 1536], [0.7])
    assert smollm2.step == Fraction(5, 192) and (smollm2.lowest, smollm2.highest) == (-7, 7)
    assert LevelGrid.of([4096], [0.9]).highest == 3  # something stays
    for sizes, ratio in (([7, 16], 0.5), ([4096], 0.99)):
        with pytest.raises(UsageError, match="--allocation: expected global, owl or uniform, got search"):
            LevelGrid.of(sizes, [ratio])
    with pytest.raises(UsageError, match="--search-generations: expected at least 1, got 0"):
        Evolution(0, 1)
