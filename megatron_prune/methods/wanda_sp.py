"""Wanda-sp: Wanda's score (2306.11695) for whole query groups and FFN channels, as in FLAP's comparison (2312.11983).

An input of linear_proj or linear_fc2 with weights W [out, in] scores ‖X_j‖ · Σ_i |W_ij|. An FFN channel is one input; a
query group is the inputs of its heads, whose scores add up. All layers keep the same number of both, ranked per layer.
``--allocation global`` ranks over all layers, with scores standardized as FLAP's: the code has no such mode.

The norms are those of the dense model. The published code prunes block after block, with the inputs that the pruned
blocks before give.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_prune.methods.base import PruningRequest
from megatron_prune.methods.options import WandaSpOptions
from megatron_prune.methods.units import SITES, UnitMethod, by_group, by_head, standardized


class WandaSp(UnitMethod[WandaSpOptions]):
    def reads(self, settings: WandaSpOptions) -> tuple[str, ...]:
        return tuple(f"{site}.{name}" for site in ("attention", "mlp") for name in ("sum_sq", "weight_sum_abs"))

    def scores(self, request: PruningRequest[WandaSpOptions], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, channels = of_inputs(request, layer)
        return by_head(inputs, request.source).sum(1), channels

    def comparable(self, request: PruningRequest[WandaSpOptions], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, channels = map(standardized, of_inputs(request, layer))
        return by_group(inputs, request.source, layer).mean(1), channels


def of_inputs(request: PruningRequest[WandaSpOptions], layer: int) -> Iterator[torch.Tensor]:
    """Scores of the inputs of a layer's linear_proj [H·d] and linear_fc2 [F]."""
    for site, axis in SITES.items():
        norms, sums = (request.of_layer(f"{site}.{name}", layer, axis) for name in ("sum_sq", "weight_sum_abs"))
        yield norms.sqrt() * sums


METHOD = WandaSp()
