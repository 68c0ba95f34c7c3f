"""Learned factors go into the weights, so that the smaller model computes what the masked one did in evaluation.

What a factor multiplies in the model (``training/gates.py``) is the input or the output of a matrix, or a norm's gain:

* hidden channels: the embedding's columns, norms' gains, the rows of ``linear_proj`` and ``linear_fc2`` and their
  biases. The final norm's gain too, but where the embedding is the output layer: there its columns have the factor;
* layers: the rows of ``linear_proj`` and ``linear_fc2`` and their biases;
* heads: the columns of ``linear_proj``; FFN channels: those of ``linear_fc2``. (The published code multiplies the value
  and up projections, which is the same function where a head has a value of its own and the MLP is gated.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prune.checkpoint.layout import stored_argument, weights
from megatron_prune.structured.plan import PruningPlan


@dataclass(frozen=True)
class Fold:
    """Factors of a weight's rows and columns, fp32; ``offset`` is added to a gain before it multiplies."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    offset: int = 0

    def multiply(self, blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """``blocks`` of consecutive rows times the factors, in fp32, in their own type."""
        first = 0
        for block in blocks:
            wide = block.float() + self.offset
            if self.rows is not None:
                rows = self.rows[first : first + len(block)]
                wide = wide * (rows[:, None] if block.ndim == 2 else rows)
            if self.columns is not None:
                wide = wide * self.columns
            first += len(block)
            yield (wide - self.offset).to(block.dtype)


def factors(made: PruningPlan, arguments: Mapping[str, Any]) -> dict[str, Fold]:
    """What multiplies which weight of the smaller model; nothing where the plan has no factors."""
    if made.gates is None:
        return {}
    gates, size = made.gates, made.target.kv_channels
    hidden = None if gates.hidden is None else torch.tensor(gates.hidden)
    offset = int(bool(stored_argument(arguments, "layernorm_zero_centered_gamma")))
    found: dict[str, Fold] = {}
    for weight in weights(made.target):
        layer = weight.layer
        if weight.suffix.startswith("embedding."):
            found[weight.name] = Fold(columns=hidden)
        elif weight.suffix == "decoder.final_layernorm.weight":
            found[weight.name] = Fold(rows=None if made.target.tied else hidden, offset=offset)
        elif weight.suffix.endswith("layer_norm_weight"):
            found[weight.name] = Fold(rows=hidden, offset=offset)
        elif layer is not None and "linear_proj" in weight.suffix or "linear_fc2" in weight.suffix:
            assert layer is not None
            written = None if gates.layers is None else torch.full((made.target.hidden_size,), gates.layers[layer])
            if hidden is not None:
                written = hidden if written is None else written * hidden
            read = None
            if weight.suffix.endswith("weight") and "linear_proj" in weight.suffix and gates.heads is not None:
                read = torch.tensor(gates.heads[layer]).repeat_interleave(size)
            if weight.suffix.endswith("weight") and "linear_fc2" in weight.suffix and gates.ffn is not None:
                read = torch.tensor(gates.ffn[layer])
            found[weight.name] = Fold(rows=written, columns=read)
    return {name: fold for name, fold in found.items() if fold.rows is not None or fold.columns is not None}
