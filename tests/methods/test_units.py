"""Query groups and FFN channels ranked over all layers, against loops in numpy written from the definitions."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods import options
from megatron_prune.methods.base import Budget, PruningRequest, Selection
from megatron_prune.structured import choice as choices
from megatron_prune.structured.statistics import tensor_shapes
from tests.methods.test_flap import TOKENS, Layer, score
from tests.methods.test_methods import GQA, MHA, settings, top

NAMES = ("flap", "wanda-sp", "llm-pruner")
SOURCES = (GQA, MHA, replace(GQA, gated=False))
# A single group, no attention, no MLP.
DIFFERENT = GQA.with_layers([LayerShape(12, 3, 20), LayerShape(4, 1, 13), LayerShape(0, 0, 17), LayerShape(8, 2, 0)])


class Made:
    """Statistics of made-up layers, in which later layers matter more to llm-pruner."""

    def __init__(self, source: ModelShape, seed: int):
        random = np.random.default_rng(seed)
        self.source = source
        self.layers = [Layer(source.of_layer(number), random) for number in range(source.num_layers)]
        for layer, shape in zip(self.layers, source.by_layer(), strict=True):
            for site, size in (("attention", shape.num_attention_heads), ("mlp", shape.ffn_hidden_size)):
                if not size:
                    layer.x[site], layer.w[site] = layer.x[site][..., :0], layer.w[site][:, :0]
        self.tensors = {
            name: torch.from_numpy(random.uniform(0.1, 1, size) * np.linspace(1, 2, size[0])[:, None])
            for name, size in tensor_shapes(source, gradients=True).items()
            if len(size) == 2
        }
        for site in ("attention", "mlp"):
            x, w = (widened([getattr(layer, kind)[site] for layer in self.layers]) for kind in "xw")
            self.tensors[f"{site}.sum"] = torch.from_numpy(x.sum((1, 2)))
            self.tensors[f"{site}.sum_sq"] = torch.from_numpy((x**2).sum((1, 2)))
            self.tensors[f"{site}.weight_sum_sq"] = torch.from_numpy((w**2).sum(1))
            self.tensors[f"{site}.weight_sum_abs"] = torch.from_numpy(np.abs(w).sum(1))

    def select(self, name: str, target: ModelShape, budget: Budget | None, *flags: str) -> Selection:
        method, own = methods.get(name), settings(name, *flags)
        needed = {key: self.tensors[key] for key in method.needs(own)}
        request: Any = PruningRequest(self.source, target, own, needed, None, TOKENS[0] * TOKENS[1], budget)
        (found,) = method.candidates(request)
        return found

    def scores(self, name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of every layer's groups [G] and channels [F], which compare everywhere."""
        source, groups, channels = self.source, [], []
        for number, (layer, shape) in enumerate(zip(self.layers, source.by_layer(), strict=True)):
            if name == "llm-pruner":
                qkv, proj, fc1, fc2 = (
                    self.tensors[f"{m}.first"][number].numpy() for m in ("qkv", "proj", "fc1", "fc2")
                )
                d, each, wide, own = source.kv_channels, source.heads_per_group, shape.ffn_hidden_size, []
                for group in range(shape.num_query_groups):
                    rows = [qkv[(each + 2) * d * group + i] for i in range((each + 2) * d)]
                    columns = [proj[each * d * group + i] for i in range(each * d)]
                    own.append(sum(rows + columns) / ((len(rows) + len(columns)) * source.hidden_size))
                groups.append(np.array(own))
                parts = [fc1[:wide], *([fc1[wide : 2 * wide]] if source.gated else []), fc2[:wide]]
                channels.append(sum(parts) / (len(parts) * source.hidden_size))
                continue
            metric, power = ("wifv", 2) if name == "flap" else ("wifn", 1)
            heads, own = score(layer, "attention", metric) ** power, score(layer, "mlp", metric)
            heads, own = ((one - one.mean()) / one.std(ddof=1) if len(one) else one for one in (heads, own))
            groups.append(
                np.array([part.mean() for part in np.split(heads, max(1, shape.num_query_groups)) if len(part)])
            )
            channels.append(own)
        return groups, channels


def widened(rows: list[np.ndarray]) -> np.ndarray:
    """[L, …, n]; after those that are shorter, numbers that must not be read."""
    wide = max(row.shape[-1] for row in rows)
    ends = [(0, 0)] * (rows[0].ndim - 1)
    return np.stack([np.pad(row, [*ends, (0, wide - row.shape[-1])], constant_values=np.nan) for row in rows])


def costs(source: ModelShape) -> tuple[int, int]:
    """Linear weights of a query group and of a channel."""
    group = (2 * source.heads_per_group + 2) * source.kv_channels * source.hidden_size
    return group, (3 if source.gated else 2) * source.hidden_size


def kept(source: ModelShape, groups: list[list[int]], channels: list[list[int]]) -> tuple[Any, Any]:
    """A selection's heads and channels from kept groups and channels of every layer."""
    each = source.heads_per_group
    heads = tuple(tuple(g * each + h for g in sorted(own) for h in range(each)) for own in groups)
    return heads, tuple(tuple(sorted(own)) for own in channels)


def highest(scores: np.ndarray, least: float) -> tuple[int, ...]:
    """Indices of the best unit, or of the best ``least`` of all, if these are more."""
    return top(scores, min(len(scores), max(1, math.ceil(least * len(scores)))))


@pytest.mark.parametrize("least", [0.0, 0.35])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("source", [*SOURCES, DIFFERENT])
@pytest.mark.parametrize("name", NAMES)
def test_the_lowest_units_of_all_layers_go(name: str, source: ModelShape, seed: int, least: float) -> None:
    made = Made(source, seed)
    groups, channels = made.scores(name)
    units = [(groups[layer][g], layer, "group", g) for layer in range(4) for g in range(len(groups[layer]))]
    units += [(channels[layer][f], layer, "ffn", f) for layer in range(4) for f in range(len(channels[layer]))]
    first = {(layer, "group", g) for layer in range(4) for g in highest(groups[layer], least)}
    first |= {(layer, "ffn", f) for layer in range(4) for f in highest(channels[layer], least)}
    units.sort(key=lambda unit: (unit[1:] not in first, -unit[0]))
    half = units[: len(units) // 2]
    stay: dict[str, list[list[int]]] = {kind: [[], [], [], []] for kind in ("group", "ffn")}
    for _, layer, kind, index in half:
        stay[kind][layer].append(index)
    group, channel = costs(source)
    number = {kind: sum(map(len, own)) for kind, own in stay.items()}
    budget = Budget(number["group"] * group + number["ffn"] * channel)
    target = source.of_layer(None) if source is DIFFERENT else replace(source, ffn_hidden_size=9)
    found = made.select(name, target, budget, "--allocation", "global", "--least-kept", f"{least}")
    assert (found.heads, found.ffn) == kept(source, stay["group"], stay["ffn"])
    assert least or found == made.select(name, target, budget, "--allocation", "global")
    assert len({(len(stay["group"][layer]), len(stay["ffn"][layer])) for layer in range(4)}) > 1  # layers differ
    assert budget.count(found.shape(source)) == budget.parameters
    assert (found.compensation is not None) == (name == "flap") == found.shape(source).linear_bias


@pytest.mark.parametrize("least", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", NAMES)
def test_with_sizes_groups_and_channels_are_ranked_apart(
    name: str, source: ModelShape, seed: int, least: float
) -> None:
    made, average = Made(source, seed), (source.num_query_groups * 2 // 3, 7)
    each = source.heads_per_group
    target = replace(
        source, num_query_groups=average[0], num_attention_heads=average[0] * each, ffn_hidden_size=average[1]
    )
    stay = []
    for scores, many in zip(map(np.array, made.scores(name)), average, strict=True):
        certain = [(layer, index) for layer in range(4) for index in highest(scores[layer], least)]
        rest = sorted(np.ndindex(*scores.shape), key=lambda unit: -scores[unit])
        order = [*certain, *(unit for unit in rest if unit not in certain)][: 4 * many]
        stay.append([[index for layer, index in order if layer == number] for number in range(4)])
    budget = Budget(target.linear_parameters(), apart=True)
    found = made.select(name, target, budget, "--allocation", "global", "--least-kept", f"{least}")
    assert (found.heads, found.ffn) == kept(source, *stay)


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_differ_keep_the_same_share(name: str) -> None:
    """Of what each has: the highest scores, as near to the share as the numbers allow."""
    sizes = [LayerShape(12, 3, 200), LayerShape(4, 1, 130), LayerShape(0, 0, 170), LayerShape(8, 2, 0)]
    source = GQA.with_layers([*sizes, *sizes])
    made, budget = Made(source, 0), Budget(0.7 * source.linear_parameters())
    found = made.select(name, source.of_layer(None), budget)
    layers = found.shape(source).by_layer()
    assert abs(budget.error(found.shape(source))) <= 0.005
    for number, (layer, full) in enumerate(zip(layers, source.by_layer(), strict=True)):
        assert bool(layer.num_query_groups) == bool(full.num_query_groups)
        assert layer.num_query_groups in (0, 1, 2)  # 2.1, 0.7, and 1.4 groups
        if full.ffn_hidden_size:
            assert layer.ffn_hidden_size / full.ffn_hidden_size == pytest.approx(0.7, abs=0.06)
            assert found.ffn is not None
            assert found.ffn[number] == top(made.scores(name)[1][number], layer.ffn_hidden_size)
    assert found.shape(source).linear_bias == (name == "flap")
    assert found.compensation is None or all(map(np.isfinite, itertools.chain(*(found.compensation.ffn or ()))))


@pytest.mark.parametrize("compensate", [True, False])
def test_added_biases_count(compensate: bool) -> None:
    """They are 3% of this model: sizes that leave them out of account are off the budget."""
    wide = replace(GQA, ffn_hidden_size=200)
    whole = wide.with_biases() if compensate else wide
    budget = Budget(0.6 * whole.parameters(), of="all")
    flags = ["--allocation", "global", *([] if compensate else ["--no-compensate"])]
    found = Made(wide, 0).select("flap", replace(whole, ffn_hidden_size=100), budget, *flags)
    assert abs(budget.error(found.shape(wide))) <= 0.002


@pytest.mark.parametrize("step", [1, 4])
def test_exempt_layers_stay_whole_and_the_others_are_alike(step: int) -> None:
    wide = replace(GQA, num_layers=6, ffn_hidden_size=200)
    made = Made(wide, 0)
    budget = Budget(0.6 * wide.linear_parameters(), ffn_step=step)
    found = made.select("llm-pruner", replace(wide, ffn_hidden_size=80), budget, "--exempt-layers", "0-1,5")
    layers = found.shape(wide).by_layer()
    assert abs(budget.error(found.shape(wide))) <= 0.005
    assert [layer == wide.by_layer()[0] for layer in layers] == [True, True, False, False, False, True]
    others = [layer.ffn_hidden_size for layer in layers[2:5]]
    assert max(others) - min(others) <= step and max(others) < 200
    assert {layer.num_query_groups for layer in layers[2:5]} <= {1, 2}
    fc1, fc2 = made.tensors["fc1.first"].numpy(), made.tensors["fc2.first"].numpy()
    for layer in (2, 3, 4):
        saliency = fc1[layer].reshape(2, -1).sum(0) + fc2[layer]
        assert found.ffn is not None and found.ffn[layer] == top(saliency, len(found.ffn[layer]))
    everywhere = made.select(
        "llm-pruner", replace(wide, ffn_hidden_size=80), budget, "--exempt-layers", "5", "--allocation", "global"
    )
    assert everywhere.shape(wide).by_layer()[5] == wide.by_layer()[5]


@pytest.mark.parametrize(
    ("flags", "target", "share", "message"),
    [
        (["--exempt-layers", "4"], GQA, 0.5, "--exempt-layers: expected layers below the parent's 4, got 4"),
        (["--exempt-layers", "0-2"], GQA, 0.5, "--exempt-layers: expected fewer, got 3 of 4 layers"),
        (["--exempt-layers", "2-1"], GQA, 0.5, "--exempt-layers: expected numbers and ranges such as 0-3,7"),
        (
            ["--allocation", "global"], replace(GQA, num_attention_heads=6), 0.5,
            "--target-num-attention-heads: expected the parent.s 4 where layers may differ, got 2 heads per query",
        ),
    ],
)  # fmt: skip
def test_refused(flags: list[str], target: ModelShape, share: float, message: str) -> None:
    budget = Budget(share * GQA.linear_parameters())
    with pytest.raises(UsageError, match=message):
        methods.get("llm-pruner").check_budget(settings("llm-pruner", *flags), GQA, target, budget)
        Made(GQA, 0).select("llm-pruner", target, budget, *flags)


@pytest.mark.parametrize(
    ("flags", "target", "message"),
    [
        # A layer has 3 groups of 720 weights and 20 channels of 72. 0.6 of it: 2 and 12. The next after 0.33: 2 and 7.
        (["--least-kept", "0.6"], {"ratio": 0.5}, "expected at most 0.33, got 0.6 (the layers would keep "
         "9216 parameters or more, and the target leaves 7200)"),
        (["--least-kept", "0.33", "--exempt-layers", "1"], {"ratio": 0.5}, "expected at most 0.3, got 0.33 with 1 of 4 "
         "layers exempt (the layers would keep 7272 parameters or more, and the target leaves 7200)"),
        (["--least-kept", "0.5"], {"target_ffn_hidden_size": 9, "target_num_query_groups": 2},
         "expected at most 0.45, got 0.5 (the layers would keep 40 FFN channels or more, and the target leaves 36)"),
        (["--least-kept", "0.4"], {"target_ffn_hidden_size": 9, "target_num_query_groups": 1},
         "expected at most 0.33, got 0.4 (the layers would keep 8 query groups or more, and the target leaves 4)"),
    ],
)  # fmt: skip
def test_a_least_share_above_what_the_target_leaves_is_refused_before_anything_is_read(
    flags: list[str], target: dict[str, Any], message: str
) -> None:
    own = settings("llm-pruner", "--allocation", "global", *flags)
    asked = verbs.TargetSettings(divisible_by=1, **target)
    with pytest.raises(UsageError, match=re.escape(f"--least-kept: {message}")):
        choices.choose("llm-pruner", asked, own).shapes(GQA)


@pytest.mark.parametrize("name", NAMES)
def test_a_least_share_needs_one_ranking_over_all_layers(name: str) -> None:
    asked = verbs.TargetSettings(ratio=0.5, divisible_by=1)
    own = settings(name, "--allocation", "global", "--least-kept", "0.25")
    assert own.to_json()["least_kept"] == 0.25
    choices.choose(name, asked, own).shapes(GQA)
    with pytest.raises(
        UsageError, match="--least-kept: expected --allocation owl, global or search with it, got --allocation u"
    ):
        choices.choose(name, asked, settings(name, "--least-kept", "0.25"))
    for wrong in ("1", "-0.1", "nan", "half"):
        with pytest.raises(UsageError, match=f"--least-kept: expected a fraction, .* got {wrong}"):
            settings(name, f"--least-kept={wrong}")


def test_layers_that_the_parent_lacks_are_refused_before_anything_is_read() -> None:
    asked, own = verbs.TargetSettings(ratio=0.5, divisible_by=1), settings("llm-pruner", "--exempt-layers", "4")
    with pytest.raises(UsageError, match="--exempt-layers: expected layers below the parent's 4, got 4"):
        choices.choose("llm-pruner", asked, own).shapes(GQA)


@pytest.mark.parametrize("name", NAMES)
def test_layers_differ_only_where_that_is_asked_for(name: str) -> None:
    method = methods.get(name)
    own = options.STRUCTURED[name]
    assert not method.heterogeneous(own()) and method.heterogeneous(own.read({"allocation": "global"}))
