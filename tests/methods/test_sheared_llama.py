"""Sheared-LLaMA's mathematics against the paper's formulas in float64, in plain torch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.methods import sheared_llama
from megatron_prune.methods.base import PruningRequest
from megatron_prune.methods.options import NoOptions

SOURCE = ModelShape(
    num_layers=3, hidden_size=10, num_attention_heads=6, num_query_groups=3, kv_channels=4, ffn_hidden_size=7,
    padded_vocab_size=32, tied=False,
)  # fmt: skip
ZETA, GAMMA, T = 1.1, -0.1, 2 / 3  # as the paper on hard-concrete masks (1712.01312) calls them


def numbers(*shape: int, seed: int = 0, low: float = -4.6, high: float = 4.6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def test_a_sample_and_its_slope_are_the_hard_concrete_ones():
    log_alpha, u = numbers(5000), numbers(5000, seed=1, low=1e-4, high=1 - 1e-4)
    leaf = log_alpha.clone().requires_grad_()
    stretched = torch.sigmoid((u.log() - (1 - u).log() + leaf) / T) * (ZETA - GAMMA) + GAMMA
    expected = torch.nn.functional.hardtanh(stretched, 0, 1)
    expected.sum().backward()
    z = sheared_llama.sample(log_alpha, u)
    torch.testing.assert_close(z, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sheared_llama.slope(log_alpha, u), leaf.grad, rtol=1e-12, atol=1e-12)
    assert (z == 0).sum() > 500 and (z == 1).sum() > 500  # both ends are clipped, and have no slope


def test_the_ends_of_the_uniform_draw_are_finite():
    z = sheared_llama.sample(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert z.tolist() == [0, 1] and sheared_llama.slope(torch.zeros(2), torch.tensor([0.0, 1.0])).tolist() == [0, 0]


@pytest.mark.parametrize("log_alpha", [-4.6, -2.0, 0.0, 1.5, 4.6])
def test_the_expected_share_that_is_kept_is_that_of_many_samples(log_alpha):
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # quadrature instead of sampling
    z = sheared_llama.sample(torch.tensor(log_alpha, dtype=torch.float64), u)
    exact = 1 - 1 / (1 + math.exp(-(T * math.log(-GAMMA / ZETA) - log_alpha)))
    assert float((z > 0).double().mean()) == pytest.approx(exact, abs=1e-5)
    assert float(sheared_llama.probability(torch.tensor(log_alpha, dtype=torch.float64))) == pytest.approx(
        exact, abs=1e-12
    )


def test_the_target_ramps_up_linearly():
    assert [sheared_llama.ramped(0.5, step, 4) for step in range(6)] == [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert sheared_llama.ramped(0.5, 0, 0) == 0.5


def test_masks_are_of_what_the_target_cuts():
    target = replace(SOURCE, num_attention_heads=2, num_query_groups=2, ffn_hidden_size=4)
    found = {kind.name: (kind.shape, kind.kept) for kind in sheared_llama.kinds(SOURCE, target)}
    assert found == {"group": ((3, 3), 2), "head": ((3, 3, 2), 1), "ffn": ((3, 7), 4)}
    deeper = sheared_llama.kinds(SOURCE, replace(SOURCE, num_layers=2, hidden_size=8))
    assert [(kind.name, kind.sparsity) for kind in deeper] == [
        ("layer", pytest.approx(1 / 3)),
        ("hidden", pytest.approx(0.2)),
    ]


def learned(target: ModelShape, seed: int = 3) -> dict[str, torch.Tensor]:
    return {
        kind.name: numbers(*kind.shape, seed=seed + number)
        for number, kind in enumerate(sheared_llama.kinds(SOURCE, target))
    }


def test_the_selection_is_exactly_the_target_and_the_highest_of_every_row():
    target = replace(SOURCE, num_layers=2, hidden_size=6, num_attention_heads=2, num_query_groups=2, ffn_hidden_size=3)
    masks = learned(target)
    chosen = sheared_llama.ShearedLlama().select(PruningRequest(SOURCE, target, NoOptions(), masks))

    def best(values: torch.Tensor, count: int) -> list[int]:
        listed = values.tolist()
        return sorted(sorted(range(len(listed)), key=lambda i: (-listed[i], i))[:count])

    assert list(chosen.layers) == best(masks["layer"], 2)
    assert list(chosen.hidden) == best(masks["hidden"], 6)
    for place, layer in enumerate(chosen.layers):
        assert list(chosen.ffn[place]) == best(masks["ffn"][layer], 3)
        groups = best(masks["group"][layer], 2)
        assert list(chosen.heads[place]) == [g * 2 + best(masks["head"][layer, g], 1)[0] for g in groups]
        for head, z in zip(chosen.heads[place], chosen.gates.heads[place], strict=True):
            group, inside = divmod(head, 2)
            soft = [1 / (1 + math.exp(-0.8 * float(v) / T)) for v in
                    (masks["group"][layer, group], masks["head"][layer, group, inside])]  # fmt: skip
            assert z == pytest.approx(soft[0] * soft[1], rel=1e-8)
    soft = [1 / (1 + math.exp(-0.8 * float(masks["hidden"][i]) / T)) for i in chosen.hidden]
    assert list(chosen.gates.hidden) == pytest.approx(soft, rel=1e-8)
    assert len(chosen.gates.layers) == 2 and [len(z) for z in chosen.gates.ffn] == [3, 3]


def test_what_is_not_cut_stays_whole_and_has_no_factor():
    target = replace(SOURCE, ffn_hidden_size=4)
    chosen = sheared_llama.ShearedLlama().select(PruningRequest(SOURCE, target, NoOptions(), learned(target)))
    assert chosen.layers == (0, 1, 2) and chosen.hidden is None and chosen.heads is None
    assert chosen.gates.layers is None and chosen.gates.hidden is None and chosen.gates.heads is None


def test_of_equals_the_lower_index_stays_in_the_cut_and_in_the_evaluation():
    target = replace(SOURCE, hidden_size=8)
    masks = {"hidden": sheared_llama.start(*sheared_llama.kinds(SOURCE, target))}
    chosen = sheared_llama.ShearedLlama().select(PruningRequest(SOURCE, target, NoOptions(), masks))
    assert chosen.hidden == tuple(range(8)) and [tie.unit for tie in chosen.near_ties] == ["hidden"]
    z = sheared_llama.factors(masks["hidden"], 8)
    assert (z > 0).tolist() == [True] * 8 + [False] * 2
    assert float(z[0]) == pytest.approx(1 / (1 + 100 ** (-0.8 * 1.5)), rel=1e-6)


def test_rows_that_have_not_settled_are_named_with_how_far():
    (kind,) = sheared_llama.kinds(SOURCE, replace(SOURCE, num_attention_heads=3))
    settled = torch.tensor([4.6, -12.0]).expand(3, 3, 2).clone()
    assert sheared_llama.unsettled(settled, kind) == []
    settled[1, 2] = torch.tensor([4.6, 4.0])
    (row,) = sheared_llama.unsettled(settled, kind)
    assert (row.kind, row.row, row.kept, row.size, row.undecided) == ("head", (1, 2), 1, 2, 1)
    assert row.expected == pytest.approx(1.99, abs=0.02)
    assert str(row) == "layer 1, group 2, head: expects 2.0 of 2, the cut keeps 1; 1 undecided"
