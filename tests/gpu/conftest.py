"""What only a GPU can show: Transformer Engine's kernels, FP8, NCCL. Skipped, with the reason, where there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not torch.cuda.is_available():
        reason = "no GPU is visible"
    elif importlib.util.find_spec("transformer_engine") is None:
        reason = "Transformer Engine is not installed: bash tests/run.sh --te tests/gpu"
    for item in items:
        if reason is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
