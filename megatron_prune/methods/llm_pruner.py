"""LLM-Pruner (2305.11627): remove the query groups and FFN channels whose removal changes the loss least.

Weights that only work together are removed together. A query group is its key and value rows, its heads' query rows and
their columns of linear_proj (without grouped queries: one head); an FFN channel is its rows of gate and up and its
column of linear_fc2. A unit's saliency is the sum over its rows and columns of one of four Taylor estimates of the
change of the loss, with g the gradient and h the diagonal of the Fisher matrix on the calibration text
(``calibration/gradients.py``):

* ``--taylor vector``: |Σ w·g| of each row or column;
* ``first`` (default): Σ |w·g|;
* ``second``: Σ w²·h;
* ``mixed``: Σ |w·g − ½·w²·h|.

As in the published code, biases and norms do not count, and a row or column is the vector of ``vector``.

All layers keep the same number of groups and channels, ranked per layer. ``--allocation global`` ranks over all layers
by saliency per weight. (The published code ranks by saliency: groups, which have hundreds of times a channel's weights,
then hardly ever go.) ``--exempt-layers`` keeps layers whole, as the published scripts keep the first and last. With
either, layers differ.
A target with fewer heads per group ranks heads inside their group, whose keys and values they share evenly.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import Axis
from megatron_prune.methods.base import PruningRequest
from megatron_prune.methods.options import LLMPrunerOptions
from megatron_prune.methods.units import UnitMethod
from megatron_prune.settings import numbers_of


class LLMPruner(UnitMethod[LLMPrunerOptions]):
    def exempt(self, settings: LLMPrunerOptions) -> Collection[int]:
        return numbers_of(settings.exempt_layers, "--exempt-layers") if settings.exempt_layers else ()

    def reads(self, settings: LLMPrunerOptions) -> tuple[str, ...]:
        return tuple(f"{module}.{settings.taylor}" for module in ("qkv", "proj", "fc1", "fc2"))

    def scores(self, request: PruningRequest[LLMPrunerOptions], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        source, here = request.source, request.source.by_layer()[layer]
        axes: tuple[Axis, ...] = ("qkv", "heads", "fc1", "ffn")
        keys = self.reads(request.settings)
        qkv, proj, fc1, fc2 = (request.of_layer(key, layer, axis) for key, axis in zip(keys, axes, strict=True))
        channels = fc1.view(2 if source.gated else 1, here.ffn_hidden_size).sum(0) + fc2  # [F]
        return of_heads(here, source.kv_channels, qkv, proj), channels

    def comparable(self, request: PruningRequest[LLMPrunerOptions], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Saliencies per weight that goes."""
        source, here = request.source, request.source.by_layer()[layer]
        heads, channels = self.scores(request, layer)
        group = 2 * (here.heads_per_group + 1) * source.kv_channels  # q, k, v and columns of linear_proj, in rows
        groups = heads.view(here.num_query_groups, here.heads_per_group).sum(1)
        return groups / group, channels / (3 if source.gated else 2)


def of_heads(layer: LayerShape, size: int, qkv: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    """Saliency of every head [H] of a layer, of ``size`` channels each, from rows of linear_qkv [G·(H/G + 2)·d] and
    columns of linear_proj [H·d].

    A group's keys and values are divided evenly among its heads, so that its heads add up to the group.
    """
    per_group = layer.heads_per_group
    rows = qkv.view(-1, per_group + 2, size).sum(2)  # [G, H/G + 2]
    shared = rows[:, per_group:].sum(1, keepdim=True) / max(1, per_group)
    return (rows[:, :per_group] + shared).flatten() + proj.view(-1, size).sum(1)


METHOD = LLMPruner()
