"""Rows and verdicts of a made-up study, against its accounts and against SciPy's own interval."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron_prune import artifacts
from megatron_prune.errors import AccountError
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.study import grid, outlook, records, schema
from megatron_prune.study.analysis import conclusions, inference, results, verdicts
from megatron_prune.study.analysis import results as rows
from megatron_prune.study.analysis.inference import Paired
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from tests.study import made_up, simulated

REQUIRED = (
    "study cell method pattern ratio ratio_of arm setting seed tokens_train tokens_total flops_total params "
    "params_nonzero loss_initial validation_loss test_loss"
).split()


@pytest.fixture
def prefixes(corpora: dict[str, str]) -> dict[str, str]:
    return corpora


@pytest.fixture
def places(finished_copy: Places) -> Places:
    return finished_copy


def test_rows_are_the_accounts(places: Places) -> None:
    found = results.collect(places)
    assert set(REQUIRED) <= set(rows.COLUMNS)
    assert len(found.rows) == 1 + 2 * (2 * 2 * 3)  # parent; both arms of method x setting x seed
    parent = found.rows[0]
    assert (parent["arm"], parent["tokens_total"], parent["seed"]) == ("parent", 2560, 1234)
    for row in found.rows[1:]:
        account = json.loads(places.account(row["cell"]).read_text())
        scores = json.loads(places.scores(row["cell"]).read_text())
        assert row["tokens_train"] == account["tokens"] and row["loss_initial"] == account["initial_loss"]
        assert row["seed"] == account["seed"] and row["params"] == account["parameters"]
        assert row["test_loss"] == scores["corpora"]["test"]["loss"]
        assert row["validation_loss"] == scores["corpora"]["validation"]["loss"]
        if row["arm"] == "pruned":
            assert account["start"] == "pruned"
            assert row["tokens_total"] == 2560 + 1280 + 8 * 16 and row["tokens_pruning"] == 128
            assert row["flops_total"] > account["flops_executed"] + parent["flops_total"]
            unretrained = f"pruning-{row['method']}-r{100 * row['ratio']:g}-s{row['seed']}"
            losses = json.loads(places.scores(unretrained).read_text())["corpora"]
            assert row["test_loss_unretrained"] == losses["test"]["loss"]
            assert row["validation_loss_unretrained"] == losses["validation"]["loss"]
        else:
            assert account["start"] == "random" and row["flops_total"] == account["flops_executed"]
            assert row["tokens_total"] == {"equal-training": 1280, "equal-total": 3968}[row["setting"]]
    assert [0.45 < row["removed_linears"] < 0.55 for row in found.rows[1:]] == [True] * 24


def test_verdicts_are_paired_over_seeds(places: Places) -> None:
    found = results.collect(places)
    assert [(v.method, v.setting) for v in found.verdicts] == [
        (method, setting) for method in ("shortgpt", "minitron-width") for setting in ("equal-training", "equal-total")
    ]
    differences = []
    for verdict in found.verdicts:
        by_arm: dict[str, list[float]] = {"pruned": [], "scratch": []}
        for row in found.rows[1:]:
            if (row["method"], row["setting"]) == (verdict.method, verdict.setting):
                by_arm[row["arm"]].append(row["test_loss"])
        differences.append(np.subtract(by_arm["scratch"], by_arm["pruned"]))
        assert verdict.test.mean == pytest.approx(np.mean(by_arm["scratch"]) - np.mean(by_arm["pruned"]))
    # Both settings of a method share their pruned runs; no setting has four comparisons of its own.
    runs = [("shortgpt", 1), ("shortgpt", 2), ("width", 3), ("width", 4)]
    pairs = [Paired("", (1, 2, 3), *names, own) for names, own in zip(runs, differences, strict=True)]
    scatter = inference.common(pairs)
    assert scatter is not None and scatter.comparisons == 4
    for verdict, own in zip(found.verdicts, differences, strict=True):
        weight = scatter.weight
        variance = (weight * scatter.variance + own.var(ddof=1) * 2) / (weight + 2)
        freedom = max(2.0, min(weight + 2, scatter.limit))
        reach = stats.t.ppf(0.975, freedom) * np.sqrt(variance / 3)
        assert (verdict.test.low, verdict.test.high) == pytest.approx((own.mean() - reach, own.mean() + reach))
        assert f"{freedom:.3g} degrees of freedom, scatter shared with 4 comparisons, conditional on" in verdict.words
    data = results.to_json(found)
    assert json.loads(json.dumps(data, allow_nan=False))["rows"] == list(found.rows)
    assert all(item["match"] for item in data["comparisons"])


def test_a_seed_counts_once(places: Places) -> None:
    found = results.collect(places)
    again = [*found.compared, found.compared[0]]
    with pytest.raises(
        AccountError, match=r"expected one comparison of pruned-shortgpt-r50-s1-t1280 and .* under seed 1, got two"
    ):
        conclusions.judge(found.study, places, again, found.records)


def test_csv_holds_the_rows(places: Places) -> None:
    found = results.collect(places)
    read = list(csv.DictReader(io.StringIO(page.table(found))))
    assert list(read[0]) == list(rows.COLUMNS)
    for line, row in zip(read, found.rows, strict=True):
        assert {k: "" if v is None else str(v) for k, v in row.items()} == line


SCRATCH = "scratch-L2h32H4G2d8F64-{}-s2"
OWN = "account.json: expected a finished run with {}"  # its own account against study.yaml
TAMPERED = {
    "shifted range": ("equal-training-t1280", {"range": [168, 248]}, OWN.format("range")),
    "another batch": ("equal-training-t1280", {"global_batch_size": 4, "steps": 20}, OWN.format("steps")),
    "another order": ("equal-training-t1280", {"permutation_seed": 9}, OWN.format("permutation_seed")),
    "an optimizer setting": ("equal-training-t1280", {"arguments": {"adam_beta1": 0.8}}, "arguments.adam_beta1: "),
    "fewer steps": ("equal-training-t1280", {"steps": 9, "range": [160, 232], "tokens": 1152}, OWN.format("range")),
    "fewer steps in all": ("equal-total-t3968", {"steps": 20, "range": [0, 160], "tokens": 2560}, OWN.format("range")),
    "a batch in all": ("equal-total-t3968", {"global_batch_size": 4, "steps": 62}, OWN.format("steps")),
    "a batch alone": (
        "equal-total-t3968",
        {"global_batch_size": 4},
        "global_batch_size: expected 8, as in its arguments, got 4",
    ),
    "an order in all": ("equal-total-t3968", {"permutation_seed": 9}, OWN.format("permutation_seed")),
    "another stream": ("equal-total-t3968", {"stream": {"id": "x"}}, "may not be compared: stream.id: "),
    "tokens of the parent": ("parent", {"tokens": 2688}, "account.json: tokens: expected 2,560"),
    "range of the parent": ("parent", {"range": [0, 168]}, OWN.format("range")),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_account_stops_the_report_and_names_the_run_and_the_field(places: Places, what: str) -> None:
    run, changes, message = TAMPERED[what]
    cell = run if run == "parent" else SCRATCH.format(run)
    path = places.account(cell)
    account = json.loads(path.read_text())
    steps = changes.get("steps", account["steps"])
    arguments = account["arguments"] | {"train_iters": steps, "lr_decay_iters": steps} | changes.get("arguments", {})
    path.write_text(json.dumps(account | changes | {"arguments": arguments}))
    with pytest.raises(AccountError, match=rf"{cell}.*{message}"):
        results.collect(places)


def on_another_text(places: Places, cell: str) -> None:
    corpora = artifacts.read_json(places.scores(cell))["corpora"]
    made_up.edit(places.scores(cell), corpora=corpora | {"test": corpora["test"] | {"fingerprint": "x"}})


def calibrate_again(places: Places, cell: str) -> None:
    path = places.statistics(cell)
    held = statistics_file.read(path)
    replace(held, tensors={name: tensor + 1 for name, tensor in held.tensors.items()}).write(path)


def unfinish(places: Places, cell: str) -> None:
    """Take its scores away, and its line."""
    places.scores(cell).unlink()
    lines = [line for line in places.ledger.read_text().splitlines() if json.loads(line)["cell"] != cell]
    places.ledger.write_text("".join(f"{line}\n" for line in lines))


PRUNING = "pruning-shortgpt-r50-s2"


@pytest.mark.parametrize(
    ("cell", "change", "message"),
    [
        ("parent", made_up.remake, r"pruning-\S+ was made of other weights than parent has now \("),
        ("calibration-s2", calibrate_again, f"{PRUNING} was made of other statistics than calibration-s2 has now"),
        (PRUNING, made_up.remake, "weights at the start: pruned-shortgpt-r50-s2-t1280 began with .* left "),
        (
            PRUNING,
            on_another_text,
            f"evaluation text: test: .*-s2-t1280, .*'x'.* for {PRUNING}",
        ),
        ("parent", on_another_text, "evaluation text: test: .*'x'.* for parent"),
        (SCRATCH.format("equal-total-t3968"), on_another_text, "equal-total: .*evaluation text: test: .*'x'.* for scr"),
    ],
)
def test_a_cell_that_was_made_anew_beside_old_ones_stops_the_report(
    places: Places, cell: str, change: Any, message: str
) -> None:
    change(places, cell)
    with pytest.raises(AccountError, match=message):
        results.collect(places)


def test_comparisons_that_are_not_finished_belong_to_the_family(places: Places) -> None:
    assert [(v.family, v.without) for v in results.collect(places).verdicts] == [(4, 0)] * 4
    for seed in (1, 2, 3):
        unfinish(places, f"pruned-shortgpt-r50-s{seed}-t1280")
    found = results.collect(places)
    assert [(v.method, v.family, v.without) for v in found.verdicts] == [("minitron-width", 4, 2)] * 2
    text = " ".join(page.render(found, []).split())
    assert "family of 4 comparisons, 2 of which are not finished or not run and count with p = 1, and a" in text


@pytest.mark.parametrize("cell", ["parent", PRUNING])
def test_while_a_cell_is_made_anew_what_rests_on_it_is_pending(places: Places, cell: str) -> None:
    unfinish(places, cell)
    found = {(c.comparison.pruning.cell, c.comparison.seed): c.status for c in results.collect(places).compared}
    assert found[PRUNING, 2] == "pending" and (found["pruning-shortgpt-r50-s1", 1] == "pending") == (cell == "parent")


def test_the_scores_are_of_the_masks_that_were_trained_under(places: Places) -> None:
    study = schema.from_mapping(artifacts.read_json(places.root / "study.json"))
    lay = outlook.look(study, places).lay
    cell = next(cell for cell in grid.expand(study, lay, {}, {}).cells if cell.kind == "pruned")
    records.training(places, cell, {})
    scores = artifacts.read_json(places.scores(cell.id))
    artifacts.write_json(places.scores(cell.id), scores | {"masks": "m"})
    with pytest.raises(AccountError, match=f"{cell.id}: it was trained under masks none, but evaluated with masks m"):
        records.training(places, cell, {})


def test_unfinished_and_left_out_arms_have_rows_without_numbers(prefixes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes)
    with pytest.raises(made_up.Killed):
        made_up.run(study, Path("runs"), made_up.FakeLauncher(kill_at=9))
    found = results.collect(Places(Path("runs/made-up")))
    assert [row["status"] for row in found.rows].count("pending") > 0 and not found.verdicts
    parent = made_up.foreign(Path("elsewhere"))
    second = made_up.study(prefixes, name="second", parent={"load": str(parent), "declared_tokens": "2T"})
    found = results.collect(made_up.run(second, Path("runs"), made_up.FakeLauncher()))
    rows = {(row["method"], row["setting"], row["arm"]): row for row in found.rows[1:]}
    missing = rows["shortgpt", "equal-total", "scratch"]
    assert missing["status"] == "not run" and missing["test_loss"] is None and missing["cell"] is None
    assert rows["shortgpt", "equal-total", "pruned"]["tokens_declared"] is True
    assert [v.setting for v in found.verdicts] == ["equal-training"] * 2


losses = st.lists(st.floats(1, 10), min_size=2, max_size=8)


@given(losses, st.randoms(use_true_random=False))
def test_interval_is_scipys(pruned: list[float], random: Any) -> None:
    scratch = [loss + random.uniform(-1, 1) for loss in pruned]
    found = inference.paired(pruned, scratch)
    interval = stats.ttest_rel(scratch, pruned).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
    assert found.freedom == len(pruned) - 1


@pytest.mark.parametrize(
    ("pruned", "scratch", "winner", "words"),
    [
        ([2.0], [2.5], "pruned", "the pruned model ends lower by 0.500 nats, .* One seed: no interval."),
        ([2.5], [2.0], "scratch", "training from scratch ends lower by 0.500 nats"),
        ([2.0], [2.0], "neither", "cannot be told apart"),
        ([2.0, 2.1, 2.0], [2.5, 2.55, 2.6], "pruned", "ends lower by 0.517 nats"),
        ([2.0, 2.5, 2.0], [2.5, 2.0, 2.1], "neither", "cannot be told apart"),
    ],
)
def test_a_sentence_claims_no_more_than_its_interval(pruned, scratch, winner: str, words: str) -> None:
    def rows(values: list[float]) -> list[dict[str, float]]:
        return [{"validation_loss": value, "test_loss": value} for value in values]

    verdict = verdicts.judge(
        method="m", pattern=None, ratio=0.5, setting="equal-total", against="dense", sparse=False, tokens=7,
        pruned=rows(pruned), scratch=rows(scratch),
    )  # fmt: skip
    assert verdict.test.winner == winner
    import re

    assert re.search(words, verdict.words)


def test_unigram_loss_is_the_entropy_of_what_is_predicted(prefixes) -> None:
    tokens = np.fromfile(f"{prefixes['test']}.bin", dtype=np.uint16)[1 : 16 * 16 + 1]
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert records.unigram_loss(prefixes["test"], 256) == pytest.approx(stats.entropy(shares))


def test_losses_on_another_text_are_not_resampled_by_this_ones_documents(tmp_path) -> None:
    asked = {"ratios": [0.5], "budgets": [simulated.BUDGETS[0]], "seeds": [1], "evaluation": {"windows": 120}}
    places = simulated.run(tmp_path, **asked)

    def found() -> list[int | None]:
        return [v.documents and v.documents.documents for v in results.collect(places).verdicts]

    assert found() == [20, 20]  # 120 windows of 16 tokens, documents of 100
    shutil.copy(tmp_path / "validation.bin", tmp_path / "test.bin")  # as long, but another text
    assert found() == [None, None]
