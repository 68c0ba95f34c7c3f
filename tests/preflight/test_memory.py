"""Preflight's arithmetic against what Megatron's model keeps while it runs, and against figures made by hand."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine.rehearsal import Stage
from megatron_prune.preflight import cost, memory
from tests.preflight import measured

LLAMA = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, kv_channels=128,
    ffn_hidden_size=14336, padded_vocab_size=128256, tied=False,
)  # fmt: skip


# Flags, and how many hidden states a token and block Megatron's local spec keeps beyond the Transformer Engine one:
# torch's RMSNorm also saves what its gain multiplies, and a norm that is no part of fc1 lies outside of "mlp".
RECOMPUTATION = {
    "none": ([], 2),
    "full": (["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"], 0),
    "mlp": (["--recompute-granularity", "selective", "--recompute-modules", "mlp"], 3),
}


@pytest.mark.parametrize("recomputed", RECOMPUTATION)
def test_what_a_block_keeps_is_what_megatron_keeps(distributed, recomputed) -> None:
    flags, more = RECOMPUTATION[recomputed]
    [(two, _)] = distributed(measured.saved_bytes, 1, 2, flags)
    [(four, args)] = distributed(measured.saved_bytes, 1, 4, flags)
    args.transformer_impl, args.attention_backend = "transformer_engine", None  # attention was fused, as there
    shape = ModelShape.from_args(vars(args))
    predicted, _ = memory.activations(args, shape, Stage(2, 0, 0, 0, chunks=(2,), shapes={}), 0, 2, 1)
    predicted += 2 * more * args.params_dtype.itemsize * shape.hidden_size * args.seq_length * args.micro_batch_size
    assert four - two == pytest.approx(predicted, rel=0.005)


def arguments(**changes: object) -> argparse.Namespace:
    """The arguments of a run on 64 GPUs that memory depends on."""
    given = dict(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=1, context_parallel_size=1, data_parallel_size=32,
        virtual_pipeline_model_parallel_size=None, sequence_parallel=True, seq_length=8192, micro_batch_size=1,
        global_batch_size=512, params_dtype=torch.bfloat16, bf16=True, fp16=False, fp8=None, fp8_param_gather=False,
        accumulate_allreduce_grads_in_fp32=True, use_precision_aware_optimizer=False, optimizer="adam",
        use_distributed_optimizer=True, optimizer_cpu_offload=False, masks=None, recompute_granularity=None,
        recompute_modules=None, recompute_method=None, recompute_num_layers=None, distribute_saved_activations=False,
        hidden_dropout=0.0, bias_swiglu_fusion=True, transformer_impl="transformer_engine", attention_backend=None,
        no_save_optim=None, save_interval=1000, save_retain_interval=None, train_iters=10_000,
    )  # fmt: skip
    return argparse.Namespace(**(given | changes))


def whole(tp: int = 1) -> Stage:
    vocabulary = 2 * 4096 * 128256 // tp
    linears = LLAMA.linear_parameters() // tp
    return Stage(32, linears, vocabulary, 65 * 4096, chunks=(32,), shapes={})


def test_weights_gradients_and_optimizer_are_megatrons_bytes_a_parameter() -> None:
    """Megatron's own estimate: 6 + 12/DP bytes a parameter with the distributed optimizer, 18 without."""
    stage = whole(2)
    sharded = memory.training(arguments(), LLAMA, [stage], 16)[0]
    assert sharded.weights + sharded.gradients + sharded.optimizer == pytest.approx(
        stage.parameters * (6 + 12 / 32), abs=8
    )
    alone = memory.training(arguments(use_distributed_optimizer=False), LLAMA, [stage], 16)[0]
    assert alone.weights + alone.gradients + alone.optimizer == 18 * stage.parameters


def test_flags_change_what_they_should() -> None:
    def of(**changes: object) -> memory.Memory:
        return memory.training(arguments(**changes), LLAMA, [whole(2)], 16)[0]

    base = of()
    assert of(masks="DIR").masks == LLAMA.linear_parameters() // 2
    assert of(accumulate_allreduce_grads_in_fp32=False).gradients == base.gradients // 2
    assert of(fp8="hybrid").weights - base.weights == LLAMA.linear_parameters()
    assert of(fp8="hybrid").activations < base.activations
    assert of(sequence_parallel=False).activations > base.activations
    low = dict.fromkeys(("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    assert of(use_precision_aware_optimizer=True, **low).optimizer == pytest.approx(base.optimizer / 2, abs=4)
    assert of(context_parallel_size=2).activations == pytest.approx(base.activations / 2, rel=0.01)


def test_first_stages_keep_more_microbatches_than_last() -> None:
    quarter = [Stage(8, 0, 0, 0, chunks=(8,), shapes={}) for _ in range(4)]
    args = arguments(pipeline_model_parallel_size=4)
    kept = [memory.activations(args, LLAMA, s, n, 4, 16)[0] for n, s in enumerate(quarter)]
    assert kept[:3] == [4 * kept[2] // 2, 3 * kept[2] // 2, kept[2]]  # 4, 3 and 2 micro-batches; the last has the norm
    few = [memory.activations(args, LLAMA, s, n, 4, 2)[0] for n, s in enumerate(quarter)]
    assert few[0] == few[2]


def test_interleaving_costs_its_penalty() -> None:
    """Megatron's formula: 1 + (p - 1)/(p·v) times what a pipeline without virtual stages keeps."""
    args = arguments(pipeline_model_parallel_size=4)
    plain = memory.activations(args, LLAMA, Stage(8, 0, 0, 0, chunks=(8,), shapes={}), 0, 4, 64)[0]
    virtual = memory.activations(args, LLAMA, Stage(8, 0, 0, 0, chunks=(4, 4), shapes={}), 0, 4, 64)[0]
    assert virtual / plain == pytest.approx(1 + 3 / 8)


def test_even_splits_count_the_output_layer() -> None:
    shape = dataclasses.replace(LLAMA, num_layers=12)
    split = cost.even_split(shape, 4, 8192)
    assert sum(split) == 12 and split[-1] < split[0]
    stages = [Stage(n, 0, 0, 0, chunks=(n,), shapes={}) for n in split]
    naive = [Stage(3, 0, 0, 0, chunks=(3,), shapes={}) for _ in range(4)]
    assert max(cost.work(shape, stages, 8192)) < max(cost.work(shape, naive, 8192))
    assert sum(cost.work(shape, stages, 8192)) * 8192 == pytest.approx(shape.forward_flops(8192))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, 10), ({"save_interval": 10_000}, 1), ({"save_retain_interval": 5000}, 4), ({"save_interval": None}, 1)],
)
def test_saves_that_are_kept(changes, kept) -> None:
    assert cost.saves_kept(arguments(**changes), 10_000) == kept


def test_a_save_takes_fourteen_bytes_a_parameter() -> None:
    assert cost.checkpoint_bytes(arguments(), LLAMA) == 14 * LLAMA.parameters()
    assert cost.checkpoint_bytes(arguments(no_save_optim=True), LLAMA) == 2 * LLAMA.parameters()
