"""FLAP (2312.11983): remove the query groups and FFN channels whose outputs a constant can best replace.

A channel that fluctuates little around its mean is well replaced by the mean, which moves into a bias. With v_j the
sample variance over calibration tokens of the j-th input of linear_proj or linear_fc2, and W its weight [out, in], the
score of the input is (``--metric``):

* ``wifv`` (default): v_j · Σ_i W_ij²;
* ``ifv``: v_j;
* ``wifn``: ‖X_j‖ · Σ_i |W_ij|, without regard to the mean.

An FFN channel is one input. The score of a head is the sum over its inputs of the score's square, as in the published
code; that of a query group is the sum of its heads', since they share keys and values (the code is for models without
grouped queries). All layers keep the same number of groups and channels, ranked per layer: with ``--ratio`` that is
the paper's UL-UM, and with explicit sizes its UL-MM. With ``--allocation global`` scores are standardized per layer and
kind (those of a head's inputs before their mean is taken), and rank over all layers: AL-AM, and AL-MM with sizes.

What the removed inputs give on average, W[:, removed] · mean, is added to the biases of linear_proj and linear_fc2. A
parent without biases gets zeros in the places of Megatron's others. ``--no-compensate`` adds none.

The code leaves the first sequence out of the variance, weights the k-th by (k - 1) / k, measures from the running mean
after each sequence, and divides by sequences in place of tokens, which ranks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_prune.checkpoint.kept import Kept, removed_indices
from megatron_prune.checkpoint.layout import Axis
from megatron_prune.methods.accumulators import variance
from megatron_prune.methods.base import Compensation, PruningRequest, Selection
from megatron_prune.methods.options import FlapOptions
from megatron_prune.methods.units import SITES, UnitMethod, by_group, by_head, standardized

_NEEDS = {
    "wifv": ("sum", "sum_sq", "weight_sum_sq"),
    "ifv": ("sum", "sum_sq"),
    "wifn": ("sum_sq", "weight_sum_abs"),
}


class Flap(UnitMethod[FlapOptions]):
    def adds_biases(self, settings: FlapOptions) -> bool:
        return settings.compensate

    def reads(self, settings: FlapOptions) -> tuple[str, ...]:
        own = {*_NEEDS[settings.metric], *(["sum"] if settings.compensate else [])}
        return tuple(f"{site}.{name}" for site in ("attention", "mlp") for name in sorted(own))

    def scores(self, request: PruningRequest[FlapOptions], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        attention, channels = (of_inputs(request, site, layer) for site in SITES)
        return by_head(attention.square(), request.source).sum(1), channels

    def comparable(self, request: PruningRequest[FlapOptions], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        attention, channels = (of_inputs(request, site, layer) for site in SITES)
        return by_group(standardized(attention.square()), request.source, layer).mean(1), standardized(channels)

    def finished(self, kept: Selection, request: PruningRequest[FlapOptions]) -> Selection:
        return compensated(kept, request) if request.settings.compensate else kept


def of_inputs(request: PruningRequest[FlapOptions], site: str, layer: int) -> torch.Tensor:
    """Of every input of a layer's linear that reads ``site``: float64 [inputs]."""
    metric = request.settings.metric

    def found(name: str) -> torch.Tensor:
        return request.of_layer(f"{site}.{name}", layer, SITES[site])

    if metric == "wifn":
        return found("sum_sq").sqrt() * found("weight_sum_abs")
    fluctuation = variance(found("sum"), found("sum_sq"), request.tokens)
    return fluctuation if metric == "ifv" else fluctuation * found("weight_sum_sq")


def compensated(kept: Selection, request: PruningRequest[FlapOptions]) -> Selection:
    """``kept`` with the mean inputs of what it removes."""
    attention, mlp = (request.statistics[f"{site}.sum"] / request.tokens for site in ("attention", "mlp"))

    def removed(axis: Axis, means: torch.Tensor, what: Sequence[Kept]) -> tuple[tuple[float, ...], ...]:
        """Of ``means`` [L, inputs]."""
        rows = (means[layer][removed_indices(axis, request.source, layer, one)] for layer, one in enumerate(what))
        return tuple(tuple(row.tolist()) for row in rows)

    heads, ffn = kept.heads, kept.ffn
    return replace(
        kept,
        compensation=Compensation(
            None if heads is None else removed("heads", attention, [Kept(heads=one) for one in heads]),
            None if ffn is None else removed("ffn", mlp, [Kept(ffn=one) for one in ffn]),
        ),
    )


METHOD = Flap()
