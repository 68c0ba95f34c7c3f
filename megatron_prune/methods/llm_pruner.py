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

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.methods.base import PruningRequest
from megatron_prune.methods.options import LLMPrunerOptions
from megatron_prune.methods.units import UnitMethod
from megatron_prune.settings import numbers_of


class LLMPruner(UnitMethod[LLMPrunerOptions]):
    def exempt(self, settings: LLMPrunerOptions) -> Collection[int]:
        return numbers_of(settings.exempt_layers, "--exempt-layers") if settings.exempt_layers else ()

    def needs(self, settings: LLMPrunerOptions) -> tuple[str, ...]:
        return tuple(f"{module}.{settings.taylor}" for module in ("qkv", "proj", "fc1", "fc2"))

    def scores(self, request: PruningRequest[LLMPrunerOptions]) -> tuple[torch.Tensor, torch.Tensor]:
        source = request.source
        qkv, proj, fc1, fc2 = (request.statistics[key] for key in self.needs(request.settings))
        channels = fc1.view(source.num_layers, -1, source.ffn_hidden_size).sum(1) + fc2  # [L, F]
        return of_heads(source, qkv, proj), channels

    def comparable(self, request: PruningRequest[LLMPrunerOptions]) -> tuple[torch.Tensor, torch.Tensor]:
        """Saliencies per weight that goes."""
        source, (heads, channels) = request.source, self.scores(request)
        group = 2 * (source.heads_per_group + 1) * source.kv_channels  # q, k, v and columns of linear_proj, in rows
        groups = heads.view(source.num_layers, source.num_query_groups, -1).sum(2)
        return groups / group, channels / (3 if source.gated else 2)


def of_heads(source: ModelShape, qkv: torch.Tensor, proj: torch.Tensor) -> torch.Tensor:
    """Saliency of every head [L, H], from rows of linear_qkv [L, G·(H/G + 2)·d] and columns of linear_proj [L, H·d].

    A group's keys and values are divided evenly among its heads, so that its heads add up to the group.
    """
    layers, groups, per_group = source.num_layers, source.num_query_groups, source.heads_per_group
    rows = qkv.view(layers, groups, per_group + 2, -1).sum(3)  # [L, G, H/G + 2]
    shared = rows[:, :, per_group:].sum(2, keepdim=True) / per_group
    return (rows[:, :, :per_group] + shared).flatten(1) + proj.view(layers, groups * per_group, -1).sum(2)


METHOD = LLMPruner()
