"""Studies, shared by all tests of the report because they take seconds to make."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_prune import artifacts
from megatron_prune.study import questions
from megatron_prune.study.analysis import results
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from tests.study import made_up, simulated

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def simulated_study(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A method at two ratios, five budgets, both settings, three seeds; its report is written."""
    folder = tmp_path_factory.mktemp("simulated")
    places = simulated.run(folder, family={"settings": ["equal-total"], "budgets": [simulated.BUDGETS[-1]]})
    page.write(results.collect(places), places)
    return places


@pytest.fixture(scope="session")
def quickstart_like(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A study with the methods, the budget and the seed of examples/quickstart; its losses are made up."""
    folder = tmp_path_factory.mktemp("quickstart")
    methods = yaml.safe_load((ROOT / "examples/quickstart/study.yaml").read_text())["methods"]
    for method in methods:
        if "divisible-by" in method.get("settings", {}):
            method["settings"]["divisible-by"] = 8  # the made-up parent is narrower
        if "tokens" in method:  # and its text is shorter
            method["tokens"] = 1280
            method["settings"]["tolerance"] = 0.2
    study = made_up.study(made_up.corpora(folder), methods=methods, name="quickstart")
    places = made_up.run(study, folder / "runs", made_up.FakeLauncher())
    page.write(results.collect(places), places)
    return places


@pytest.fixture(scope="session")
def scored_study(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A depth and a 2:4 method, scored on a suite and a task, with times of every model but the 2:4 ones' kernels."""
    folder = tmp_path_factory.mktemp("scored")
    asked = {
        "methods": [{"name": "shortgpt"}, {"name": "magnitude", "pattern": "2:4"}],
        "ratios": [0.25, 0.5],
        "budgets": [20_480],
        "evaluation": {"windows": 16, "tasks": ["mine", "third"], "suites": {"mine": {"one": "acc", "two": "acc"}}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "check", lambda study, places: None)  # the made-up tasks are nobody's
        places = simulated.run(folder, name="scored", **asked)
    models = []  # as `study run` measures them where there is no GPU: the parent and the prunings
    for cell, record in results.collect(places).records.items():
        if record["kind"] in ("parent", "pruning"):
            seconds = record.get("parameters", 40_000 if record.get("pattern") else 30_000) / 1e8
            timing = {"seconds": seconds, "least": seconds, "most": seconds, "tokens_per_second": 1 / seconds}
            measured: dict[str, object] = {"dense": {"prefill": timing, "decode": timing}}
            if record.get("pattern"):
                measured["2:4"] = {"why": "theoretical, not measured: there is no GPU"}
            models.append({"path": cell, "fingerprint": record["fingerprint"], "measured": measured})
    artifacts.write_json(places.root / "efficiency.json", {"models": models})
    page.write(results.collect(places), places)
    return places
