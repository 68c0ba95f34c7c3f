"""The committed results of the miniature: the report's statistics come out of its ledger again, RESULTS.md says what
they say, and the ledger that ``advise`` ships is theirs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.study import outlook, schema
from megatron_prune.study.advise import ledgers
from megatron_prune.study.analysis import conclusions, contrasts, measures
from megatron_prune.study.analysis.results import Compared
from megatron_prune.study.prunings import Places

EXAMPLE = Path(__file__).parents[2] / "examples" / "miniature"
SMALL = EXAMPLE / "small"


@pytest.fixture(scope="module")
def reported() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SMALL / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    """The last line of every cell."""
    lines = map(json.loads, (SMALL / "ledger.jsonl").read_text().splitlines())
    return {line["cell"]: line for line in lines}


def test_the_reports_statistics_come_out_of_the_ledger_again(reported, records, tmp_path) -> None:
    study, places = schema.load(SMALL / "plan.yaml"), Places(tmp_path)
    look = outlook.look(study, places, planned=True)
    compared = [
        Compared(made, look.lay.retrain(made.budget).steps * look.lay.batch.tokens, "finished")
        for made in look.estimated_grid(study).comparisons
        if made.pruned in records and made.scratch in records
    ]
    assert len(compared) == 96  # of three seeds each
    verdicts = conclusions.judge(study, places, compared, records)
    assert len(verdicts) == len(reported["verdicts"]) == 32
    for again, one in zip(verdicts, reported["verdicts"], strict=True):
        assert (again.method, again.setting, again.tokens) == (one["method"], one["setting"], one["tokens"])
        assert vars(again.test) == pytest.approx(one["test"]) and again.corrected == pytest.approx(one["corrected"])
    groups, windows = conclusions.finished_groups(compared), conclusions.DocumentWindows(study, places)
    answers, scatters = measures.Answers(study, places, windows), conclusions.scatters(groups, records)
    found = contrasts.answer(study, compared, groups, scatters, answers, records)
    assert len(found) == len(reported["compare"]) == 12
    for answer, one in zip(found, reported["compare"], strict=True):
        assert answer.subject == one["subject"] and vars(answer.gap) == pytest.approx(one["gap"])
        assert answer.corrected == pytest.approx(one["corrected"])


def test_results_md_has_the_tables_of_the_report(reported) -> None:
    spec = importlib.util.spec_from_file_location("miniature_claims", EXAMPLE / "claims.py")
    assert spec is not None and spec.loader is not None
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    page = (EXAMPLE / "RESULTS.md").read_text()
    for line in claims.tables(reported).splitlines():
        assert line in page


def test_the_shipped_ledger_has_these_runs(records) -> None:
    shipped = json.loads(ledgers.SHIPPED.read_text())
    rows = [row for row in shipped["rows"] if row["status"] == "finished"]
    assert len(rows) > 150
    for row in rows:
        assert row["test_loss"] == records[row["cell"]]["test_loss"]
        assert row["tokens_train"] == records[row["cell"]]["tokens"]
