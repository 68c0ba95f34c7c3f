"""Wanda-sp: Wanda's score (2306.11695) for whole query groups and FFN channels, as in FLAP's comparison (2312.11983).

An input of linear_proj or linear_fc2 with weights W [out, in] scores ‖X_j‖ · Σ_i |W_ij|. An FFN channel is one input; a
query group is the inputs of its heads, whose scores add up. All layers keep the same number of both, ranked per layer.

The norms are those of the dense model. The published code prunes block after block, with the inputs that the pruned
blocks before give.
"""

from __future__ import annotations

from megatron_prune.methods.base import PruningRequest, RankingMethod, Selection
from megatron_prune.methods.options import NoOptions
from megatron_prune.methods.ranking import keep_units


class WandaSp(RankingMethod[NoOptions]):
    dimensions = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")

    def free_dimensions(self, settings: NoOptions) -> tuple[str, ...]:
        return "num_query_groups", "ffn_hidden_size"  # whole groups

    def needs(self, settings: NoOptions) -> tuple[str, ...]:
        return tuple(f"{site}.{name}" for site in ("attention", "mlp") for name in ("sum_sq", "weight_sum_abs"))

    def select(self, request: PruningRequest[NoOptions]) -> Selection:
        source, found = request.source, request.statistics
        inputs, channels = (
            found[f"{site}.sum_sq"].sqrt() * found[f"{site}.weight_sum_abs"] for site in ("attention", "mlp")
        )
        heads = inputs.view(source.num_layers, source.num_attention_heads, -1).sum(2)  # [L, H]
        return keep_units(source, request.target, heads, channels)


METHOD = WandaSp()
