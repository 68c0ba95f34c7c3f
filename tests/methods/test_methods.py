"""Every method against plain numpy written from its definition, on made-up statistics."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune import methods
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods import options
from megatron_prune.methods.base import PruningRequest, Selection
from megatron_prune.settings import Settings, add_flags

GQA = ModelShape(4, 24, 12, 3, 3, 20, 16, tied=False)
MHA = ModelShape(4, 24, 12, 12, 3, 20, 16, tied=True)


def numpy_activations(shape: ModelShape, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up activations at every site: [L, sequences, tokens, channels]."""
    random = np.random.default_rng(seed)
    widths = {
        "input_layernorm": shape.hidden_size,
        "pre_mlp_layernorm": shape.hidden_size,
        "attention": shape.num_attention_heads * shape.kv_channels,
        "mlp": shape.ffn_hidden_size,
        "final_layernorm": shape.hidden_size,
    }
    return {
        site: random.standard_normal((shape.num_layers, 3, 5, n)) * random.uniform(0.5, 2, (shape.num_layers, 1, 1, n))
        for site, n in widths.items()
    }


def sums(activations: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The statistics of those activations."""
    found = {}
    for site, x in activations.items():
        if site == "final_layernorm":
            x = x[0]
        found[f"{site}.sum_abs_mean_sq"] = torch.from_numpy((np.abs(x).mean(-2) ** 2).sum(-2))
        found[f"{site}.sum_sq"] = torch.from_numpy((x**2).sum((-3, -2)))
    return found


def settings(name: str, *flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser, own := options.STRUCTURED[name])
    return own.of(parser.parse_args(flags))


def select(name: str, source: ModelShape, target: ModelShape, statistics: Any, *flags: str, seed: int = 0) -> Selection:
    request = PruningRequest(source, target, settings(name, *flags), statistics, seed)
    (selection,) = methods.get(name).candidates(request)
    return selection


def top(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """Indices of the highest scores, the lower index first among equals, ascending."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return tuple(sorted(ranked[:count]))


def test_registry_finds_methods_by_their_files() -> None:
    structured = "flap llm-pruner minitron-depth minitron-width random sheared-llama shortgpt wanda-sp"
    assert methods.names() == structured.split()
    with pytest.raises(UsageError, match="--method: expected one of flap, llm-pruner.*, got magic"):
        methods.get("magic")


def test_shortgpt_keeps_the_most_influential_layers_in_order() -> None:
    influence = torch.tensor([0.5, 0.1, 0.4, 0.1], dtype=torch.float64)
    chosen = select("shortgpt", GQA, replace(GQA, num_layers=2), {"block_influence": influence})
    assert chosen == Selection((0, 2))


def test_shortgpt_tie_keeps_the_lower_layer_and_says_so() -> None:
    influence = torch.tensor([0.1, 0.5, 0.1, 0.1 * (1 - 5e-6)], dtype=torch.float64)
    chosen = select("shortgpt", GQA, replace(GQA, num_layers=2), {"block_influence": influence})
    assert chosen.layers == (0, 1)
    (tie,) = chosen.near_ties
    assert (tie.unit, tie.kept, tie.removed, tie.others) == ("layer", 0, 2, (3,))


def test_scores_further_apart_than_the_tolerance_are_no_near_tie() -> None:
    influence = torch.tensor([0.1, 0.5, 0.1 * (1 - 2e-5), 0.05], dtype=torch.float64)
    assert not select("shortgpt", GQA, replace(GQA, num_layers=2), {"block_influence": influence}).near_ties


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize(("source", "groups", "heads"), [(GQA, 3, 6), (GQA, 2, 4), (MHA, 5, 5)])
def test_minitron_width_matches_its_definition(
    source: ModelShape, groups: int, heads: int, final_norm: bool, seed: int
) -> None:
    target = replace(source, hidden_size=16, num_query_groups=groups, num_attention_heads=heads, ffn_hidden_size=7)
    activations = numpy_activations(source, seed)
    flags = ["--include-final-norm"] if final_norm else []
    chosen = select("minitron-width", source, target, sums(activations), *flags)

    def importance(x: np.ndarray) -> np.ndarray:  # [b, t, n] → [n]
        return np.sqrt((np.abs(x).mean(1) ** 2).sum(0))

    norms = [activations[site][layer] for site in ("input_layernorm", "pre_mlp_layernorm") for layer in range(4)]
    if final_norm:
        norms.append(activations["final_layernorm"][0])
    assert chosen.hidden == top(sum(importance(x) for x in norms), 16)
    assert chosen.layers == (0, 1, 2, 3)
    for layer in range(4):
        assert chosen.ffn is not None and chosen.heads is not None
        assert chosen.ffn[layer] == top(importance(activations["mlp"][layer]), 7)
        channels = importance(activations["attention"][layer])
        per_head = [np.linalg.norm(channels[3 * h : 3 * h + 3]) for h in range(12)]
        size = source.heads_per_group
        per_group = [sum(per_head[g * size : (g + 1) * size]) for g in range(source.num_query_groups)]
        expected = []
        for group in top(np.array(per_group), groups):
            inside = top(np.array(per_head[group * size : (group + 1) * size]), heads // groups)
            expected += [group * size + i for i in inside]
        assert chosen.heads[layer] == tuple(expected)


def test_minitron_width_leaves_alone_what_the_target_keeps() -> None:
    target = replace(GQA, ffn_hidden_size=7)
    chosen = select("minitron-width", GQA, target, sums(numpy_activations(GQA)))
    assert chosen.hidden is None and chosen.heads is None and chosen.ffn is not None


def test_near_ties_name_layer_and_group() -> None:
    statistics = sums(numpy_activations(GQA))
    context = statistics["attention.sum_abs_mean_sq"]
    context[1] = torch.arange(36, 0, -1).double()
    # Heads 5 and 6 (group 1) of layer 1 have equal scores; two of four heads stay in each group.
    context[1, 12:24] = torch.tensor([9, 9, 9, 4, 4, 4, 4, 4, 4, 1, 1, 1]).double()
    chosen = select("minitron-width", GQA, replace(GQA, num_attention_heads=6), statistics)
    assert chosen.heads is not None and chosen.heads[1] == (0, 1, 4, 5, 8, 9)
    tie = next(t for t in chosen.near_ties if t.layer == 1)
    assert (tie.unit, tie.group, tie.kept, tie.removed, tie.others) == ("head", 1, 5, 6, ())


def test_random_is_a_function_of_its_seed_and_obeys_the_target() -> None:
    target = ModelShape(3, 16, 4, 2, 3, 9, 16, tied=False)
    one, again, other = (select("random", GQA, target, {}, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one.layers) == 3 and one.hidden is not None and len(one.hidden) == 16
    assert one.heads is not None and len(one.heads) == 3
    for heads in one.heads:
        assert heads == tuple(sorted(set(heads)))
        assert sorted(Counter(head // 4 for head in heads).values()) == [2, 2]  # two heads in each of two groups


def test_random_is_uniform_over_heads_groups_and_layers() -> None:
    target = replace(GQA, num_layers=2, num_attention_heads=4, num_query_groups=2)
    layers, heads = np.zeros(4), np.zeros(12)
    draws = 3000
    for seed in range(draws):
        chosen = select("random", GQA, target, {}, seed=seed)
        assert chosen.heads is not None
        layers[list(chosen.layers)] += 1
        heads[list(chosen.heads[0])] += 1
    # Each layer stays in half of the draws, each head in a third: within five standard deviations.
    for counts, p in ((layers, 1 / 2), (heads, 1 / 3)):
        assert np.abs(counts / draws - p).max() < 5 * np.sqrt(p * (1 - p) / draws)


def test_minitron_depth_offers_every_run_of_layers_in_order() -> None:
    request = PruningRequest(GQA, replace(GQA, num_layers=3), settings=settings("minitron-depth"))
    found = methods.get("minitron-depth").candidates(request)
    assert [selection.layers for selection in found] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]
    assert all(selection.hidden is selection.heads is selection.ffn is None for selection in found)
    assert len({selection.key for selection in found}) == 4


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("taylor", ["vector", "first", "second", "mixed"])
@pytest.mark.parametrize(("source", "groups", "heads"), [(GQA, 2, 8), (GQA, 2, 4), (GQA, 3, 3), (MHA, 5, 5)])
def test_llm_pruner_adds_up_what_is_removed_together(
    source: ModelShape, groups: int, heads: int, taylor: str, seed: int
) -> None:
    """Units by loops over rows and columns. A head's rank among its group's depends on its own rows and columns."""
    random = np.random.default_rng(seed)
    d, per_group, layers = source.kv_channels, source.heads_per_group, source.num_layers
    sizes = {"qkv": (source.num_attention_heads + 2 * source.num_query_groups) * d,
             "proj": source.num_attention_heads * d, "fc1": 2 * source.ffn_hidden_size,
             "fc2": source.ffn_hidden_size}  # fmt: skip
    kinds = ("vector", "first", "second", "mixed")
    made = {f"{m}.{kind}": random.uniform(0, 1, (layers, size)) for m, size in sizes.items() for kind in kinds}
    target = replace(source, num_query_groups=groups, num_attention_heads=heads, ffn_hidden_size=7)
    statistics = {key: torch.from_numpy(value) for key, value in made.items()}
    chosen = select("llm-pruner", source, target, statistics, "--taylor", taylor)
    assert chosen.hidden is None and chosen.layers == (0, 1, 2, 3)
    assert chosen.heads is not None and chosen.ffn is not None
    for layer in range(layers):
        rows, columns = made[f"qkv.{taylor}"][layer], made[f"proj.{taylor}"][layer]
        own = np.zeros((source.num_query_groups, per_group))
        whole = np.zeros(source.num_query_groups)
        for group in range(source.num_query_groups):
            first = group * (per_group + 2) * d
            for head in range(per_group):
                place = (group * per_group + head) * d
                own[group, head] = rows[first + head * d :][:d].sum() + columns[place:][:d].sum()
            whole[group] = own[group].sum() + rows[first + per_group * d : first + (per_group + 2) * d].sum()
        kept = [g * per_group + h for g in top(whole, groups) for h in top(own[g], heads // groups)]
        assert chosen.heads[layer] == tuple(kept)
        gate, up = np.split(made[f"fc1.{taylor}"][layer], 2)
        assert chosen.ffn[layer] == top(gate + up + made[f"fc2.{taylor}"][layer], 7)


def test_what_reads_gradients_is_listed() -> None:
    """study.yaml and prune ask the list, without torch."""
    from megatron_prune.structured.statistics import saliency_shapes

    for name in methods.names():
        needed = set(methods.get(name).needs(options.STRUCTURED[name]()))
        assert bool(needed & saliency_shapes(GQA).keys()) == (name in options.READ_GRADIENTS)
