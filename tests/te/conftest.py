"""Transformer Engine without a GPU: ``bash tests/run.sh --te`` builds TE and runs this folder, and others again.

All ranks of such a session are forked from a process that has TE and the arithmetic of ``torch_math.py``; unless
told ``--transformer-impl local`` they build TE's layers. Elsewhere the folder is skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import WITH_TE
from tests.training.conftest import tiny_pruned  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not WITH_TE and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs Transformer Engine: bash tests/run.sh --te"))
