"""The sparse methods on a published model's linears, SmolLM2-135M's, with the inputs that they see.

bf16 weights: four-bit values with one scale per 32, so full of ties and exact zeros. 2048 tokens give every
Hessian full rank; the first 320 of them do not.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_prune import methods
from megatron_prune.methods.base import Sparsity
from megatron_prune.methods.selection import Rows
from tests import tiny
from tests.methods import oracles
from tests.methods.test_sparse_methods import (
    assert_close_to_oracle,
    assert_equal_but_for_near_ties,
    check_result,
    factor,
    pieces,
    prune,
    square_sums,
)

SEQUENCES, TOKENS = 4, 512
ROWS = 192  # of every matrix, where the oracle is a loop in Python over rows
# name: layer. Inputs differ most between the first layer and the middle of the model.
LINEARS = {
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 15,
    "self_attn.o_proj": 15,
    "mlp.gate_proj": 0,
    "mlp.down_proj": 15,
}

# The largest Hessian takes longer than all others.
SLOW_LAST = [*list(LINEARS)[:-1], pytest.param("mlp.down_proj", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def linears(source, model) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Weight [out, in] and inputs, a [tokens, in] a sequence, of every one of LINEARS, as fp32."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(source)("\n\n".join(tiny.documents(100)), return_tensors="pt").input_ids[0]
    found = {name: model.model.layers[layer].get_submodule(name) for name, layer in LINEARS.items()}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in LINEARS}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0].clone()))
        for name, linear in found.items()
    ]
    with torch.no_grad():
        for sequence in tokens[: SEQUENCES * TOKENS].view(SEQUENCES, 1, TOKENS):
            model.model(sequence)
    for handle in handles:
        handle.remove()
    return {name: (linear.weight.data.bfloat16().float(), seen[name]) for name, linear in found.items()}


def test_weights_tie_and_hold_zeros(linears) -> None:
    for weight, given in linears.values():
        assert len(weight.abs().unique()) < weight.numel() / 20 and (weight == 0).any()
        assert len(given) == SEQUENCES and given[0].shape == (TOKENS, weight.shape[1])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("name", LINEARS)
def test_masks_without_an_update(linears, name: str, pattern: str) -> None:
    before, given = linears[name][0][:ROWS], linears[name][1]
    sparsity, rows = Sparsity.parse(0.5, pattern), Rows.all(len(before))
    weight, kept = prune("magnitude", before, None, sparsity)
    check_result(before, weight, kept)
    assert np.array_equal(kept.numpy(), oracles.magnitude(before.numpy(), Fraction("0.5"), *pieces(pattern)))

    weight, kept = methods.get_sparse("wanda").prune(before.clone(), square_sums(given), sparsity, rows)
    check_result(before, weight, kept)
    arrays = [x.numpy() for x in given]
    expected = oracles.wanda(before.numpy(), arrays, Fraction("0.5"), *pieces(pattern))
    assert_equal_but_for_near_ties(kept.numpy(), expected, oracles.wanda_scores(before.numpy(), arrays))
    if pattern == "unstructured":
        assert ((~kept).sum(1) == before.shape[1] // 2).all()


def check_sparsegpt(before: torch.Tensor, given: list[torch.Tensor], patterns: list[str], error: float) -> None:
    hessian = oracles.hessian([x.numpy() for x in given])
    lead, made = oracles.eliminated(hessian), factor(given)
    for pattern in patterns:
        sparsity, rows = Sparsity.parse(0.5, pattern), Rows.all(len(before))
        weight, kept = methods.get_sparse("sparsegpt").prune(before.clone(), made, sparsity, rows)
        check_result(before, weight, kept, changed=True)
        assert int((~kept).sum()) == before.numel() // 2
        expected, mask = oracles.sparsegpt(before.numpy(), hessian, lead, Fraction("0.5"), *pieces(pattern))
        assert_close_to_oracle(before.numpy(), weight.numpy(), kept.numpy(), expected, mask, hessian, error)


@pytest.mark.parametrize("name", SLOW_LAST)
def test_sparsegpt(linears, name: str) -> None:
    check_sparsegpt(*linears[name], ["unstructured", "2:4"], error=1e-3)


@pytest.mark.parametrize("name", SLOW_LAST)
def test_sparsegpt_where_tokens_are_fewer_than_inputs(linears, name: str) -> None:
    before, given = linears[name]
    check_sparsegpt(before, [given[0][:192], given[1][:128]], ["unstructured", "2:4"], error=1e-3)
