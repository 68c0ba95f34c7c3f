"""The sparse methods on a published model's linears, SmolLM2-135M's, with the inputs that they see.

bf16 weights: four-bit values times a scale each 32, so full of ties and exact zeros. 384 tokens leave every
Hessian rank deficient.
"""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune import methods
from megatron_prune.methods import Sparsity
from megatron_prune.sparse.rows import Rows
from tests import tiny
from tests.sparse import oracles
from tests.sparse.test_methods import (
    assert_close_to_oracle,
    assert_equal_but_for_near_ties,
    check_result,
    factor,
    pieces,
    square_sums,
)

PREPARE = Path(__file__).parents[2] / "examples" / "smollm2_135m" / "prepare.py"
SEQUENCES, TOKENS = 3, 128
# name: layer. What a matrix reads differs most between the first layer and the middle of the model.
LINEARS = {
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 15,
    "self_attn.o_proj": 15,
    "mlp.gate_proj": 0,
    "mlp.down_proj": 15,
}


@pytest.fixture(scope="module")
def linears(tmp_path_factory) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Weight [out, in] and inputs, a [tokens, in] a sequence, of every one of LINEARS, as fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.spec_from_file_location("prepare", PREPARE)
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    prepare.dequantise(prepare.packaged_gguf(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[: max(LINEARS.values()) + 1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("\n\n".join(tiny.documents(20)), return_tensors="pt").input_ids[0]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in LINEARS}
    for name, layer in LINEARS.items():
        linear = model.model.layers[layer].get_submodule(name)
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0].clone()))
    with torch.no_grad():
        for sequence in tokens[: SEQUENCES * TOKENS].view(SEQUENCES, 1, TOKENS):
            model.model(sequence)
    return {
        name: (model.model.layers[layer].get_submodule(name).weight.data.bfloat16().float(), seen[name])
        for name, layer in LINEARS.items()
    }


def test_weights_tie_and_hold_zeros(linears) -> None:
    for weight, given in linears.values():
        assert len(weight.abs().unique()) < weight.numel() / 20 and (weight == 0).any()
        assert len(given) == SEQUENCES and given[0].shape == (TOKENS, weight.shape[1])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("name", LINEARS)
def test_masks_without_an_update(linears, name: str, pattern: str) -> None:
    before, given = linears[name]
    sparsity, rows = Sparsity.parse(0.5, pattern), Rows.all(len(before))
    weight, kept = methods.get_sparse("magnitude").prune(before.clone(), None, sparsity, rows)
    check_result(before, weight, kept)
    assert np.array_equal(kept.numpy(), oracles.magnitude(before.numpy(), Fraction("0.5"), *pieces(pattern)))

    weight, kept = methods.get_sparse("wanda").prune(before.clone(), square_sums(given), sparsity, rows)
    check_result(before, weight, kept)
    arrays = [x.numpy() for x in given]
    expected = oracles.wanda(before.numpy(), arrays, Fraction("0.5"), *pieces(pattern))
    assert_equal_but_for_near_ties(kept.numpy(), expected, oracles.wanda_scores(before.numpy(), arrays))
    if pattern == "unstructured":
        assert ((~kept).sum(1) == before.shape[1] // 2).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", LINEARS)
def test_sparsegpt(linears, name: str, pattern: str) -> None:
    before, given = linears[name]
    sparsity, rows = Sparsity.parse(0.5, pattern), Rows.all(len(before))
    weight, kept = methods.get_sparse("sparsegpt").prune(before.clone(), factor(given), sparsity, rows)
    check_result(before, weight, kept, changed=True)
    assert int((~kept).sum()) == before.numel() // 2
    hessian = oracles.hessian([x.numpy() for x in given])
    expected, mask = oracles.sparsegpt(before.numpy(), hessian, Fraction("0.5"), *pieces(pattern))
    assert_close_to_oracle(before.numpy(), weight.numpy(), kept.numpy(), expected, mask, hessian)
