"""Pooled variances: against written formulas, and by false verdicts and power of simulated studies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron_prune.study.analysis import inference, verdicts
from megatron_prune.study.analysis.inference import Paired, Scatter
from tests.study.families import Study, told_apart


def comparisons(table: np.ndarray, **names: list[str]) -> list[Paired]:
    seeds = tuple(range(table.shape[1]))
    own = [str(place) for place in range(len(table))]
    pruned, scratch = names.get("pruned", own), names.get("scratch", own)
    return [Paired("setting", seeds, a, b, row) for a, b, row in zip(pruned, scratch, table, strict=True)]


def test_a_variance_is_put_together_as_published() -> None:
    scatter = Scatter(variance=4.0, weight=6.0, limit=100.0, comparisons=9)
    assert scatter.variance_of(1.0, 2) == ((6 * 4 + 2 * 1) / 8, 8.0)
    assert Scatter(4.0, 6.0, limit=5.0, comparisons=9).variance_of(1.0, 2) == (26 / 8, 5.0)
    assert Scatter(4.0, 6.0, limit=1.0, comparisons=9).variance_of(1.0, 2) == (26 / 8, 2.0)  # never fewer than its own
    found = inference.paired([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], scatter)
    error = np.sqrt((6 * 4 + 2 * 1) / 8 / 3)
    assert (found.freedom, found.pooled) == (8, 9) and found.p == pytest.approx(2 * stats.t.sf(2 / error, 8))
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 8) * error)


@pytest.mark.parametrize("freedom", [2.5, 8.0])
def test_prior_and_weight_of_many_comparisons_are_those_that_made_them(freedom: float) -> None:
    """Variances drawn from 9 times a scaled inverse chi-square; with many of them the standard error hardly counts."""
    generator = np.random.default_rng(0)
    scale = np.sqrt(9 * freedom / generator.chisquare(freedom, 20_000))
    found = inference.common(comparisons(generator.normal(0, 1, (20_000, 4)) * scale[:, None]))
    assert found is not None and found.comparisons == 20_000
    assert 0.75 * freedom < found.weight < 1.02 * freedom and found.variance == pytest.approx(9, rel=0.06)


def test_the_weight_is_what_the_spread_and_its_error_leave() -> None:
    table = np.random.default_rng(3).normal(0, 1, (12, 5))
    table *= np.exp(np.linspace(-1, 1, 12))[:, None]
    found = inference.common(comparisons(table))
    logs = np.log(table.var(axis=1, ddof=1))
    noise, fourth = stats.gengamma(a=2, c=1), None  # a chi-square of four degrees of freedom, halved
    sample = np.log(noise.rvs(400_000, random_state=0))
    spread, fourth = sample.var(), ((sample - sample.mean()) ** 4).mean()
    left = logs.var(ddof=1) - spread + np.sqrt((fourth - spread**2) / 12)
    inverse = np.log(stats.gamma(a=found.weight / 2).rvs(400_000, random_state=1)).var()  # trigamma(weight / 2)
    assert inverse == pytest.approx(left, rel=0.03)


def test_comparisons_of_one_run_count_as_one() -> None:
    table = np.random.default_rng(0).normal(0, 1, (12, 3))
    apart = inference.common(comparisons(table))
    dense = inference.common(comparisons(table, scratch=["dense"] * 6 + [str(n) for n in range(6)]))
    one = inference.common(comparisons(table, scratch=["dense"] * 12))
    weights = [found.weight for found in (apart, dense, one) if found]
    assert weights == sorted(weights, reverse=True) and weights[0] > 1.3 * weights[2]
    assert one is not None and one.limit == pytest.approx(2 * (table.var(axis=1, ddof=1).mean() / _alike(table)) ** 2)
    # Six of one run and six others: 144 / (36 + 6) are independent.
    alike, mean = _alike(table), table.var(axis=1, ddof=1).mean()
    assert dense is not None
    expected = mean**2 / (alike**2 / 2 + (mean - alike) ** 2 / (2 * (144 / 42 - 1)))
    assert dense.limit == pytest.approx(expected)


def _alike(table: np.ndarray) -> float:
    return float(table.mean(axis=0).var(ddof=1))


def test_what_seeds_do_to_all_alike_has_the_freedom_of_the_seeds() -> None:
    generator = np.random.default_rng(0)
    table = generator.normal(0, 1, 3) + generator.normal(0, 1e-3, (30, 3))
    found = inference.common(comparisons(table))
    assert found is not None and found.limit == pytest.approx(2, abs=0.01)


def test_only_comparisons_of_the_same_seeds_share_and_a_setting_where_it_shares_more() -> None:
    generator = np.random.default_rng(1)
    quiet = comparisons(generator.normal(0, 1, (8, 3)))
    loud = [Paired("loud", one.seeds, f"l{one.pruned}", f"l{one.scratch}", one.differences * 50) for one in quiet]
    others = [Paired("setting", (7, 8), "x", "x", np.array([0.1, 0.2]))]
    found = inference.shared([*quiet, *loud, *others, Paired("setting", (7,), "y", "y", np.array([0.1]))])
    assert [scatter and scatter.comparisons for scatter in found] == [8] * 16 + [None, None]
    assert found[8].variance == pytest.approx(2500 * found[0].variance)
    assert {scatter.comparisons for scatter in inference.shared(quiet + loud[:0]) if scatter} == {8}
    assert inference.common(quiet[:3]) is None
    still = [*quiet, Paired("setting", (0, 1, 2), "z", "z", np.zeros(3))]
    assert inference.common(still) is None  # a variance of zero has no logarithm


@pytest.mark.parametrize(
    ("study", "allowed"),
    [
        (Study(), 0.03),
        (Study(methods=6, dense=True), 0.03),
        (Study(seed=2.0), 0.03),
        (Study(settings=3.0), 0.05),
        (Study(spread=0.5), 0.065),
    ],
)
def test_false_verdicts_of_a_study_without_differences_are_rare(study: Study, allowed: float) -> None:
    """One variance for all would give 12% at a spread of 0.5."""
    generator = np.random.default_rng(0)
    false = [told_apart(study.comparisons(generator)).any() for _ in range(200)]
    assert np.mean(false) <= allowed


@pytest.mark.parametrize(("study", "enough"), [(Study(real=15), 0.95), (Study(settings=5.0, real=15), 0.9)])
def test_gaps_of_five_deviations_are_found_at_three_seeds(study: Study, enough: float) -> None:
    """Of 30 comparisons; with their own scatter alone 13% are."""
    generator = np.random.default_rng(0)
    made = [study.comparisons(generator) for _ in range(60)]
    assert np.mean([told_apart(one)[:15].mean() for one in made]) > enough
    assert np.mean([told_apart(one, pool=False)[:15].mean() for one in made]) < 0.3


@pytest.mark.parametrize(("seeds", "level"), [(3, 0.05), (3, 0.05 / 30), (8, 0.01)])
def test_a_detectable_gap_is_found_in_four_cases_of_five(seeds: int, level: float) -> None:
    found = inference.paired([0.0] * seeds, np.linspace(-1, 1, seeds).tolist())
    deviation = np.linspace(-1, 1, seeds).std(ddof=1)
    gap = inference.detectable(found, level)
    generator = np.random.default_rng(0)
    samples = generator.normal(gap, deviation, (20_000, seeds))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < level) == pytest.approx(0.8, abs=0.015)
    assert inference.detectable(inference.paired([1.0], [2.0]), level) is None


def test_a_verdict_says_what_could_have_been_told_apart() -> None:
    def verdict(scratch: list[float]) -> verdicts.Verdict:
        records = [[{"validation_loss": v, "test_loss": v} for v in arm] for arm in ([2.0] * 3, scratch)]
        return verdicts.judge(
            method="m", pattern=None, ratio=0.5, setting="equal-total", against="dense", sparse=False, tokens=7,
            pruned=records[0], scratch=records[1], scatter=Scatter(0.01, 4.0, 99.0, 12),
        )  # fmt: skip

    strong, open_ = verdicts.corrected([verdict([4.0, 4.1, 3.9]), verdict([2.1, 1.9, 2.0])], lambda _: True, planned=12)
    assert (strong.winner, open_.winner) == ("pruned", "neither")
    assert open_.level == pytest.approx(0.05 / 11)  # Holm: one of twelve is significant
    gap = inference.detectable(open_.test, 0.05 / 11)
    assert f"a gap of {gap:.3f} nats would have been in 80% of such studies" in open_.words
    assert "of such studies" not in strong.words
    assert "6 degrees of freedom, scatter shared with 12 comparisons, conditional on this parent" in open_.words
