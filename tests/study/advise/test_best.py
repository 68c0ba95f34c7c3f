"""The best pruned against the best scratch arm: against SciPy, written formulas, and simulated users."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron_prune.study.advise import best
from tests.study.advise.followers import Truth, ask, follow

GENERATOR = np.random.default_rng


def sides(pruned: int, scratch: int, seeds: int = 3, gap: float = 1.0, rng: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = GENERATOR(rng)
    return generator.normal(0, 1, (pruned, seeds)), generator.normal(gap, 1, (scratch, seeds))


@pytest.mark.parametrize(("seeds", "spent"), [(3, 0.025), (6, 0.0125), (12, 0.00625), (48, 0.0015625)])
def test_with_one_arm_a_side_it_is_the_paired_t_test_at_a_looks_level(seeds: int, spent: float) -> None:
    pruned, scratch = sides(1, 1, seeds)
    found = best.compare(pruned, scratch)
    t = stats.ttest_rel(scratch[0], pruned[0])
    interval = t.confidence_interval(1 - spent)
    assert (found.gap.low, found.gap.high) == pytest.approx((interval.low, interval.high))
    assert found.gap.freedom == pytest.approx(seeds - 1) and found.p == pytest.approx(min(1, t.pvalue * 0.05 / spent))
    assert found.sure == (t.pvalue < spent) and found.as_good == ()


def test_the_levels_of_all_looks_sum_to_less_than_five_percent() -> None:
    assert sum(2 * best.level(number, 1) for number in range(1, 60)) <= 0.05 + 1e-12
    assert [best.look(seeds) for seeds in (1, 2, 3, 5, 6, 47, 48, 90)] == [None, None, 1, 1, 2, 4, 5, 5]
    assert best.level(2, 7) == best.level(2, 1) / 7
    late = best.compare(*sides(1, 1, 5))
    assert late.gap.seeds == 3 and late.gap == best.compare(*(side[:, :3] for side in sides(1, 1, 5))).gap


def test_scatter_is_the_mean_of_all_paired_variances_with_satterthwaites_freedom() -> None:
    pruned, scratch = sides(4, 3, 6)
    variance, _ = best.scatter(pruned, scratch)
    assert variance == pytest.approx(np.mean([np.var(s - p, ddof=1) for p in pruned for s in scratch]))
    # Two arms against one: the residual of two arms over seeds is half of their difference.
    pruned, scratch = sides(2, 1, 6)
    sides_apart = np.var(scratch[0] - (pruned[0] + pruned[1]) / 2, ddof=1)
    between = np.var(pruned[0] - pruned[1], ddof=1) / 4
    variance, freedom = best.scatter(pruned, scratch)
    assert variance == pytest.approx(sides_apart + between)
    assert freedom == pytest.approx((sides_apart + between) ** 2 / (sides_apart**2 / 5 + between**2 / 5))


def test_p_is_the_worst_rivals_and_counts_the_arms_that_were_picked_from() -> None:
    pruned, scratch = sides(3, 2, 6, gap=4)
    found = best.compare(pruned, scratch)
    variance, freedom = best.scatter(pruned, scratch)
    first, p = pruned[np.argmin(pruned.mean(axis=1))], []
    for rival in scratch:
        own = max(variance, np.var(rival - first, ddof=1))
        p.append(2 * stats.t.sf((rival - first).mean() / np.sqrt(own / 6), freedom))
    assert found.prunes and found.p == pytest.approx(max(p) * 3 * 4)
    other = best.compare(scratch, pruned)  # the same with the sides' names exchanged
    assert not other.prunes and other.p == pytest.approx(found.p) and other.gap.high == pytest.approx(-found.gap.low)
    assert other.picked_from == found.picked_from == 3


def test_an_arm_that_is_noisier_than_its_neighbours_is_judged_by_its_own_scatter() -> None:
    pruned, scratch = np.zeros((6, 3)), np.full((6, 3), 1.0)
    generator = GENERATOR(0)
    pruned += generator.normal(0, 0.01, (6, 3)) + 5 * (np.arange(6)[:, None] > 0)
    scratch += generator.normal(0, 0.01, (6, 3))
    assert best.compare(pruned, scratch).sure
    pruned[0] += [-1.0, 0.0, 1.0]
    found = best.compare(pruned, scratch)
    assert not found.sure and found.gap.high - found.gap.mean > 1


@pytest.mark.parametrize(("factor", "good"), [(0.999, (1,)), (1.001, ())])
def test_of_two_arms_the_second_is_as_good_until_a_paired_t_test_parts_them(
    factor: float, good: tuple[int, ...]
) -> None:
    """One-sided, at the level that the first look can spend on one direction: 0.0125."""
    scatter = np.array([-0.3, 0.1, 0.2])
    edge = stats.t.ppf(1 - 0.0125, 2) * stats.sem(scatter)
    own = np.stack([np.zeros(3), scatter + factor * edge])
    assert best.compare(own, np.full((1, 3), 90.0)).as_good == good


def test_of_three_arms_each_comparison_with_the_first_has_half_of_the_level() -> None:
    """Residuals by least squares on indicators of arms and seeds: 9 numbers, 5 coefficients, 4 degrees of freedom."""
    noise = np.array([[-0.3, 0.1, 0.2], [0.25, -0.05, -0.2], [0.05, 0.2, -0.25]])
    arm, seed = np.divmod(np.arange(9), 3)
    design = np.stack([np.ones(9), arm == 1, arm == 2, seed == 1, seed == 2], axis=1).astype(float)
    _, (squares,), _, _ = np.linalg.lstsq(design, noise.ravel())
    reach = stats.t.ppf(1 - 0.0125 / 2, 4) * np.sqrt(2 * squares / 4 / 3)
    centred = noise - noise.mean(axis=1, keepdims=True)
    own = centred + np.array([0, 0.99, 1.01])[:, None] * reach
    assert best.compare(own, np.full((1, 3), 90.0)).as_good == (1,)


def test_as_good_is_who_may_be_the_best() -> None:
    """Three of six arms are equal: each is first or among the good ones nearly always, a distant arm never."""
    generator, kept, far = GENERATOR(1), 0, 0
    for _ in range(400):
        own = np.array([0, 0, 0, 9, 9, 9])[:, None] + generator.normal(0, 1, (6, 3))
        found = best.compare(own, generator.normal(30, 1, (1, 3)))
        kept += 0 in (found.pruned, *found.as_good)
        far += bool({3, 4, 5} & {found.pruned, *found.as_good})
    assert kept >= 0.97 * 400 and far < 0.02 * 400


@pytest.mark.parametrize(
    ("truth", "looks", "allowed"),
    [
        (Truth((0,), (0,)), best.LOOKS, 0.065),
        (Truth((0,) * 6, (0,)), best.LOOKS[:2], 0.03),
    ],
)
def test_answers_without_a_difference_are_rare_however_often_one_asks(
    truth: Truth, looks: tuple[int, ...], allowed: float
) -> None:
    """Without a level per look the first would be wrong in 14%, without the cost of selection the second in 7%."""
    generator, wrong = GENERATOR(5), 0
    for _ in range(500):
        pruned, scratch = truth.losses(generator)
        wrong += any(best.compare(pruned[:, :seeds], scratch[:, :seeds]).sure for seeds in looks)
    assert wrong <= allowed * 500


def test_who_trains_the_seeds_that_it_asks_for_is_not_led_astray() -> None:
    generator, truth = GENERATOR(0), Truth((0, 0), (0, 0))
    ends = [follow(truth.losses(generator)) for _ in range(150)]
    assert np.mean([truth.wrong(said) for said, _ in ends]) <= 0.05
    assert {seeds for _, seeds in ends} <= set(best.LOOKS) and max(seeds for _, seeds in ends) > 6


@pytest.mark.parametrize(("arms", "enough"), [(1, 0.75), (2, 0.85), (6, 0.95)])
def test_five_deviations_are_seen_by_three_seeds_whatever_the_number_of_arms(arms: int, enough: float) -> None:
    """Deviations of a paired difference; only one pruned arm is ahead of the scratch arms."""
    gap = 5 * np.sqrt(2)
    generator, truth = GENERATOR(0), Truth((0, *(gap,) * (arms - 1)), (gap,) * arms)
    said = [ask(truth.losses(generator, 3), 3).answer for _ in range(100)]
    assert said.count("prune") >= enough * 100 and said.count("scratch") == 0


def test_the_seeds_that_are_asked_for_are_enough_in_four_cases_of_five() -> None:
    """Three seeds that happen to show the true gap and scatter; then as many more as the advice asks for."""
    generator = GENERATOR(0)
    first = np.array([[-1.0, 0.0, 1.0]])  # of deviation 1
    gap = 1.6
    found = best.compare(first * 0, first + gap)
    assert not found.sure and found.more_seeds in (3, 9)
    seeds = 3 + found.more_seeds
    sure = [best.compare(np.zeros((1, seeds)), generator.normal(gap, 1, (1, seeds))).sure for _ in range(400)]
    assert np.mean(sure) > 0.8
    fewer = best.LOOKS[best.LOOKS.index(seeds) - 1]
    sure = [best.compare(np.zeros((1, fewer)), generator.normal(gap, 1, (1, fewer))).sure for _ in range(400)]
    assert np.mean(sure) < 0.8
    assert best.compare(first * 0, first + 1e-3).more_seeds is None
