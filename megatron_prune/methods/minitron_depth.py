"""Minitron-depth (2407.14679, 2408.11796): remove the run of consecutive layers that is missed least.

For n = L − K layers to remove there are K + 1 candidates: layers i … i+n−1 go, for every start i.
The model is run without each of them on the calibration text, and the one with the lowest LM loss
is taken (of equal losses, the lower start). The reference takes the smallest |loss − dense loss|,
which would punish a candidate that is better than the dense model.

All candidates come from one load of the model, by skipping layers (calibrate/candidates.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.methods import DEPTH, Method, Request, Selection


class MinitronDepth(Method):
    dimensions = DEPTH

    def needs_scores(self, settings: Mapping[str, Any]) -> bool:
        return True

    def needs(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def candidates(self, request: Request) -> list[Selection]:
        layers, kept = request.source.num_layers, request.target.num_layers
        removed = layers - kept
        return [
            Selection((*range(start), *range(start + removed, layers))) for start in range(kept + 1)
        ]


METHOD = MinitronDepth()
