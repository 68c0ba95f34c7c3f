"""Intervals over simulated seeds and documents against their truth; Holm's correction against its definition."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from scipy import stats

from megatron_prune.data import indexed
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study.analysis import conclusions, inference, verdicts
from megatron_prune.study.schema import Family
from tests.study import corpora_made_up

LEDGERS = 6000


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_t_intervals_cover_the_truth(seeds: int) -> None:
    """Pairs share a seed's own error, which pairing removes; the true gap is 0.03 nats."""
    generator = np.random.default_rng(seeds)
    shared = generator.normal(0, 0.2, (LEDGERS, seeds))
    pruned = 2.5 + shared + generator.normal(0, 0.02, (LEDGERS, seeds))
    scratch = 2.53 + shared + generator.normal(0, 0.01, (LEDGERS, seeds))
    found = [inference.paired(p, s) for p, s in zip(pruned, scratch, strict=True)]
    covered = np.mean([f.low <= 0.03 <= f.high for f in found if f.low is not None and f.high is not None])
    assert abs(covered - inference.CONFIDENCE) < 0.02
    # p is below 0.05 exactly where the interval excludes 0.
    assert all((f.p < 0.05) == (f.winner != "neither") for f in found if f.p is not None)


def test_p_is_scipys_and_the_effect_is_hedges() -> None:
    pruned, scratch = np.array([2.0, 2.1, 2.05, 2.2]), np.array([2.3, 2.25, 2.4, 2.35])
    found = inference.paired(pruned, scratch)
    assert found.p == pytest.approx(stats.ttest_rel(scratch, pruned).pvalue)
    differences = scratch - pruned
    exact = (np.sqrt(np.pi) / 2) / np.sqrt(1.5)  # Γ(df/2) / (√(df/2) Γ((df-1)/2)) at df = 3
    assert found.effect == pytest.approx(exact * differences.mean() / differences.std(ddof=1))


@pytest.mark.parametrize(("mean", "p", "winner"), [(0.0, 1.0, "neither"), (0.5, 0.0, "pruned")])
def test_differences_that_do_not_vary(mean: float, p: float, winner: str) -> None:
    found = inference.paired([2.0, 3.0, 4.0], [2.0 + mean, 3.0 + mean, 4.0 + mean])
    assert (found.p, found.winner, found.effect) == (p, winner, None)


def closed_testing(p: list[float]) -> list[float]:
    """Holm's p values by definition: the largest Bonferroni p of all intersections that contain a hypothesis."""
    count = range(len(p))
    return [
        max(
            min(1.0, len(group) * min(p[i] for i in group))
            for size in range(1, len(p) + 1)
            for group in itertools.combinations(count, size)
            if own in group
        )
        for own in count
    ]


def test_holm_is_closed_testing_with_bonferroni() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 8):
        p = (generator.random(size) ** 3).tolist()
        assert inference.holm(p) == pytest.approx(closed_testing(p))
    assert inference.holm([]) == []


def test_holm_keeps_the_error_of_the_family() -> None:
    """Ten comparisons without a difference: rarely more than one family in twenty finds one."""
    generator = np.random.default_rng(1)
    families = [
        min(inference.holm([inference.paired(np.zeros(3), row).p or 0.0 for row in generator.normal(0, 1, (10, 3))]))
        for _ in range(1000)
    ]
    assert np.mean(np.array(families) < 0.05) < 0.07


@pytest.mark.parametrize(("documents", "skewed", "least"), [(30, False, 0.92), (60, True, 0.86)])
def test_bootstrap_over_documents_covers_the_truth(documents: int, skewed: bool, least: float) -> None:
    """Documents of uneven length; at 30 of them with normal gaps BCa covers 90%."""
    generator = np.random.default_rng(2)
    covered = []
    for _ in range(200):
        gaps, own = corpora_made_up.windows(generator, documents, skewed=skewed)
        pruned = generator.normal(3, 0.5, (2, len(gaps)))
        found = inference.over_documents(pruned, pruned + gaps, own)
        assert found is not None and found.documents == documents and found.low is not None and found.high is not None
        covered.append(found.low <= corpora_made_up.TRUTH <= found.high)
    assert least <= np.mean(covered) <= 0.985


def test_the_bootstrap_is_studentised_as_written_in_the_books() -> None:
    """Resamples drawn one by one, with the jackknife's standard error in place of the linear one."""
    gaps, own = corpora_made_up.windows(np.random.default_rng(4), 80)
    sums, windows = np.bincount(own, gaps), np.bincount(own).astype(float)

    def ratio_and_error(s: np.ndarray, n: np.ndarray) -> tuple[float, float]:
        without = (s.sum() - s) / (n.sum() - n)
        return s.sum() / n.sum(), np.sqrt((len(s) - 1) / len(s) * ((without - without.mean()) ** 2).sum())

    ratio, error = ratio_and_error(sums, windows)
    generator, t = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = generator.integers(0, 80, 80)
        own_ratio, own_error = ratio_and_error(sums[drawn], windows[drawn])
        t.append((own_ratio - ratio) / own_error)
    low, high = np.quantile(t, [0.025, 0.975])
    found = inference.over_documents(np.zeros((1, len(gaps))), gaps[None], own)
    width = (high - low) * error
    assert found is not None
    assert found.low == pytest.approx(ratio - high * error, abs=0.05 * width)
    assert found.high == pytest.approx(ratio - low * error, abs=0.05 * width)


def test_too_few_documents_have_no_interval() -> None:
    generator = np.random.default_rng(0)
    losses = generator.normal(3, 1, (2, 1, 87))
    with warnings.catch_warnings(action="error"):
        found = inference.over_documents(losses[0], losses[1], np.arange(87) // 3)  # 29 documents
        assert found == inference.OverDocuments(29, None, None)
        assert "no interval: the windows are of 29, and from fewer than 30" in found.words
        assert found.words in verdict([2.1, 2.2, 2.15], documents=found).words
        assert inference.over_documents(losses[0], losses[0], np.arange(87)) is None  # one model twice
        enough = inference.over_documents(losses[0], losses[1], np.minimum(np.arange(87) // 2, 29))
        assert enough is not None and enough.documents == 30 and enough.low is not None


def test_windows_belong_to_the_document_of_most_of_their_tokens(tmp_path: Path) -> None:
    lengths = [7, 30, 3, 3, 40, 19]
    builder = IndexedDatasetBuilder(f"{tmp_path}/text.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{tmp_path}/text.idx")
    assert indexed.document_tokens(tmp_path / "text.idx").tolist() == lengths
    found = conclusions.of_windows(tmp_path / "text", 6, 16)
    assert found is not None
    own = np.repeat(np.arange(len(lengths)), lengths)
    for window, document in enumerate(found):
        counts = np.bincount(own[window * 16 + 1 : window * 16 + 17], minlength=len(lengths))
        assert counts[document] == counts.max()
    assert conclusions.of_windows(tmp_path / "missing", 6, 16) is None
    (tmp_path / "text.idx").write_bytes((tmp_path / "text.idx").read_bytes()[:60])
    with pytest.raises(DataError, match="is a truncated Megatron index: expected .* bytes, got 60"):
        indexed.document_tokens(tmp_path / "text.idx")
    (tmp_path / "text.idx").write_bytes(b"not an index" * 9)
    with pytest.raises(DataError, match="expected a Megatron index"):
        indexed.document_tokens(tmp_path / "text.idx")


def verdict(scratch: list[float], setting: str = "equal-total", **more: object) -> verdicts.Verdict:
    def rows(values: list[float]) -> list[dict[str, float]]:
        return [{"validation_loss": value, "test_loss": value} for value in values]

    return verdicts.judge(
        method="m", pattern=None, ratio=0.5, setting=setting, against="dense", sparse=False, tokens=7,
        pruned=rows([2.0] * len(scratch)), scratch=rows(scratch), **more,
    )  # fmt: skip


def test_a_verdict_of_a_family_is_corrected_for_it() -> None:
    weak, strong, outside = [2.1, 2.2, 2.15], [2.50, 2.51, 2.49], [2.1, 2.2, 2.15]
    found = verdicts.corrected(
        [verdict(weak), verdict(strong), verdict([2.1, 1.9, 2.0]), verdict(outside, "equal-training"), verdict([2.1])],
        lambda item: Family(settings=["equal-total"]).holds(vars(item)),
        planned=3,
    )
    p = [item.test.p for item in found[:3]]
    assert [item.corrected for item in found[:3]] == pytest.approx(inference.holm(p))
    assert [item.family for item in found] == [3, 3, 3, 0, 0]
    assert [item.winner for item in found] == ["neither", "pruned", "neither", "pruned", "pruned"]
    assert "by Holm over 3 comparisons" in found[1].words and "outside the study's family" in found[3].words
    assert "One seed: no interval" in found[4].words
    many = verdicts.corrected([verdict(weak)] + [verdict([2.1, 1.9, 2.0])] * 9, lambda _: True, planned=10)
    assert many[0].test.winner == "pruned" and many[0].winner == "neither"
    assert "cannot be told apart" in many[0].words and "were it not one of 10 comparisons" in many[0].words


def test_an_early_look_is_corrected_for_what_is_still_to_come() -> None:
    (whole,) = verdicts.corrected([verdict([2.1, 2.2, 2.15])], lambda _: True, planned=1)
    (early,) = verdicts.corrected([verdict([2.1, 2.2, 2.15])], lambda _: True, planned=4)
    assert whole.corrected == pytest.approx(whole.test.p) and (whole.winner, early.winner) == ("pruned", "neither")
    assert early.corrected == pytest.approx(closed_testing([early.test.p, 1, 1, 1])[0])
    assert "over 4 comparisons, of which 3 count with p = 1: not finished or not run" in early.words
    assert "count with" not in whole.words


def test_words_say_what_an_interval_is_conditional_on() -> None:
    over = inference.OverDocuments(30, 0.1, 0.2)
    text = verdict([2.1, 2.2, 2.15], documents=over).words
    assert "2 degrees of freedom, conditional on this parent" in text
    assert "Over 30 evaluation documents, these models fixed: +0.100 to +0.200 (95%, bootstrap)" in text
    assert "conditional" not in verdict([2.1, 2.2, 2.15], one_parent=False).words


def test_a_family_names_what_the_study_has() -> None:
    with pytest.raises(UsageError, match=r"family.budgets: expected one that the study has: 5, 6, got 7"):
        Family(budgets=[7]).check(budgets=[5, 6])
    Family().check(budgets=[5])
    assert Family().holds({"method": "m", "pattern": None, "ratio": 0.5, "setting": "equal-total", "budget": 5})
