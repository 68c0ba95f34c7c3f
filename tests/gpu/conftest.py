"""Tests that need a GPU: Transformer Engine's kernels, FP8, NCCL. Skipped, with the reason, where there is none.

``bash tests/run.sh --gpu`` runs all of it and writes examples/llama3.1_8b/RESULTS.md. ``test_dry_run.py`` runs
everywhere.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from tests.gpu import results

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not torch.cuda.is_available():
        reason = "no GPU is visible"
    elif importlib.util.find_spec("transformer_engine") is None:
        reason = "Transformer Engine is not installed: bash tests/run.sh --gpu"
    for item in items:
        if reason is not None and HERE in item.path.parents and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[[Mapping[str, float]], None]:
    """``figures({"what": number})`` keeps the measurements of a test for RESULTS.md."""

    def keep(found: Mapping[str, float]) -> None:
        for name, value in found.items():
            record_property(name, value)

    return keep


def pytest_configure(config: pytest.Config) -> None:
    if file := os.environ.get(results.VARIABLE):
        config.pluginmanager.register(results.Collector(Path(file)), "gpu-results")
