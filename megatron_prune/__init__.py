"""Prune Megatron checkpoints, retrain them, and compare the result with training from scratch.

    import megatron_prune as mp
    made = mp.prune(hf="HF_DIR", out="OUT", method="wanda", pattern="2:4")  # prints path, sizes and perplexities

These are the functions behind the verbs. Each name is loaded on first use, so the import itself is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_prune.api.checkpoints import apply, benchmark, export_hf, import_hf, latency_table, plan
    from megatron_prune.api.made import Calibration, Evaluation, Loss, Model, Plan, Pruned
    from megatron_prune.api.models import calibrate, evaluate, sparsify
    from megatron_prune.api.prune_checkpoint import prune
    from megatron_prune.api.studies import Study, StudyResult
    from megatron_prune.errors import MegatronPruneError

__all__ = [
    "Calibration",
    "Evaluation",
    "Loss",
    "MegatronPruneError",
    "Model",
    "Plan",
    "Pruned",
    "Study",
    "StudyResult",
    "apply",
    "benchmark",
    "calibrate",
    "evaluate",
    "export_hf",
    "import_hf",
    "latency_table",
    "plan",
    "prune",
    "sparsify",
]
_MODULES = {
    "api.checkpoints": ("apply", "benchmark", "export_hf", "import_hf", "latency_table", "plan"),
    "api.models": ("calibrate", "evaluate", "sparsify"),
    "api.made": ("Calibration", "Evaluation", "Loss", "Model", "Plan", "Pruned"),
    "api.prune_checkpoint": ("prune",),
    "api.studies": ("Study", "StudyResult"),
    "errors": ("MegatronPruneError",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            found = getattr(importlib.import_module(f"megatron_prune.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'megatron_prune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
