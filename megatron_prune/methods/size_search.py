"""Sizes of layers, which ``evolution.py`` searches: how many query groups and FFN channels each keeps.

A swap takes from one layer what another gets: FFN channels for as many, a query group for a query group, or, where the
total stays on the budget, a query group for FFN channels of about as many parameters. Sizes are those that ranks and
kernels take (``Budget``); layers that are exempt stay whole, and every layer keeps the least that it must.

Pure mathematics: the model is run by ``calibration/scoring.py``.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.methods import evolution
from megatron_prune.methods.base import Budget
from megatron_prune.methods.layer_sizes import Sizes

Layers = tuple[LayerShape, ...]
_STEPS = 40  # a step is about such a fraction of a layer's FFN channels
_KINDS = ("channels", "channels", "groups", "trade")  # of swaps, equally likely


class SizeSwaps:
    """The moves of a search on ``budget``."""

    def __init__(self, source: ModelShape, budget: Budget, *, exempt: Collection[int] = (), least: float = 0.0) -> None:
        self._sizes, self._budget = Sizes(source, budget, least), budget
        self._open = [layer for layer in range(source.num_layers) if layer not in exempt]
        given = source.by_layer()
        self._fixed = budget.count(source) - self._cost(given)  # of what no swap moves

    def offspring(self, parent: Layers, draw: random.Random) -> list[Layers]:
        """Different sizes of all layers that are a few swaps away."""
        return evolution.mutations(parent, self._swap, draw) if len(self._open) > 1 else []

    def _swap(self, layers: Layers, draw: random.Random) -> Layers:
        gives, gets = draw.sample(self._open, 2)
        kind, stride, groups_go = draw.choice(_KINDS), draw.choice(evolution.STRIDES), draw.random() < 0.5
        changed = list(layers)
        if kind == "channels":
            places = [self._sizes.possible_channels(layer) for layer in (gives, gets)]
            below, above = (one.index(layers[n].ffn_hidden_size) for one, n in zip(places, (gives, gets), strict=True))
            steps = min(stride * max(1, round(len(places[0]) / _STEPS)), below, len(places[1]) - 1 - above)
            changed[gives] = replace(layers[gives], ffn_hidden_size=places[0][below - steps])
            changed[gets] = replace(layers[gets], ffn_hidden_size=places[1][above + steps])
        elif kind == "groups":
            self._move_group(changed, gives, -1)
            self._move_group(changed, gets, 1)
        else:
            parameters = self._move_group(changed, gives, -1 if groups_go else 1)
            self._make_up(changed, gets, parameters)
        found = tuple(changed)
        before, after = (abs(self._fixed + self._cost(one) - self._budget.parameters) for one in (layers, found))
        return found if after <= max(before, self._budget.TOLERANCE * self._budget.parameters) else layers

    def _move_group(self, layers: list[LayerShape], number: int, steps: int) -> float:
        """Give a layer its next larger (1) or smaller (-1) number of groups, if there is one; the parameters added."""
        layer, possible = layers[number], self._sizes.possible_groups(number)
        if layer.num_query_groups not in possible:
            return 0.0  # it has no attention
        groups = possible[min(max(0, possible.index(layer.num_query_groups) + steps), len(possible) - 1)]
        heads = groups * self._sizes.given[number].heads_per_group
        layers[number] = LayerShape(heads, groups, layer.ffn_hidden_size)
        return (groups - layer.num_query_groups) * self._sizes.unit_costs(number)[0]

    def _make_up(self, layers: list[LayerShape], number: int, parameters: float) -> None:
        """Take about so many ``parameters`` from a layer's FFN, or give them if they are negative."""
        channel = self._sizes.unit_costs(number)[1]
        if not channel or not layers[number].ffn_hidden_size:
            return
        wanted = layers[number].ffn_hidden_size - parameters / channel
        nearest = min(self._sizes.possible_channels(number), key=lambda size: abs(size - wanted))
        layers[number] = replace(layers[number], ffn_hidden_size=nearest)

    def _cost(self, layers: Sequence[LayerShape]) -> float:
        """Parameters of the groups and channels of all layers."""
        found = 0.0
        for number, layer in enumerate(layers):
            group, channel = self._sizes.unit_costs(number)
            found += layer.num_query_groups * group + layer.ffn_hidden_size * channel
        return found
