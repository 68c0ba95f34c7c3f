"""The report of a simulated study against the laws that made its losses."""

from __future__ import annotations

import json
import math

import pytest
from scipy import optimize

from megatron_prune.study.analysis import results
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import tables
from tests.study import simulated
from tests.study.report.test_page import Reader


@pytest.fixture(scope="module")
def found(simulated_study: Places) -> Results:
    return results.collect(simulated_study)


def test_break_evens_are_those_of_the_laws(found: Results) -> None:
    assert len(found.trends) == 2 * 2
    missed = 0
    for trend in found.trends:
        beside = found.lay.parent_tokens if trend.setting == "equal-total" else 0

        def gap(tokens: float, ratio: float = trend.ratio or 0, beside: int = beside or 0) -> float:
            return simulated.scratch(tokens + beside) - simulated.pruned(tokens, ratio)

        truth = optimize.brentq(gap, 1_000, 200_000)
        even = trend.break_even
        assert even.by == "laws" and even.seeds == 3 and even.status in ("inside", "open")
        missed += not (even.low or 0) <= truth <= (even.high or 1e9)
        assert even.tokens is None or even.tokens == pytest.approx(truth, rel=0.25)
    assert missed <= 1  # of four intervals, 95% each


def test_the_family_is_the_studys(found: Results) -> None:
    for verdict in found.verdicts:
        inside = verdict.setting == "equal-total" and verdict.tokens == simulated.BUDGETS[-1]
        assert verdict.family == (2 if inside else 0) and (verdict.corrected is None) == (not inside)
        assert ("by Holm over 2 comparisons" in verdict.words) == inside


def test_trends_and_verdicts_are_on_the_page_and_in_the_data(simulated_study: Places, found: Results) -> None:
    folder = simulated_study.root / "report"
    reader = Reader()
    reader.feed((folder / "index.html").read_text())
    shown = [cells for cells in reader.tables["verdicts"] if cells]
    assert len(shown) == len(found.verdicts) == 2 * 2 * 5
    by_name = {cells[0]: cells for cells in reader.tables["laws"] if cells}
    data = json.loads((folder / "results.json").read_text())
    assert len(data["trends"]) == len(by_name) == 4
    for trend, item in zip(found.trends, data["trends"], strict=True):
        assert by_name[trend.subject][3] == trend.break_even.words == item["break_even"]["words"]
        assert item["scratch"]["law"]["exponent"] == trend.scratch.law.exponent and item["scratch"]["used"] is True
    for verdict, item in zip(found.verdicts, data["verdicts"], strict=True):
        assert (item["winner"], item["corrected"], item["test"]["effect"]) == (
            verdict.winner, verdict.corrected, verdict.test.effect,
        )  # fmt: skip
    table = tables.verdicts(found)
    groups = [row["group"] for row in table.body if row["group"]]
    assert len(groups) == len(set(groups)) == 4
    assert [row["tokens"] for row in table.rows][:5] == simulated.BUDGETS


def test_the_first_words_count_who_is_ahead(found: Results) -> None:
    for trend, said in zip(found.trends, tables.laws(found).rows, strict=True):
        own = [v for v in found.verdicts if (v.label, v.setting) == (trend.label, trend.setting)]
        for winner, words in (("pruned", "pruned is ahead at"), ("scratch", "scratch is ahead at")):
            number = sum(verdict.winner == winner for verdict in own)
            assert (f"{words} {number}" in said["ahead"]) == bool(number)
        assert said["ahead"].endswith("of 5 budgets")


def test_efficiency_is_the_accounts(simulated_study: Places, found: Results) -> None:
    table = tables.efficiency(found)
    heads = [column.head for column in table.columns]
    shown = {
        row["cells"][0].text: dict(zip(heads, (cell.text for cell in row["cells"]), strict=True)) for row in table.body
    }
    assert list(shown) == ["parent", "shortgpt, 25% removed", "shortgpt, 50% removed"]
    account = json.loads(simulated_study.account("pruned-shortgpt-r50-s1-t40960").read_text())
    mine = shown["shortgpt, 50% removed"]
    assert mine["parameters"] == f"{account['parameters']:,}" and mine["of linears removed"] == "50.0%"
    assert mine["FLOPs per token"] == f"{account['flops_executed'] / account['tokens']:.3e}"
    losses = [
        json.loads(simulated_study.scores(f"pruned-shortgpt-r50-s{seed}-t40960").read_text())["corpora"]["test"]["loss"]
        for seed in (1, 2, 3)
    ]
    assert mine["test loss"] == f"{sum(losses) / 3:.4f}"
    assert mine["perplexity"] == f"{math.exp(sum(losses) / 3):.2f}"
