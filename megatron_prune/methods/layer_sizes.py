"""The sizes of layers that differ: from a ranking over all layers, or from any wish, to what a model can have.

Ranks and kernels take only some sizes (``Budget``), and the layers together must keep what the budget says. ``fit``
rounds a wish to such sizes. ``by_global_ranking`` makes the wish: the lowest scores of all layers go. ``keep`` then
keeps the highest scores of every layer. Whole query groups go: each that stays keeps all its heads.

``least`` is the least fraction of its groups and of its FFN channels that every layer keeps. It holds after rounding
too: no smaller size counts as possible, unless ranks can take none that is large enough, where the largest stays.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import Budget, NearTie, Selection
from megatron_prune.methods.ranking import keep_heads, keep_highest


def fit(
    source: ModelShape,
    wanted: Sequence[tuple[float, float]],
    budget: Budget,
    *,
    exempt: Collection[int] = (),
    least: float = 0.0,
) -> tuple[LayerShape, ...]:
    """Sizes of every layer that are near ``wanted``, its (query groups, FFN channels), and together meet the budget.

    A part of a layer goes only where 0 is wanted; layers in ``exempt`` stay whole, and the others keep ``least`` of
    each part, whatever is wanted. Each size is rounded to the nearest
    that is possible. Then, while that brings the total nearer to the budget, one size moves to the next possible: the
    one that moves least away from what is wanted, in parameters; among equals the first layer's.

    UsageError if the total is off the budget by more than its tolerance.
    """
    sizes = Sizes(source, budget, least)
    layers = [
        sizes.nearest(number, wish) if number not in exempt else sizes.given[number]
        for number, wish in enumerate(wanted)
    ]
    excess = budget.count(source.with_layers(layers)) - budget.parameters
    layers, excess = _nearer(sizes, layers, excess, wanted, exempt)
    if abs(excess) > budget.TOLERANCE * budget.parameters:
        # Only query groups are left to move, which is too much: move one, and make up for it in FFN channels.
        further = [
            _nearer(
                sizes, [*layers[:number], other, *layers[number + 1 :]], excess + change, wanted, exempt, channels=True
            )
            for number, other, change in sizes.moves(layers, exempt)
            if change * excess < 0
        ]
        layers, excess = min([(layers, excess), *further], key=lambda found: abs(found[1]))
    if abs(excess) > budget.TOLERANCE * budget.parameters:
        raise UsageError(
            "--divisible-by", got=budget.ffn_step,
            expected=f"a step with which the layers keep {budget.parameters:.0f} parameters within "
            f"{budget.TOLERANCE:.1%}",
            why=f"the nearest sizes keep {budget.parameters + excess:.0f}", do="give a smaller one",
        )  # fmt: skip
    return tuple(layers)


def _nearer(
    sizes: Sizes,
    layers: Sequence[LayerShape],
    excess: float,
    wanted: Sequence[tuple[float, float]],
    exempt: Collection[int],
    channels: bool = False,
) -> tuple[list[LayerShape], float]:
    """``layers`` moved size by size while that brings the total, ``excess`` above the budget, nearer to it; with
    ``channels`` FFN sizes alone."""
    found = list(layers)
    while True:
        moves = [
            (sizes.distance(number, other, wanted[number]) - sizes.distance(number, found[number], wanted[number]),
             number, other, change)
            for number, other, change in sizes.moves(found, exempt)
            if abs(excess + change) < abs(excess)
            and not (channels and other.num_query_groups != found[number].num_query_groups)
        ]  # fmt: skip
        if not moves:
            return found, excess
        _, number, layer, change = min(moves, key=lambda move: move[:2])
        found[number], excess = layer, excess + change


def by_global_ranking(
    source: ModelShape,
    groups: Sequence[torch.Tensor],
    channels: Sequence[torch.Tensor],
    budget: Budget,
    *,
    exempt: Collection[int] = (),
    least: float = 0.0,
) -> tuple[LayerShape, ...]:
    """Sizes of every layer if the lowest scores of all layers go until the budget is met.

    ``groups`` are scores of every layer's query groups [G] and ``channels`` of its FFN channels [F], which compare with
    each other. The best of every layer stay, whatever their scores: ``least`` of its groups and of its channels, and at
    least one group and ``budget.ffn_step`` channels; so does all of ``exempt``. Among equal scores, later layers' go
    first, and of one layer channels before groups, the last first.
    """
    sizes = Sizes(source, budget)
    parts = [part for layer in zip(groups, channels, strict=True) for part in layer]  # groups, channels, groups, …
    counts = [len(part) for part in parts]
    scores = torch.cat(parts).double()  # [units], in order of the layers
    kept = torch.zeros(len(scores), dtype=torch.bool)
    steps = (1, budget.ffn_step)
    for number, (part, stay) in enumerate(zip(parts, torch.split(kept, counts), strict=True)):
        stays = _least_of(len(part), least, steps[number % 2])
        best = torch.sort(part, descending=True, stable=True).indices[:stays]
        stay[slice(None) if number // 2 in exempt else best] = True
    each = [cost for layer in range(source.num_layers) for cost in sizes.unit_costs(layer)]
    costs = torch.tensor(each, dtype=torch.float64).repeat_interleave(torch.tensor(counts))
    fixed = budget.count(source) - float(costs[~kept].sum())
    open_ = (~kept).nonzero().flatten()
    order = open_[torch.sort(scores[open_], descending=True, stable=True).indices]
    spent = fixed + costs[order].cumsum(0)
    kept[order[: int(torch.searchsorted(spent, budget.parameters, right=True))]] = True
    found = [float(part.sum()) for part in torch.split(kept, counts)]
    return fit(source, list(zip(found[::2], found[1::2], strict=True)), budget, exempt=exempt, least=least)


def by_two_rankings(
    source: ModelShape,
    target: ModelShape,
    groups: Sequence[torch.Tensor],
    channels: Sequence[torch.Tensor],
    budget: Budget,
    *,
    exempt: Collection[int] = (),
    least: float = 0.0,
) -> tuple[LayerShape, ...]:
    """The same if groups and channels are ranked apart: on average, a layer keeps as many of both as ``target``. All
    layers are alike in ``source``."""
    wanted = zip(
        _highest_of_all(torch.stack(tuple(groups)), target.num_query_groups, least, 1, exempt),
        _highest_of_all(torch.stack(tuple(channels)), target.ffn_hidden_size, least, budget.ffn_step, exempt),
        strict=True,
    )
    return fit(source, list(wanted), budget, exempt=exempt, least=least)


def _highest_of_all(
    scores: torch.Tensor, average: int, least: float, step: int, exempt: Collection[int]
) -> list[float]:
    """How many of every layer are among the highest scores [L, n] of all layers, ``average`` of each, if ``least`` of
    every layer, and ``step`` of it, stay, and all of ``exempt``."""
    layers, width = scores.shape
    ranked = scores.double().clone()
    for layer in range(layers):
        stays = width if layer in exempt else _least_of(width, least, step)
        best = torch.sort(scores[layer], descending=True, stable=True).indices[:stays]
        ranked[layer, best] = torch.inf
    order = torch.sort(ranked.flatten(), descending=True, stable=True).indices[: layers * average]
    return torch.bincount(order // width, minlength=layers).double().tolist()


def _least_of(size: int, least: float, step: int) -> int:
    """How many of ``size`` units stay if at least ``least`` of them do, in steps of ``step``, of which one stays. The
    fraction is read as a decimal: 0.07 of 100 are 7, not 8."""
    return min(size, step * max(1, math.ceil(Fraction(str(least)) * size / step)))


def refuse_least(
    source: ModelShape, target: ModelShape, budget: Budget, least: float, *, exempt: Collection[int] = ()
) -> None:
    """UsageError if layers that keep ``least`` of their parts, and all of ``exempt``, keep more than ``budget``; with
    explicit sizes, more groups or channels than ``target`` has on average."""
    if not least:
        return
    if budget.apart:
        goals = {"query groups": source.num_layers * target.num_query_groups,
                 "FFN channels": source.num_layers * target.ffn_hidden_size}  # fmt: skip
    else:
        goals = {"parameters": round(budget.parameters)}
    slack = 1 if budget.apart else 1 + budget.TOLERANCE

    def kept(least: float) -> dict[str, int]:
        layers = Sizes(source, budget, least).smallest(exempt)
        return {
            "parameters": budget.count(source.with_layers(layers)),
            "query groups": sum(layer.num_query_groups for layer in layers),
            "FFN channels": sum(layer.ffn_hidden_size for layer in layers),
        }

    for what, goal in goals.items():
        if (many := kept(least)[what]) <= goal * slack:
            continue
        hundredths = bisect_right(range(100), goal * slack, key=lambda n, what=what: kept(n / 100)[what]) - 1
        if hundredths < 0:
            raise _too_many_exempt(source, exempt)
        also = f" with {len(exempt)} of {source.num_layers} layers exempt" * bool(exempt)
        raise UsageError(
            "--least-kept", got=f"{least:g}{also}",
            expected=f"at most {hundredths / 100:g}",
            why=f"the layers would keep {many} {what} or more, and the target leaves {goal}",
        )  # fmt: skip


def evenly(source: ModelShape, budget: Budget, *, exempt: Collection[int]) -> tuple[LayerShape, ...]:
    """Sizes of every layer if those in ``exempt`` stay whole and all others shrink alike.

    Their groups and FFN shrink as evenly as the budget allows; where layers of ``source`` differ, each keeps the same
    share of both. UsageError if the exempt layers alone are more than the budget.
    """
    if isinstance(source, HeterogeneousShape):
        return _same_share(source, budget, exempt)
    sizes, full = Sizes(source, budget), source.by_layer()[0]
    group, channel = sizes.unit_costs(0)
    others = source.num_layers - len(exempt)
    goes = (budget.count(source) - budget.parameters) / others if others else math.inf  # of each
    wishes = []
    for groups in sizes.possible_groups(0):
        ffn = full.ffn_hidden_size - (goes - (full.num_query_groups - groups) * group) / channel
        if budget.ffn_step <= ffn <= full.ffn_hidden_size:
            uneven = abs(math.log(ffn / full.ffn_hidden_size) - math.log(groups / full.num_query_groups))
            wishes.append((uneven, float(groups), ffn))
    if not wishes:
        raise _too_many_exempt(source, exempt)
    return fit(source, [min(wishes)[1:]] * source.num_layers, budget, exempt=exempt)


def _same_share(source: HeterogeneousShape, budget: Budget, exempt: Collection[int]) -> tuple[LayerShape, ...]:
    share = 1 - ratio_of_others(source, budget, exempt)[0]
    wanted = [(share * full.num_query_groups, share * full.ffn_hidden_size) for full in source.layers]
    return fit(source, wanted, budget, exempt=exempt)


def ratio_of_others(source: ModelShape, budget: Budget, exempt: Collection[int]) -> tuple[float, dict[int, float]]:
    """The fraction of the layers that are not in ``exempt`` that goes, and the parameters of each."""
    sizes = Sizes(source, budget)
    costs = {}
    for layer, full in enumerate(source.by_layer()):
        if layer not in exempt:
            group, channel = sizes.unit_costs(layer)
            costs[layer] = full.num_query_groups * group + full.ffn_hidden_size * channel
    ratio = (budget.count(source) - budget.parameters) / sum(costs.values()) if costs else math.inf
    if ratio >= 1:
        raise _too_many_exempt(source, exempt)
    return ratio, costs


def _too_many_exempt(source: ModelShape, exempt: Collection[int]) -> UsageError:
    return UsageError(
        "--exempt-layers", got=f"{len(exempt)} of {source.num_layers} layers",
        expected="fewer", why="without them the others would have to keep less than they can",
    )  # fmt: skip


def keep(
    source: ModelShape, layers: Sequence[LayerShape], heads: Sequence[torch.Tensor], channels: Sequence[torch.Tensor]
) -> Selection:
    """The highest scores of every layer, to the sizes ``layers``: of its ``heads`` [H], of which whole groups are
    ranked by the sum of their heads, and of its ``channels`` [F]."""
    kept_heads, kept_ffn, near = [], [], list[NearTie]()
    given = source.by_layer()
    for number, layer in enumerate(layers):
        chosen, ties = keep_heads(heads[number], given[number], layer, number)
        kept_heads.append(chosen)
        near += ties
        chosen, ties = keep_highest(channels[number], layer.ffn_hidden_size, "ffn", layer=number)
        kept_ffn.append(chosen)
        near += ties
    pairs = list(zip(layers, given, strict=True))
    all_heads = all(layer.num_attention_heads == full.num_attention_heads for layer, full in pairs)
    all_channels = all(layer.ffn_hidden_size == full.ffn_hidden_size for layer, full in pairs)
    return Selection(
        tuple(range(source.num_layers)),
        heads=None if all_heads else tuple(kept_heads),
        ffn=None if all_channels else tuple(kept_ffn),
        near_ties=tuple(near),
    )


class Sizes:
    """The possible sizes of a model's layers, and what they cost in parameters, of those that count."""

    def __init__(self, source: ModelShape, budget: Budget, least: float = 0.0) -> None:
        self.given, self._channels, self._budget = source.by_layer(), source.kv_channels, budget
        self._least = Fraction(str(least))
        self._groups = [self._possible_groups(full) for full in self.given]
        self._ffn = [self._possible_ffn(full) for full in self.given]
        distinct = {full: _Costs.of(source, full, budget) for full in set(self.given)}
        self._costs = [distinct[full] for full in self.given]

    def _possible_groups(self, full: LayerShape) -> list[int]:
        tp, all_of_them = self._budget.tensor_parallel, full.num_query_groups
        found = []
        for groups in range(1, all_of_them + 1):
            heads = groups * full.heads_per_group
            if not LayerShape(heads, groups, 0).unshared(tp) and (
                groups == all_of_them or heads * self._channels % self._budget.head_step == 0
            ):
                found.append(groups)
        return self._large_enough(found or [all_of_them], all_of_them)

    def _possible_ffn(self, full: LayerShape) -> list[int]:
        step, width = self._budget.ffn_step, full.ffn_hidden_size
        found = list(range(step, width + 1, step))
        if width not in found and width % self._budget.tensor_parallel == 0:
            found.append(width)
        return self._large_enough(found or [width], width)

    def _large_enough(self, sizes: list[int], full: int) -> list[int]:
        return [size for size in sizes if size >= self._least * full] or sizes[-1:]

    def smallest(self, exempt: Collection[int]) -> list[LayerShape]:
        """The smallest possible sizes of every layer, where those in ``exempt`` stay whole."""
        return [
            full if number in exempt else LayerShape(groups[0] * full.heads_per_group, groups[0], ffn[0])
            for number, (full, groups, ffn) in enumerate(zip(self.given, self._groups, self._ffn, strict=True))
        ]

    def possible_groups(self, number: int) -> list[int]:
        """Numbers of query groups that layer ``number`` can have, ascending."""
        return self._groups[number]

    def possible_channels(self, number: int) -> list[int]:
        """Numbers of FFN channels that layer ``number`` can have, ascending."""
        return self._ffn[number]

    def nearest(self, number: int, wish: tuple[float, float]) -> LayerShape:
        """The possible sizes of layer ``number`` that are nearest to a wish; of two, the larger."""
        groups, ffn = (
            0 if not size else min(possible, key=lambda one: (abs(one - size), -one))
            for size, possible in zip(wish, (self._groups[number], self._ffn[number]), strict=True)
        )
        return LayerShape(groups * self.given[number].heads_per_group, groups, ffn)

    def moves(self, layers: Sequence[LayerShape], exempt: Collection[int]) -> Iterator[tuple[int, LayerShape, float]]:
        """Every layer with one size moved to the next possible one, and the parameters that this adds."""
        for number, layer in enumerate(layers):
            if number in exempt:
                continue
            each, cost = self.given[number].heads_per_group, self._costs[number]
            for groups in _next_to(layer.num_query_groups, self._groups[number]):
                other = LayerShape(groups * each, groups, layer.ffn_hidden_size)
                yield number, other, (groups - layer.num_query_groups) * cost.group
            for ffn in _next_to(layer.ffn_hidden_size, self._ffn[number]):
                other = replace(layer, ffn_hidden_size=ffn)
                yield number, other, (ffn - layer.ffn_hidden_size) * cost.channel

    def unit_costs(self, number: int) -> tuple[float, float]:
        """Parameters of one query group and of one FFN channel of a layer."""
        return self._costs[number].group, self._costs[number].channel

    def distance(self, number: int, layer: LayerShape, wish: tuple[float, float]) -> float:
        """How far a layer is from a wish, in parameters."""
        group, channel = self.unit_costs(number)
        return abs(layer.num_query_groups - wish[0]) * group + abs(layer.ffn_hidden_size - wish[1]) * channel


@dataclass(frozen=True)
class _Costs:
    """Parameters of one query group and of one FFN channel."""

    group: float
    channel: float

    @staticmethod
    def of(source: ModelShape, full: LayerShape, budget: Budget) -> _Costs:
        """Those of a layer ``full`` of ``source``: counted, by the difference that all but one make. 0 for a part that
        the layer lacks, or that has a single one, which stays."""
        (other,) = set(source.of_layer(None).by_layer())

        def count(layer: LayerShape) -> int:
            return budget.count(source.with_layers([other, layer]))

        groups, channels = full.num_query_groups - 1, full.ffn_hidden_size - 1
        one_group = replace(full, num_attention_heads=full.heads_per_group, num_query_groups=min(1, groups + 1))
        group = (count(full) - count(one_group)) / groups if groups > 0 else 0.0
        one_channel = replace(full, ffn_hidden_size=min(1, channels + 1))
        return _Costs(group, (count(full) - count(one_channel)) / channels if channels > 0 else 0.0)


def _next_to(size: int, possible: Sequence[int]) -> list[int]:
    """The possible sizes next to ``size``; none for a part that is gone."""
    if not size:
        return []
    place = possible.index(size)
    return [*possible[max(0, place - 1) : place], *possible[place + 1 : place + 2]]
