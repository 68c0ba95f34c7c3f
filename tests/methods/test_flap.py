"""flap and wanda-sp against numpy in float64, written from the papers, on made-up activations and weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.methods.accumulators import COLUMN_SUMS, ChannelSums, column_sums, variance
from megatron_prune.methods.base import PruningRequest, Selection
from tests.methods.test_methods import GQA, MHA, select, settings, top

SITES = {"attention": "heads", "mlp": "ffn"}
TOKENS = (3, 5)  # sequences, tokens of each


class Layer:
    """Inputs [tokens, n] and weights [out, n] of linear_proj and linear_fc2 of one layer."""

    def __init__(self, shape: ModelShape, random: np.random.Generator):
        sizes = {site: shape.axis_size(axis) for site, axis in SITES.items()}  # type: ignore[arg-type]
        self.x = {
            site: random.standard_normal((*TOKENS, n)) * random.uniform(0.2, 2, n) + random.uniform(-3, 3, n)
            for site, n in sizes.items()
        }
        self.w = {site: random.standard_normal((shape.hidden_size, n)) for site, n in sizes.items()}


def made_up(shape: ModelShape, seed: int) -> tuple[list[Layer], dict[str, torch.Tensor]]:
    """Layers, and the statistics that calibrate would make of them."""
    random = np.random.default_rng(seed)
    layers = [Layer(shape, random) for _ in range(shape.num_layers)]
    found: dict[str, torch.Tensor] = {}
    for site in SITES:
        x, w = (np.stack([getattr(layer, kind)[site] for layer in layers]) for kind in "xw")
        found[f"{site}.sum"] = torch.from_numpy(x.sum((1, 2)))
        found[f"{site}.sum_sq"] = torch.from_numpy((x**2).sum((1, 2)))
        found[f"{site}.weight_sum_sq"] = torch.from_numpy((w**2).sum(1))
        found[f"{site}.weight_sum_abs"] = torch.from_numpy(np.abs(w).sum(1))
    return layers, found


def chosen(name: str, source: ModelShape, target: ModelShape, statistics: dict[str, torch.Tensor], *flags: str):
    from megatron_prune import methods

    tokens = TOKENS[0] * TOKENS[1]
    method, own = methods.get(name), settings(name, *flags)
    needed = {key: statistics[key] for key in method.needs(own)}  # and no more
    (selection,) = method.candidates(PruningRequest(source, target, own, needed, None, tokens))
    return selection


def score(layer: Layer, site: str, metric: str) -> np.ndarray:
    """Of every input, with loops: the paper's equations 4 to 6, but for factors that all inputs share."""
    found = []
    for j in range(layer.w[site].shape[1]):
        inputs, column = layer.x[site][..., j].ravel(), layer.w[site][:, j]
        fluctuation = ((inputs - inputs.mean()) ** 2).sum() / (inputs.size - 1)
        found.append(
            {
                "wifv": fluctuation * (column @ column),
                "ifv": fluctuation,
                "wifn": (np.abs(column) * np.linalg.norm(inputs)).sum(),
            }[metric]
        )
    return np.array(found)


def expected(layer: Layer, source: ModelShape, target: ModelShape, metric: str, power: int) -> tuple[list[int], tuple]:
    """Heads and FFN channels that stay."""
    heads = (score(layer, "attention", metric) ** power).reshape(source.num_query_groups, source.heads_per_group, -1)
    kept = [
        group * source.heads_per_group + head
        for group in top(heads.sum((1, 2)), target.num_query_groups)
        for head in top(heads[group].sum(1), target.heads_per_group)
    ]
    return kept, top(score(layer, "mlp", metric), target.ffn_hidden_size)


CASES = [(GQA, 2, 8), (GQA, 2, 4), (GQA, 3, 6), (MHA, 5, 5)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
@pytest.mark.parametrize(("source", "groups", "heads"), CASES)
def test_flap_keeps_what_fluctuates_and_knows_the_means_of_the_rest(
    source: ModelShape, groups: int, heads: int, metric: str, seed: int
) -> None:
    target = replace(source, num_query_groups=groups, num_attention_heads=heads, ffn_hidden_size=7).with_biases()
    layers, statistics = made_up(source, seed)
    found = chosen("flap", source, target, statistics, "--metric", metric)
    assert found.hidden is None and found.layers == (0, 1, 2, 3)
    assert found.compensation is not None and found.compensation.heads is not None and found.heads is not None
    assert found.compensation.ffn is not None and found.ffn is not None
    for number, layer in enumerate(layers):
        kept, channels = expected(layer, source, target, metric, power=2)
        assert (found.heads[number], found.ffn[number]) == (tuple(kept), channels)
        means = layer.x["attention"].mean((0, 1)).reshape(source.num_attention_heads, -1)
        gone = [head for head in range(source.num_attention_heads) if head not in kept]
        np.testing.assert_allclose(found.compensation.heads[number], means[gone].ravel(), rtol=1e-9)
        means = layer.x["mlp"].mean((0, 1))
        gone = [channel for channel in range(source.ffn_hidden_size) if channel not in channels]
        np.testing.assert_allclose(found.compensation.ffn[number], means[gone], rtol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("source", "groups", "heads"), CASES)
def test_wanda_sp_adds_up_wandas_scores(source: ModelShape, groups: int, heads: int, seed: int) -> None:
    target = replace(source, num_query_groups=groups, num_attention_heads=heads, ffn_hidden_size=7)
    layers, statistics = made_up(source, seed)
    found = chosen("wanda-sp", source, target, statistics)
    assert found.heads is not None and found.ffn is not None and found.compensation is None
    for number, layer in enumerate(layers):
        kept, channels = expected(layer, source, target, "wifn", power=1)
        assert (found.heads[number], found.ffn[number]) == (tuple(kept), channels)


def test_nothing_makes_up_for_what_stays_and_none_without_compensation() -> None:
    _, statistics = made_up(GQA, 0)
    thinner = replace(GQA, ffn_hidden_size=7)
    found = chosen("flap", GQA, thinner.with_biases(), statistics)
    assert found.heads is None and found.compensation is not None
    assert found.compensation.heads is None and found.compensation.ffn is not None
    plain = chosen("flap", GQA, thinner, statistics, "--no-compensate")
    assert plain == Selection(found.layers, ffn=found.ffn, near_ties=found.near_ties)


def test_equal_scores_keep_the_lower_index_and_say_so() -> None:
    _, statistics = made_up(GQA, 0)
    statistics["mlp.sum_sq"][2, 3:] = statistics["mlp.sum_sq"][2, 3]
    statistics["mlp.weight_sum_abs"][2, 3:] = statistics["mlp.weight_sum_abs"][2, 3]
    found = select("wanda-sp", GQA, replace(GQA, ffn_hidden_size=7), statistics)
    assert found.ffn is not None and found.ffn[2][-4:] == tuple(range(found.ffn[2][-4], found.ffn[2][-4] + 4))
    assert any(tie.unit == "ffn" and tie.layer == 2 for tie in found.near_ties)


@pytest.mark.parametrize("away", [0, 1, 100, 10_000])
def test_fluctuation_far_from_zero(away: float) -> None:
    """Micro-batches of fp32 activations whose mean is ``away`` standard deviations from zero; numpy's two passes."""
    random = np.random.default_rng(0)
    x = (random.standard_normal((6, 50, 17)) + away).astype(np.float32)
    sums = ChannelSums(17)
    for part in (x[:1], x[1:4], x[4:]):
        sums.add(torch.from_numpy(part).transpose(0, 1))
    found = variance(sums.sums[2], sums.sums[1], 300)
    np.testing.assert_allclose(found.numpy(), x.reshape(300, 17).astype(np.float64).var(0, ddof=1), rtol=1e-6)


def test_fluctuation_of_constants_is_zero() -> None:
    constant = torch.full((4, 2, 3), 0.1)
    sums = ChannelSums(3)
    sums.add(constant)
    assert variance(sums.sums[2], sums.sums[1], 8).tolist() == pytest.approx([0, 0, 0], abs=1e-15)
    assert variance(torch.tensor([0.3]), torch.tensor([0.09]), 1).tolist() == [0]


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_sums_over_columns_in_blocks_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prune.methods import accumulators

    monkeypatch.setattr(accumulators, "_GPU_SLICE_BYTES", 8 * 5 * 13)
    weight = torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, 13)))
    found = dict(zip(COLUMN_SUMS, column_sums(weight.clone()), strict=True))
    torch.testing.assert_close(found["weight_sum_sq"], (weight**2).sum(0))
    torch.testing.assert_close(found["weight_sum_abs"], weight.abs().sum(0))
