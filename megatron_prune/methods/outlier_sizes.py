"""Sizes of layers where OWL divides the ratio (``allocation.py``): a layer keeps more where outliers are dense.

A layer's ratio is one of parameters. Its query groups are few, and half of three cannot be kept, so they follow equal
sizes: as many as every layer would keep, times how much more or less this one keeps, rounded. FFN channels make up the
rest of the layer's ratio.
"""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction

import torch

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.methods.allocation import THRESHOLDS, OutlierWeighing
from megatron_prune.methods.base import Budget
from megatron_prune.methods.layer_sizes import Sizes, evenly, fit, ratio_of_others


def by_outliers(
    source: ModelShape,
    outliers: torch.Tensor,
    budget: Budget,
    weighing: OutlierWeighing,
    *,
    exempt: Collection[int] = (),
    least: float = 0.0,
) -> tuple[LayerShape, ...]:
    """Sizes of every layer if OWL divides the ratio among those that are not in ``exempt``, which stay whole.

    ``outliers`` is the statistic of that name.
    """
    ratio, costs = ratio_of_others(source, budget, exempt)
    goes = _ratios(outliers, ratio, costs, weighing)
    sizes, alike = Sizes(source, budget, least), evenly(source, budget, exempt=exempt)
    wanted = []
    for layer, (full, even) in enumerate(zip(source.by_layer(), alike, strict=True)):
        if layer not in costs:
            wanted.append((float(full.num_query_groups), float(full.ffn_hidden_size)))
            continue
        group, channel = sizes.unit_costs(layer)
        wish = even.num_query_groups * (1 - goes[layer]) / (1 - ratio)
        groups = sizes.nearest(layer, (wish, even.ffn_hidden_size)).num_query_groups
        channels = ((1 - goes[layer]) * costs[layer] - groups * group) / channel if full.ffn_hidden_size else 0.0
        wanted.append((float(groups), min(float(full.ffn_hidden_size), max(1.0, channels))))
    return fit(source, wanted, budget, exempt=exempt, least=least)


def _ratios(
    outliers: torch.Tensor, ratio: float, costs: dict[int, float], weighing: OutlierWeighing
) -> dict[int, float]:
    """What each layer in ``costs``, their parameters, loses, if they lose ``ratio`` together."""
    column = 1 + THRESHOLDS.index(weighing.threshold)
    weights, above = outliers[:, 0].tolist(), outliers[:, column].tolist()
    shares = [Fraction(int(above[layer]), max(1, int(weights[layer]))) for layer in costs]
    shifts = weighing.shifts(shares, [round(cost) for cost in costs.values()])
    return {layer: ratio + float(shift) for layer, shift in zip(costs, shifts, strict=True)}


def check(source: ModelShape, budget: Budget, weighing: OutlierWeighing, *, exempt: Collection[int] = ()) -> None:
    """UsageError if OWL with these settings might remove all or nothing of a layer."""
    ratio, _ = ratio_of_others(source, budget, exempt)
    weighing.check(round(ratio, 6), "the layers' mean ratio")
