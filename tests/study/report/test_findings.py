"""The report of a simulated study against the laws that made its losses."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import types

import hypothesis
import pytest
from hypothesis import strategies as st
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


def test_costs_of_running_are_those_of_the_shapes(simulated_study: Places, found: Results) -> None:
    """Bytes by hand from the account and the plan; fp32, since the recipe names no other type."""
    table = tables.serving(found)
    heads = [column.head for column in table.columns]
    shown = {row["cells"][0].text: dict(zip(heads, (cell.text for cell in row["cells"]), strict=True))
             for row in table.body}  # fmt: skip
    assert list(shown) == ["parent", "shortgpt, 25% removed", "shortgpt, 50% removed"]
    (cell,) = {row["cell"] for row in found.rows if row["arm"] == "pruned" and row["ratio"] == 0.5
               and row["seed"] == 1 and row["tokens_train"] == 40960}  # fmt: skip
    (row, *_) = (row for row in found.rows if row["cell"] == cell)
    account = json.loads(simulated_study.account(cell).read_text())
    assert row["weight_bytes"] == 4 * account["parameters"] and row["weight_bytes_packed"] is None
    assert shown["shortgpt, 50% removed"]["weights, MB"] == f"{4 * account['parameters'] / 1e6:.2f}"
    assert row["flops_forward"] == row["flops_forward_kept"] > 2 * 2048 * account["parameters"] / 2
    (parent,) = (row for row in found.rows if row["arm"] == "parent")
    assert row["cache_bytes_per_token"] * 2 == parent["cache_bytes_per_token"], "half of the layers"
    assert "decode, ms per token" not in heads and "No times were measured" in table.caption


def test_measured_times_are_those_of_the_weights(simulated_study: Places, tmp_path) -> None:
    from megatron_prune.study.analysis import serving

    one = {"seconds": 0.5, "least": 0.4, "most": 0.6, "tokens_per_second": 8.0}
    models = [
        {"fingerprint": "a", "measured": {"dense": {"prefill": one, "decode": {**one, "seconds": 0.25}}}},
        {"fingerprint": "b", "measured": {"dense": {"why": "not measured: a reason"}}},
        {"fingerprint": "c"},
        {"fingerprint": "d", "measured": {"dense": {"prefill": one, "decode": one},
                                          "2:4": {"prefill": one, "decode": {**one, "seconds": 0.1}},
                                          "fp8 2:4": {"why": "theoretical, not measured: a reason"}}},
    ]  # fmt: skip
    (tmp_path / "efficiency.json").write_text(json.dumps({"models": models}))
    assert serving.times(Places(tmp_path)) == {
        "a": {"prefill_seconds": 0.5, "decode_seconds": 0.25, "decode_tokens_per_second": 8.0},
        "d": {"prefill_seconds": 0.5, "decode_seconds": 0.5, "decode_tokens_per_second": 8.0,
              "decode_seconds_2_4": 0.1},
    }  # fmt: skip
    assert serving.times(simulated_study) == {}


def test_masks_count_where_a_run_was_trained_under_them() -> None:
    from megatron_prune.checkpoint.layout import ModelShape
    from megatron_prune.study.analysis import serving

    source = ModelShape(4, 8, 2, 2, 4, 16, 40, tied=True)
    shape = dataclasses.replace(source, num_layers=3)  # a chain: a layer, then 2:4 of the others
    left = shape.linear_parameters() // 2
    share = 1 - left / source.linear_parameters()
    study = types.SimpleNamespace(recipe=types.SimpleNamespace(arguments={"bf16": True}))
    masked, dense = {"flops": 60, "flops_theoretical": 40}, {"flops": 60, "flops_theoretical": 60}
    asked = {"source": source, "removed_linears": share, "pattern": "2:4"}
    found = serving.costs(study, shape, masked, **asked)
    assert found["flops_forward"] - found["flops_forward_kept"] == 2 * 2048 * left
    assert found["weight_bytes"] - found["weight_bytes_packed"] == left * 2 - 2 * left / 8
    found = serving.costs(study, shape, dense, **asked)
    assert found["flops_forward"] == found["flops_forward_kept"] and found["weight_bytes_packed"] is None
    assert serving.costs(study, shape, masked, **{**asked, "pattern": "unstructured"})["weight_bytes_packed"] is None
    assert serving.costs(study, None, masked) == serving.costs(study, shape, None) == {}


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
)
def test_the_front_is_what_nothing_beats(places: list[tuple[int, int]]) -> None:
    from megatron_prune.study.report.pareto import front

    found = [places[n] for n in front([cost for cost, _ in places], [loss for _, loss in places])]
    unbeaten = {(c, v) for c, v in places if not any((a <= c and b < v) or (a < c and b <= v) for a, b in places)}
    assert set(found) == unbeaten and found == sorted(found) and len(found) == len(unbeaten)


def test_accuracies_are_shown_against_costs_with_their_front(scored_study: Places) -> None:
    """Accuracies by hand from the scores of the runs; the front by comparing every pair of points."""
    from megatron_prune.study.report import pareto

    found = results.collect(scored_study)

    def by_hand(cells: list[str]) -> float:
        own = [json.loads(scored_study.scores(cell).read_text())["tasks"]["results"] for cell in cells]
        return statistics.fmean(one[task]["metrics"]["acc"]["value"] for one in own for task in ("one", "two"))

    cut = by_hand([f"pruned-shortgpt-r50-s{seed}-t20480" for seed in (1, 2, 3)])
    for table in (tables.efficiency(found), tables.serving(found)):
        (row,) = (row for row in table.rows if row["model"] == "shortgpt, 50% removed")
        assert row["accuracy of mine"] == pytest.approx(cut)
        assert [column.head for column in table.columns][-1] == "accuracy, mine"
    loss, accuracy = pareto.serving_costs(found)
    assert (loss.name, accuracy.name) == ("serving", "serving-accuracy") and accuracy.title.endswith("model: mine")
    assert f"shortgpt, 50% removed, pruned: {cut:.1%}, " in accuracy.svg
    parent = by_hand(["parent"])
    assert f"parent: {parent:.1%}, " in accuracy.svg and f"{100 * cut:.1f}%" not in loss.svg


def test_times_of_sparse_kernels_are_theoretical_where_they_did_not_run(scored_study: Places) -> None:
    heads = [column.head for column in tables.serving(results.collect(scored_study)).columns]
    (head,) = (head for head in heads if head.startswith("decode with 2:4 kernels"))
    reader = Reader()
    reader.feed((scored_study.root / "report" / "index.html").read_text())
    shown = {row[0]: row[heads.index(head)] for row in reader.tables["serving"] if row}
    assert shown["magnitude 2:4, 50% removed"] == "theoretical, not measured"
    assert shown["parent"] == shown["shortgpt, 50% removed"] == "–"


def test_more_accuracy_is_better() -> None:
    from megatron_prune.study.report import pareto

    places = [(1, 0.3), (2, 0.2), (3, 0.6), (4, 0.5), (5, 0.9)]
    shown = [{"arm": "pruned", "kind": "depth", "name": "x", "weight_bytes": 1e6 * cost, "value": value}
             for cost, value in places]  # fmt: skip
    for sign, front in ((-1, [(1, 0.3), (3, 0.6), (5, 0.9)]), (1, [(1, 0.3), (2, 0.2)])):
        quality = pareto.Quality("value", "value", str, sign)
        figure = pareto.draw(shown, [axis for axis in pareto.AXES if axis[0] == "weight_bytes"], quality, False)
        assert list(zip(*figure.axes[0].lines[0].get_data(), strict=True)) == front


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
