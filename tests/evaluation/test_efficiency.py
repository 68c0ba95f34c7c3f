"""Costs by hand, and times by a clock that the test sets."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_prune import artifacts
from megatron_prune.__main__ import main
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.evaluation import efficiency
from megatron_prune.methods.selection import lowest_in_groups
from tests.tiny import PADDING, VOCABULARY

SHAPE = ModelShape(
    num_layers=3, hidden_size=10, num_attention_heads=4, num_query_groups=2, kv_channels=6, ffn_hidden_size=14,
    padded_vocab_size=50, tied=False,
)  # fmt: skip
# Written out: query, key and value, then the projection, gate and up, down.
LINEARS = 3 * (10 * (4 + 2 + 2) * 6 + 4 * 6 * 10 + 10 * 2 * 14 + 14 * 10)
NORMS = 3 * 2 * 10 + 10


def test_costs_are_those_of_a_calculation_by_hand() -> None:
    found = efficiency.cost(SHAPE, 2, removed=400, packable=800)
    attention = 3 * 2 * (2 * 2048 * 2048 * 24)  # scores, and their products with the values
    output = 2 * 2048 * 10 * 50
    assert found.parameters == LINEARS + NORMS + 2 * 50 * 10
    assert found.flops == 2 * 2048 * LINEARS + attention + output
    assert found.flops_kept == found.flops - 2 * 2048 * 400
    assert found.weight_bytes == 2 * found.parameters
    # Four bf16 weights are two of two bytes and two indices of two bits: 4.5 bytes in place of 8.
    assert found.weight_bytes_packed == 2 * found.parameters - 800 // 4 * (8 - 4.5)
    assert found.cache_bytes == 3 * 2 * (2 * 6) * 2
    assert efficiency.cost(SHAPE, 2).weight_bytes_packed is None


@pytest.fixture(scope="module")
def sparse(tiny_parent, job, tmp_path_factory):
    """The tiny parent at 2:4, its first layer left dense."""
    made = tmp_path_factory.mktemp("sparse") / "checkpoint"
    words = ["sparsify", "--load", tiny_parent, "--save", made, "--method", "magnitude", "--pattern", "2:4"]
    job([*words, "--layers", "1-3"]).ok()
    return made


def test_checkpoints_are_compared(tiny_parent, sparse, tmp_path, capsys) -> None:
    output = tmp_path / "efficiency.json"
    words = ["benchmark", str(tiny_parent), str(sparse), "--output", str(output)]
    assert main([*words, "--batch", "2", "--prompt", "9", "--new", "3", "--repeats", "2", "--warmup", "0"]) == 0
    printed = capsys.readouterr().out
    dense, pruned = artifacts.read_json(output)["models"]
    shape = open_checkpoint(tiny_parent).shape
    removed = 3 * shape.linear_parameters() // 4 // 2
    assert dense["parameters"] == pruned["parameters"] == shape.parameters()
    assert dense["parameters_nonzero"] == shape.parameters() - 2 * PADDING * shape.hidden_size
    assert pruned["parameters_nonzero"] == dense["parameters_nonzero"] - removed
    assert (dense["flops_kept"], dense["weight_bytes_packed"]) == (dense["flops"], None)
    assert pruned["flops_kept"] == dense["flops"] - 2 * 2048 * removed
    assert pruned["weight_bytes"] == dense["weight_bytes"] == 4 * shape.parameters()
    assert pruned["weight_bytes_packed"] == pruned["weight_bytes"] - removed * 4 + 2 * removed / 8
    for model in (dense, pruned):
        for phase in ("prefill", "decode"):
            one = model["measured"]["dense"][phase]
            assert 0 < one["least"] <= one["seconds"] <= one["most"]
        assert model["measured"]["dense"]["prefill"]["tokens_per_second"] > 0
    assert list(dense["measured"]) == ["dense"]
    if not torch.cuda.is_available():
        for kind in ("2:4", "fp8 2:4"):
            assert pruned["measured"][kind]["why"] == "theoretical, not measured: there is no GPU"
        assert printed.count("theoretical, not measured: there is no GPU") == 2
    assert f"{dense['parameters_nonzero']:,}" in printed and f"wrote {output}" in printed


def test_static_numbers_need_no_run(tiny_parent, monkeypatch) -> None:
    from megatron_prune.api.checkpoints import benchmark

    monkeypatch.setattr(efficiency, "measure", None)
    found = benchmark(tiny_parent, static=True)
    assert found["workload"] is None and "measured" not in found["models"][0]
    json.dumps(found)


class Clock:
    """A clock that stands still, and a model that advances it: a second per token, and 100 for the first repeat."""

    def __init__(self, batch: int):
        self.now, self.calls, self.repeats = 0.0, [], 0
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self._batch = batch

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, tokens, past_key_values=None, **_):
        self.calls.append(tuple(tokens.shape))
        self.repeats += past_key_values is None
        self.now += tokens.shape[1] + (100 if self.repeats == 1 else self.repeats)
        return SimpleNamespace(logits=torch.zeros(self._batch, 1, VOCABULARY), past_key_values=[])


def test_times_are_medians_of_the_repeats_after_the_warm_up(monkeypatch) -> None:
    model = Clock(3)
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: model.now)
    found = efficiency.time_model(model, efficiency.Workload(batch=3, prompt=7, new=2, repeats=3, warmup=1))
    assert model.calls == [(3, 7), (3, 1), (3, 1)] * 4
    # Repeats 2, 3 and 4 take as many seconds more per call.
    assert found["prefill"] == {"seconds": 10.0, "least": 9.0, "most": 11.0, "tokens_per_second": 3 * 7 / 10}
    assert found["decode"] == {"seconds": 4.0, "least": 3.0, "most": 5.0, "tokens_per_second": 3 / 4}


def test_a_matrix_is_packable_if_no_four_inputs_hold_three() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4], [0, 0, 0, 0, 1, 0, 0, 0]])
    assert efficiency.is_packable(weight)
    weight[1, 4:7] = 1.0
    assert not efficiency.is_packable(weight)
    assert not efficiency.is_packable(torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_selected_as_2_4_is_what_torch_packs(dtype: torch.dtype) -> None:
    """Its conversion for CUTLASS, which is all of it that runs on a CPU; in fp32 it is 1:2, and drops the rest."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)).to(dtype)
    weight[lowest_in_groups(weight.float().abs(), 2, 4)] = 0.0
    packed, indices = sparse_semi_structured_from_dense_cutlass(weight)
    assert efficiency.is_packable(weight) and packed.shape == (64, 64)
    whole = torch.equal(sparse_semi_structured_to_dense_cutlass(packed, indices), weight)
    assert whole == (dtype != torch.float32)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False, dtype=dtype))
    model[0].weight.data = weight
    if not whole:
        with pytest.raises(ValueError, match="one of every two"):
            efficiency._pack(model, efficiency.SPARSE)


@pytest.mark.parametrize("words", [["--batch", "0"], ["--repeats", "0"], ["--warmup", "-1"]])
def test_numbers_that_cannot_be_are_refused(words, tiny_parent, capsys) -> None:
    assert main(["benchmark", str(tiny_parent), *words]) == 2
    assert f"{words[0]}: expected at least {1 if words[0] != '--warmup' else 0}" in capsys.readouterr().err
