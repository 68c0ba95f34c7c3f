"""One simulated study for all tests of the report: it takes seconds to make."""

from __future__ import annotations

import pytest

from megatron_prune.study.analysis import results
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from tests.study import simulated


@pytest.fixture(scope="session")
def simulated_study(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A method at two ratios, five budgets, both settings, three seeds; its report is written."""
    folder = tmp_path_factory.mktemp("simulated")
    places = simulated.run(folder, family={"settings": ["equal-total"], "budgets": [simulated.BUDGETS[-1]]})
    page.write(results.collect(places), places)
    return places
