"""Sizes of layers by OWL: against the published formula, written here as loops in numpy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import Budget
from megatron_prune.structured import choice as choices
from tests.methods.test_methods import GQA, settings, top
from tests.methods.test_units import DIFFERENT, NAMES, Made, costs

WIDE = replace(GQA, num_layers=6, ffn_hidden_size=400)
MIXED = replace(WIDE, num_layers=4).with_layers(
    [replace(layer, ffn_hidden_size=20 * layer.ffn_hidden_size) for layer in DIFFERENT.by_layer()]
)
THRESHOLDS = (3, 5, 7, 10)


def made(source: ModelShape, seed: int) -> Made:
    """With outliers: more of them at lower thresholds, in a random order of layers."""
    found, draw = Made(source, seed), np.random.default_rng(seed + 100)
    weights = [source.of_layer(layer).linear_parameters() // source.num_layers for layer in range(source.num_layers)]
    counts = np.sort(draw.integers(1, 900, (source.num_layers, 4)), axis=1)[:, ::-1]
    found.tensors["outliers"] = torch.tensor(
        [[size, *row] for size, row in zip(weights, counts.tolist(), strict=True)], dtype=torch.float64
    )
    return found


def quotas(found: Made, ratio: float, threshold: int, bound: float, layers: list[int]) -> dict[int, float]:
    """What each of these layers loses."""
    rows = found.tensors["outliers"].numpy()
    share = {layer: rows[layer, 1 + THRESHOLDS.index(threshold)] / rows[layer, 0] for layer in layers}
    low, high = min(share.values()), max(share.values())
    scaled = {layer: (one - low) / (high - low) for layer, one in share.items()}
    size = {layer: rows[layer, 0] for layer in layers}
    mean = sum(size[layer] * scaled[layer] for layer in layers) / sum(size.values())
    return {layer: ratio + 2 * bound * (mean - scaled[layer]) for layer in layers}


@pytest.mark.parametrize(("threshold", "bound"), [(5, 0.08), (3, 0.15), (10, 0.02)])
@pytest.mark.parametrize("source", [WIDE, MIXED], ids=["alike", "different"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_with_more_outliers_keep_more(name: str, source: ModelShape, threshold: int, bound: float) -> None:
    found = made(source, threshold)
    whole = source.with_biases() if name == "flap" else source
    budget = Budget(0.6 * whole.linear_parameters())
    flags = ["--allocation", "owl", "--owl-threshold", f"{threshold}", "--owl-bound", f"{bound}"]
    target = replace(source.of_layer(None) if source is MIXED else source, ffn_hidden_size=240)
    kept = found.select(name, target, budget, *flags)
    assert abs(budget.error(kept.shape(source))) <= 0.005
    wanted = quotas(found, 0.4, threshold, bound, list(range(source.num_layers)))
    assert max(wanted.values()) - min(wanted.values()) == pytest.approx(2 * bound)
    alike = found.select(name, target, budget).shape(source).by_layer()
    group, channel = costs(source)
    for layer, (left, full) in enumerate(zip(kept.shape(source).by_layer(), source.by_layer(), strict=True)):
        share = 1 - wanted[layer]
        if full.num_query_groups:
            near = share / 0.6 * alike[layer].num_query_groups
            assert left.num_query_groups in {max(1, math.floor(near)), math.ceil(near)}
            assert abs(left.num_query_groups - near) <= 0.5 or near > full.num_query_groups
        if full.ffn_hidden_size:
            parts = left.num_query_groups * group + left.ffn_hidden_size * channel
            whole_layer = full.num_query_groups * group + full.ffn_hidden_size * channel
            # A layer without FFN channels cannot make up for the rounding of its groups, so others do.
            assert parts / whole_layer == pytest.approx(share, abs=0.04 if source is MIXED else 0.01)
            assert kept.ffn is not None
            assert kept.ffn[layer] == top(found.scores(name)[1][layer], left.ffn_hidden_size)
    if source is WIDE and bound > 0.05:  # groups come out alike, so channels are in the order of outliers
        channels = [layer.ffn_hidden_size for layer in kept.shape(source).by_layer()]
        assert sorted(range(6), key=channels.__getitem__) == sorted(wanted, key=lambda layer: -wanted[layer])


def test_without_room_between_ratios_layers_are_alike() -> None:
    found, budget = made(WIDE, 0), Budget(0.6 * WIDE.linear_parameters())
    kept = found.select("wanda-sp", WIDE, budget, "--allocation", "owl", "--owl-bound", "0")
    assert len({len(one) for one in kept.ffn or ()}) <= 2  # what is left over goes to some of them


def test_exempt_layers_stay_whole_and_the_others_share_the_ratio() -> None:
    found = made(WIDE, 1)
    budget = Budget(0.7 * WIDE.linear_parameters())
    kept = found.select("llm-pruner", WIDE, budget, "--allocation", "owl", "--exempt-layers", "0,4")
    layers = kept.shape(WIDE).by_layer()
    assert [layers[n] == WIDE.by_layer()[n] for n in range(6)] == [True, False, False, False, True, False]
    wanted = quotas(found, 0.3 * 6 / 4, 5, 0.08, [1, 2, 3, 5])
    for layer, ratio in wanted.items():
        assert layers[layer].ffn_hidden_size / 400 == pytest.approx(1 - ratio, abs=0.08)
    assert abs(budget.error(kept.shape(WIDE))) <= 0.005


def test_every_layer_keeps_the_least() -> None:
    found, budget = made(WIDE, 2), Budget(0.5 * WIDE.linear_parameters())
    flags = ["--allocation", "owl", "--owl-bound", "0.2"]
    assert min(len(one) for one in found.select("wanda-sp", WIDE, budget, *flags).ffn or ()) < 160
    kept = found.select("wanda-sp", WIDE, budget, *flags, "--least-kept", "0.4")
    assert min(len(one) for one in kept.ffn or ()) >= 160


REFUSED = {
    "--owl-bound: expected --allocation owl": ["--owl-bound", "0.1"],
    "--owl-threshold: expected --allocation owl": ["--allocation", "global", "--owl-threshold", "5"],
    "--owl-threshold: expected one of 3, 5, 7, 10": ["--allocation", "owl", "--owl-threshold", "4"],
    "--owl-bound: expected at least 0 and less than 0.2, got 0.2": ["--allocation", "owl", "--owl-bound", "0.2"],
    "--search-generations": ["--allocation", "owl", "--search-generations", "3"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused_before_anything_runs(message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choices.choose(
            "flap", verbs.TargetSettings(ratio=0.4, divisible_by=1), settings("flap", *REFUSED[message])
        ).shapes(WIDE)


def test_explicit_sizes_are_refused() -> None:
    asked = verbs.TargetSettings(target_ffn_hidden_size=200, divisible_by=1)
    with pytest.raises(UsageError, match="--allocation: .*got owl for explicit sizes"):
        choices.choose("wanda-sp", asked, settings("wanda-sp", "--allocation", "owl")).shapes(WIDE)


def test_only_owl_reads_outliers() -> None:
    for name in NAMES:
        method = methods.get(name)
        assert "outliers" in method.needs(settings(name, "--allocation", "owl"))
        assert "outliers" not in method.needs(settings(name))
