"""Sizes of layers that differ: on the budget, divisible, near what was wanted, and by a ranking over all layers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import Budget
from megatron_prune.methods.layer_sizes import by_global_ranking, fit, keep

SOURCE = ModelShape(4, 96, 12, 6, 12, 192, 384, tied=False)


def linears(layers: tuple[LayerShape, ...]) -> int:
    """Linear weights, by hand: hidden size 96, heads of 12."""
    return sum(
        96 * 12 * (2 * layer.num_attention_heads + 2 * layer.num_query_groups) + 3 * 96 * layer.ffn_hidden_size
        for layer in layers
    )


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_rounded_sizes_meet_the_budget_at_every_tensor_parallel_size(seed: int, tp: int) -> None:
    draw = random.Random(seed)
    share = draw.uniform(0.3, 0.95)
    wishes = [(draw.uniform(0.2, 6), draw.uniform(1, 192)) for _ in range(4)]
    step = 2 if tp == 2 else 3
    budget = Budget(share * linears(SOURCE.by_layer()), ffn_step=step, head_step=12, tensor_parallel=tp)
    found = fit(SOURCE, wishes, budget)
    assert abs(linears(found) / budget.parameters - 1) <= 0.005
    for layer in found:
        assert layer.ffn_hidden_size % step == 0 or layer.ffn_hidden_size == 192
        assert layer.num_attention_heads % tp == 0 and layer.num_attention_heads == 2 * layer.num_query_groups
        assert layer.num_query_groups % tp == 0 or tp % layer.num_query_groups == 0


def test_what_is_possible_and_on_the_budget_stays_as_it_is() -> None:
    wanted = [(6.0, 192.0), (2.0, 60.0), (0.0, 24.0), (5.0, 0.0)]
    layers = tuple(LayerShape(2 * int(g), int(g), int(f)) for g, f in wanted)
    assert fit(SOURCE, wanted, Budget(linears(layers), ffn_step=4)) == layers


def test_the_total_is_as_near_as_one_step_allows_and_sizes_move_little() -> None:
    """Every wish is rounded up by 4 channels of 12: the total must be corrected, not each layer."""
    deep = replace(SOURCE, num_layers=16)
    budget = Budget(16 * (96 * 12 * 18 + 3 * 96 * 68), ffn_step=12)
    found = fit(deep, [(3.0, 68.0)] * 16, budget)
    assert abs(linears(found) - budget.parameters) <= 3 * 96 * 12 / 2
    assert {layer.num_query_groups for layer in found} == {3}
    assert sorted(layer.ffn_hidden_size for layer in found) == [60] * 5 + [72] * 11


def test_exempt_layers_stay_whole() -> None:
    budget = Budget(0.6 * linears(SOURCE.by_layer()), ffn_step=4)
    found = fit(SOURCE, [(3.0, 96.0)] * 4, budget, exempt={0, 3})
    assert found[0] == found[3] == LayerShape(12, 6, 192)
    assert abs(linears(found) / budget.parameters - 1) <= 0.005


def test_a_step_that_cannot_meet_the_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="--divisible-by"):
        fit(SOURCE, [(3.0, 96.0)] * 4, Budget(0.55 * linears(SOURCE.by_layer()), ffn_step=192, head_step=72))


def test_all_parameters_count_where_the_budget_says_so() -> None:
    budget = Budget(0.7 * SOURCE.parameters(), of="all", ffn_step=4)
    found = fit(SOURCE, [(4.0, 100.0)] * 4, budget)
    assert abs(SOURCE.with_layers(found).parameters() / budget.parameters - 1) <= 0.005


@pytest.mark.parametrize("seed", [0, 1])
def test_a_global_ranking_is_that_of_one_sorted_list(seed: int) -> None:
    """Against a list of all units, dropped one by one from the lowest until the budget is met."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    channels = torch.rand(4, 192, generator=generator, dtype=torch.float64) * torch.tensor([[0.1], [1], [2], [0.5]])
    budget = Budget(0.5 * linears(SOURCE.by_layer()))
    group_cost, channel_cost = 96 * 12 * 6, 3 * 96
    units = [(float(groups[n, g]), group_cost, n, "group", g) for n, g in itertools.product(range(4), range(6))]
    units += [(float(channels[n, c]), channel_cost, n, "ffn", c) for n, c in itertools.product(range(4), range(192))]
    left, kept = linears(SOURCE.by_layer()), {(unit[2], unit[3], unit[4]) for unit in units}
    for _, cost, layer, kind, number in sorted(units):
        if left <= budget.parameters:
            break
        if sum(one[:2] == (layer, kind) for one in kept) > 1:  # one of each stays
            kept.remove((layer, kind, number))
            left -= cost
    found = by_global_ranking(SOURCE, groups, channels, budget)
    for layer in range(4):
        assert found[layer].num_query_groups == sum(one[:2] == (layer, "group") for one in kept)
        # The rest of the last unit is made up for in channels.
        assert abs(found[layer].ffn_hidden_size - sum(one[:2] == (layer, "ffn") for one in kept)) <= 24
    assert abs(linears(found) / budget.parameters - 1) <= 0.005
    assert len(set(found)) > 1


MIXED = SOURCE.with_layers([LayerShape(12, 6, 192), LayerShape(2, 1, 77), LayerShape(0, 0, 150), LayerShape(10, 5, 0)])


@pytest.mark.parametrize("least", [0.21, 0.35, 0.44])
@pytest.mark.parametrize(("source", "tp", "step"), [(SOURCE, 1, 5), (SOURCE, 2, 4), (SOURCE, 3, 6), (MIXED, 1, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_every_layer_keeps_its_least_share_on_the_budget(
    source: ModelShape, tp: int, step: int, least: float, seed: int
) -> None:
    """Of layers of which one ranking would strip most."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 40, 5, 0.1])[torch.randperm(4, generator=generator)]
    given = source.by_layer()
    groups, channels = (
        [torch.rand(size, generator=generator, dtype=torch.float64) * by for size, by in zip(sizes, scale, strict=True)]
        for sizes in ([one.num_query_groups for one in given], [one.ffn_hidden_size for one in given])
    )
    budget = Budget(0.65 * linears(given), ffn_step=step, head_step=12, tensor_parallel=tp)
    found = by_global_ranking(source, groups, channels, budget, least=least)
    assert abs(linears(found) / budget.parameters - 1) <= 0.005
    for layer, full in zip(found, given, strict=True):
        assert layer.num_query_groups >= least * full.num_query_groups
        assert layer.ffn_hidden_size >= least * full.ffn_hidden_size
    bare = by_global_ranking(source, groups, channels, budget)
    assert found != bare  # without it, some layer is stripped
    assert bare == by_global_ranking(source, groups, channels, budget, least=0)


@pytest.mark.parametrize("least", [0.35, 0.5])
def test_no_wish_is_rounded_below_the_least_share(least: float) -> None:
    """Every wish is below, and the nearest sizes are too."""
    budget = Budget(0.6 * linears(SOURCE.by_layer()), ffn_step=20)
    found = fit(SOURCE, [(1.0, 70.0), (5.0, 150.0), (1.0, 1.0), (6.0, 192.0)], budget, least=least)
    assert min(layer.num_query_groups for layer in found) == 3
    assert min(layer.ffn_hidden_size for layer in found) == {0.35: 80, 0.5: 100}[least]
    assert abs(linears(found) / budget.parameters - 1) <= 0.005


@pytest.mark.parametrize("source", [SOURCE, SOURCE.with_layers([LayerShape(12, 6, 96), LayerShape(8, 4, 192)] * 2)])
def test_a_least_share_that_is_the_whole_budget_leaves_layers_alike(source: ModelShape) -> None:
    given, generator = source.by_layer(), torch.Generator().manual_seed(0)
    groups = [torch.rand(one.num_query_groups, generator=generator).double() for one in given]
    channels = [torch.rand(one.ffn_hidden_size, generator=generator).double() * 9 for one in given]
    budget = Budget(0.5 * linears(given), ffn_step=4)
    half = tuple(
        LayerShape(one.num_attention_heads // 2, one.num_query_groups // 2, one.ffn_hidden_size // 2) for one in given
    )
    assert by_global_ranking(source, groups, channels, budget, least=0.5) == half
    assert by_global_ranking(source, groups, channels, budget) != half


def test_the_least_share_is_read_as_a_decimal() -> None:
    """0.07 of 100 is 7.000000000000001 as a float: 7 channels are enough."""
    source = replace(SOURCE, ffn_hidden_size=100)
    groups, channels = torch.rand(4, 6).double(), torch.rand(4, 100).double() * torch.tensor([[1.0], [9], [9], [9]])
    found = by_global_ranking(source, groups + 9, channels, Budget(0.7 * linears(source.by_layer())), least=0.07)
    assert found[0].ffn_hidden_size == 7


def test_what_is_kept_are_the_highest_scores_of_every_layer() -> None:
    generator = torch.Generator().manual_seed(3)
    heads = torch.rand(4, 12, generator=generator, dtype=torch.float64)
    channels = torch.rand(4, 192, generator=generator, dtype=torch.float64)
    layers = (LayerShape(12, 6, 192), LayerShape(4, 2, 7), LayerShape(0, 0, 11), LayerShape(6, 3, 0))
    selection = keep(SOURCE, layers, heads, channels)
    assert selection.shape(SOURCE).by_layer() == layers
    assert selection.heads is not None and selection.ffn is not None
    assert selection.heads[0] == tuple(range(12)) and selection.heads[2] == () and selection.ffn[3] == ()
    pairs = heads[1].view(6, 2).sum(1)
    assert selection.heads[1] == tuple(h for g in sorted(pairs.topk(2).indices.tolist()) for h in (2 * g, 2 * g + 1))
    assert set(selection.ffn[2]) == set(channels[2].topk(11).indices.tolist())
