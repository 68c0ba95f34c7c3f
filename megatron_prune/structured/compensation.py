"""Biases for the mean of removed inputs: W[:, removed] · mean(removed inputs) of linear_proj and linear_fc2 (flap)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_prune.checkpoint.kept import axis_indices, removed_indices
from megatron_prune.checkpoint.layout import Axis, layer_name
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.structured.plan import PruningPlan

_LINEARS: dict[Axis, str] = {"heads": "self_attention.linear_proj", "ffn": "mlp.linear_fc2"}


@dataclass(frozen=True)
class RemovedInputs:
    """The removed columns of a matrix of the parent, ascending, their mean inputs, float64, and the rows that are kept
    (None: all)."""

    weight: str
    columns: torch.Tensor
    means: torch.Tensor
    rows: torch.Tensor | None

    def output(self, parent: Checkpoint, block_bytes: int) -> torch.Tensor:
        """What the kept rows make of them: float64 [kept rows]."""
        blocks = parent.row_blocks(self.weight, block_bytes)
        found = torch.cat([block[:, self.columns].double() @ self.means for block in blocks])
        return found if self.rows is None else found[self.rows]


def removed_inputs(made: PruningPlan) -> dict[str, RemovedInputs]:
    """By the smaller model's bias that makes up for them; nothing without compensation."""
    found: dict[str, RemovedInputs] = {}
    if made.compensation is None:
        return found
    for position, layer in enumerate(made.kept_layers):
        kept = made.kept(position)
        rows = axis_indices("hidden", made.source, kept)
        for axis, linear in _LINEARS.items():
            means = made.compensation.heads if axis == "heads" else made.compensation.ffn
            if means is None:
                continue
            columns = removed_indices(axis, made.source, layer, kept)
            values = torch.tensor(means[position], dtype=torch.float64)
            found[layer_name(position, f"{linear}.bias")] = RemovedInputs(
                layer_name(layer, f"{linear}.weight"), columns, values, rows
            )
    return found
