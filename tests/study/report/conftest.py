"""Two studies, shared by all tests of the report because they take seconds to make."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
