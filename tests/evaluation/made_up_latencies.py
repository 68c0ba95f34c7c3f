"""Latency tables that nobody measured: of given parts, or with the times that functions give."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.evaluation import latency
from megatron_prune.evaluation.efficiency import Workload
from megatron_prune.evaluation.latency import LatencyTable, PartSeconds, SizeGrid


def table(source: ModelShape, grid: SizeGrid, parts: Mapping[str, PartSeconds], **changes: Any) -> LatencyTable:
    fields = {
        "architecture": source, "arguments": {"swiglu": True, "window_size": None}, "dtype": "float32",
        "workload": Workload(2, 9, 3, 4, 1), "depth": 5, "apart": True, "grid": grid, "seconds": parts, "least": parts,
        "most": parts, "device": {"kind": "cpu", "name": "a chip", "capability": ""}, "versions": {"torch": "2"},
    }  # fmt: skip
    return LatencyTable(**{**fields, **changes})


def table_of(
    source: ModelShape, grid: SizeGrid, *, prefill: Mapping[str, Any], decode: Mapping[str, Any], **changes: Any
) -> LatencyTable:
    """``prefill`` and ``decode`` are functions of the sizes of each part."""

    def values(part: str, of: Callable[..., float]) -> Any:
        axes = grid.axes[part]
        return np.reshape([of(*sizes) for sizes in itertools.product(*axes)], list(map(len, axes))).tolist()

    parts = {
        phase: PartSeconds(**{part: values(part, function) for part, function in functions.items()})
        for phase, functions in zip(latency.PHASES, (prefill, decode), strict=True)
    }
    return table(source, grid, parts, **changes)
