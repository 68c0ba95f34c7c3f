"""The committed results of the miniature: the report's statistics come out of its ledger again, RESULTS.md says what
they say, and the ledger that ``advise`` ships is theirs."""

from __future__ import annotations

import importlib.util
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.study import jobs, outlook, schema
from megatron_prune.study.advise import ledgers
from megatron_prune.study.analysis import conclusions, contrasts, measures
from megatron_prune.study.analysis.results import Compared
from megatron_prune.study.prunings import Places

EXAMPLE = Path(__file__).parents[2] / "examples" / "miniature"
# Pairs of runs, verdicts and answers of each study.
STUDIES = {"small": (96, 32, 12), "large": (28, 8, 5)}


def reported(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLE / name / "results.json").read_text())
    return found


def recorded(name: str) -> dict[str, dict[str, Any]]:
    """The last line of every cell."""
    lines = map(json.loads, (EXAMPLE / name / "ledger.jsonl").read_text().splitlines())
    return {line["cell"]: line for line in lines}


@pytest.mark.parametrize("name", STUDIES)
def test_the_reports_statistics_come_out_of_the_ledger_again(name: str, tmp_path: Path) -> None:
    results, records = reported(name), recorded(name)
    study, places = schema.load(EXAMPLE / name / "plan.yaml"), Places(tmp_path)
    look = outlook.look(study, places, planned=True)
    compared = [
        Compared(made, look.lay.retrain(made.budget).steps * look.lay.batch.tokens, "finished")
        for made in look.estimated_grid(study).comparisons
        if made.pruned in records and made.scratch in records
    ]
    pairs, verdicts_of, answers_of = STUDIES[name]
    assert len(compared) == pairs
    verdicts = conclusions.judge(study, places, compared, records)
    assert len(verdicts) == len(results["verdicts"]) == verdicts_of
    for again, one in zip(verdicts, results["verdicts"], strict=True):
        assert (again.method, again.setting, again.tokens) == (one["method"], one["setting"], one["tokens"])
        assert vars(again.test) == pytest.approx(one["test"]) and again.corrected == pytest.approx(one["corrected"])
    groups, windows = conclusions.finished_groups(compared), conclusions.DocumentWindows(study, places)
    answers, scatters = measures.Answers(study, places, windows), conclusions.scatters(groups, records)
    found = contrasts.answer(study, compared, groups, scatters, answers, records)
    assert len(found) == len(results["compare"]) == answers_of
    for answer, one in zip(found, results["compare"], strict=True):
        assert answer.subject == one["subject"] and vars(answer.gap) == pytest.approx(one["gap"])
        assert answer.corrected == pytest.approx(one["corrected"])


def tables(results: dict[str, Any]) -> str:
    """What claims.py prints."""
    spec = importlib.util.spec_from_file_location("miniature_claims", EXAMPLE / "claims.py")
    assert spec is not None and spec.loader is not None
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    printed: str = claims.tables(results)
    return printed


@pytest.mark.parametrize("name", STUDIES)
def test_results_md_has_the_tables_of_the_report(name: str) -> None:
    page = (EXAMPLE / "RESULTS.md").read_text()
    for line in tables(reported(name)).splitlines():
        assert line in page


def test_a_distilled_comparison_is_told_from_the_plain_one() -> None:
    results = reported("large")
    results["verdicts"][0]["objective"] = "distill"
    printed = tables(results)
    assert "| shortgpt, both distilled, 50.0% removed | equal training | 958,464 |" in printed
    assert "(a) shortgpt, both distilled, 50.0% removed, 958,464 tokens" in printed


def test_the_shipped_ledger_has_these_runs() -> None:
    records = recorded("small")
    shipped = json.loads(ledgers.SHIPPED.read_text())
    rows = [row for row in shipped["rows"] if row["status"] == "finished"]
    assert len(rows) > 150
    for row in rows:
        assert row["test_loss"] == records[row["cell"]]["test_loss"]
        assert row["tokens_train"] == records[row["cell"]]["tokens"]


def test_the_large_study_goes_on_from_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked, every cell of its plan is finished, and the next plan lacks what its first lines say."""
    with tarfile.open(EXAMPLE / "large" / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    left = {}
    for plan in ("plan", "distill", "next"):
        study = schema.load(EXAMPLE / "large" / f"{plan}.yaml")
        places = Places(Path("runs") / study.name)
        cells = jobs.all_cells(study, places, outlook.look(study, places, planned=True))
        left[plan] = [cell.id for cell in cells if not cell.is_done()]
    assert places.ledger.read_bytes() == (EXAMPLE / "large" / "ledger.jsonl").read_bytes()
    assert left["plan"] == left["distill"] == []
    width = re.compile(r"scratch-L8h52.*-equal-total-")
    depth = re.compile(r"prun(ing|ed)-shortgpt-r(75|87\.5)-|scratch-L[12]h80")
    assert [sum(bool(kind.match(cell)) for cell in left["next"]) for kind in (width, depth)] == [3, 18]
    assert len(left["next"]) == 21


def test_the_distilled_losses_are_those_of_the_ledger() -> None:
    records = recorded("large")
    (found,) = json.loads((EXAMPLE / "large" / "distill.json").read_text())["teacher"]
    cells = {
        "pruned": "pruned-shortgpt-r50-s{}-t4800512{}",
        "scratch": "scratch-L4h80H2G2d40F208-equal-training-t4800512{1}-s{0}",
    }
    for arm, cell in cells.items():
        for kind, suffix in (("text alone", ""), ("distilled", "-distill")):
            losses = [records[cell.format(seed, suffix)]["test_loss"] for seed in (1, 2, 3)]
            assert found["losses"]["shortgpt, 50% removed"][f"{arm}, {kind}"] == losses
    start, teacher = (effect["mean"] for effect in found["effects"][:2])
    plain, distilled, scratch, scratch_distilled = (
        sum(losses) / 3 for losses in found["losses"]["shortgpt, 50% removed"].values()
    )
    assert start == pytest.approx((scratch - plain + scratch_distilled - distilled) / 2)
    assert teacher == pytest.approx((plain - distilled + scratch - scratch_distilled) / 2)
