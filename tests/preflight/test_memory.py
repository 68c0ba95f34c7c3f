"""Memory computed by preflight against the measured memory of Megatron's model, and against figures made by hand."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.preflight import checks, cost, files, host, memory
from megatron_prune.preflight.cost import Cluster
from megatron_prune.preflight.dry_run import PipelineStage
from tests.preflight import measured

LLAMA = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, kv_channels=128,
    ffn_hidden_size=14336, padded_vocab_size=128256, tied=False,
)  # fmt: skip


# Flags, and how many hidden states a token and block Megatron's local spec keeps beyond the Transformer Engine one:
# torch's RMSNorm also saves the input of its gain, and a norm that is not part of fc1 is outside of "mlp".
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
    predicted, _ = memory.activations(args, shape, PipelineStage(2, 0, 0, 0, chunks=(2,), shapes={}), 0, 2, 1)
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
        gradient_accumulation_fusion=True, save="run", num_workers=2, ckpt_fully_parallel_save=True,
        dist_ckpt_optim_fully_reshardable=False, optimizer_offload_fraction=1.0, stream_permutation_seed=None,
    )  # fmt: skip
    return argparse.Namespace(**(given | changes))


def whole(tp: int = 1) -> PipelineStage:
    vocabulary = 2 * 4096 * 128256 // tp
    linears = LLAMA.linear_parameters() // tp
    return PipelineStage(32, linears, vocabulary, 65 * 4096, chunks=(32,), shapes={})


def test_weights_gradients_and_optimizer_are_megatrons_bytes_a_parameter() -> None:
    """Megatron's own estimate: 6 + 12/DP bytes per parameter with the distributed optimizer, 18 without."""
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
    quarter = [PipelineStage(8, 0, 0, 0, chunks=(8,), shapes={}) for _ in range(4)]
    args = arguments(pipeline_model_parallel_size=4)
    kept = [memory.activations(args, LLAMA, s, n, 4, 16)[0] for n, s in enumerate(quarter)]
    assert kept[:3] == [4 * kept[2] // 2, 3 * kept[2] // 2, kept[2]]  # 4, 3 and 2 micro-batches; the last has the norm
    few = [memory.activations(args, LLAMA, s, n, 4, 2)[0] for n, s in enumerate(quarter)]
    assert few[0] == few[2]


def chunked(*chunks: int) -> PipelineStage:
    return PipelineStage(sum(chunks), 0, 0, 0, chunks=chunks, shapes={})


def blocks_kept(stage: PipelineStage, number: int, stages: int, microbatches: int, **changes: object) -> float:
    """For how many blocks and micro-batches a stage keeps activations; those outside of blocks are subtracted."""
    args = arguments(pipeline_model_parallel_size=stages, **changes)
    of = [
        memory.activations(args, LLAMA, chunked(*(n * count for count in stage.chunks)), number, stages, microbatches)[
            0
        ]
        for n in (1, 2)
    ]
    one = [memory.activations(args, LLAMA, chunked(n), 0, 1, 1)[0] for n in (1, 2)]
    return (of[1] - of[0]) / (one[1] - one[0])


def test_interleaving_costs_its_penalty() -> None:
    """The published factor (2205.05198): 1 + (p - 1)/(p·v) times what a pipeline without virtual stages keeps."""
    for p, v in ((4, 2), (4, 4), (8, 2)):
        layers = 8
        plain = blocks_kept(chunked(layers), 0, p, 64)
        virtual = blocks_kept(chunked(*[layers // v] * v), 0, p, 64)
        assert plain == pytest.approx(p * layers)
        assert virtual / plain == pytest.approx(1 + (p - 1) / (p * v))


@pytest.mark.parametrize("group", [None, 6])
@pytest.mark.parametrize("microbatches", [2, 8, 23])
@pytest.mark.parametrize("chunks", [(2, 2), (3, 2, 1), (1, 2, 4)])
def test_virtual_stages_hold_what_megatrons_schedule_leaves_open(chunks, microbatches, group) -> None:
    """Its own table and warm-up, simulated with the set of open passes."""
    from megatron.core.pipeline_parallel import schedules

    p, v = 4, len(chunks)
    for rank in range(p):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: p, rank=lambda rank=rank: rank),
            virtual_pipeline_model_parallel_size=v,
        )
        table = schedules.get_schedule_table(microbatches, v, group or p)
        _, _, warm, _ = schedules.get_pp_rank_microbatches(microbatches, v, group or p, p2p_communicator=communicator)
        ahead, back = iter(table), iter([(i, v - 1 - chunk) for i, chunk in table])
        unfinished = set()
        most = 0
        for place, passed in enumerate(ahead):
            unfinished.add(passed)
            most = max(most, sum(chunks[chunk] for _, chunk in unfinished))
            if place >= warm:
                unfinished.remove(next(back))
        for passed in back:
            unfinished.remove(passed)
        assert not unfinished
        kept = blocks_kept(chunked(*chunks), rank, p, microbatches, microbatch_group_size_per_vp_stage=group)
        assert kept == pytest.approx(most)


def test_the_loss_is_gone_when_the_last_blocks_turn_comes() -> None:
    """Logits in bf16 and a softmax in fp32 over 128,256 tokens are more than a block's gradients: not both at once."""
    _, once = memory.activations(arguments(), LLAMA, chunked(32), 0, 1, 16)
    assert once == 8192 * (2 + 4) * 128256 // 2
    _, of_block = memory.activations(
        arguments(), dataclasses.replace(LLAMA, padded_vocab_size=128), chunked(32), 0, 1, 16
    )
    assert 0 < of_block < once / 4


def test_a_distilled_loss_keeps_no_softmax() -> None:
    """Its gradient takes the memory of the logits; small parts of them are in fp32."""
    _, once = memory.activations(arguments(objective="distill"), LLAMA, chunked(32), 0, 1, 16)
    assert once == 8192 * 2 * 128256 // 2


def test_a_fusion_that_is_missing_costs_a_weights_gradient() -> None:
    """Of the output layer on the last stage; of gate and up on the others."""
    for number, elements in ((0, 2 * 14336 * 4096 // 2), (1, 128256 * 4096 // 2)):
        more, less = (
            memory.activations(arguments(gradient_accumulation_fusion=fused), LLAMA, chunked(4), number, 2, 8)[1]
            for fused in (False, True)
        )
        assert more - less == 2 * elements


@pytest.mark.parametrize(("method", "ffn"), [("sparsegpt", 2700), ("sparsegpt", 768), ("wanda", 3840)])
def test_what_pruning_a_block_takes_is_what_a_process_grows_by(distributed, method, ffn) -> None:
    """Counted by the kernel while a block is pruned: 2,700 inputs of fc2 decide, or the rows of gate and up."""
    [(grown, args)] = distributed(measured.pruned_bytes, 1, method, 768, ffn)
    assert memory.pruning(args, ModelShape.from_args(vars(args))) == pytest.approx(grown, rel=0.15)


@pytest.mark.parametrize("flags", [{"gradients": True}, {"method": "llm-pruner"}])
def test_a_calibration_with_gradients_keeps_activations_and_two_sums(flags: dict[str, Any]) -> None:
    """Of calibrate, and of prune: activations as a training step has them, and 8 bytes per weight of the linears."""
    args, stage = arguments(**flags), whole(2)
    (found,) = memory.forward(args, LLAMA, [stage])
    kept, once = memory.activations(args, LLAMA, stage, 0, 1, 1)
    assert (found.activations, found.working, found.optimizer) == (kept, once, 0)
    assert found.gradients == 8 * stage.linears and stage.linears > 3e9
    assert memory.forward(arguments(), LLAMA, [stage])[0].total < found.total


def test_a_nodes_memory_by_hand() -> None:
    """Llama-3.1-8B on 64 GPUs at TP 2: 4.02B parameters per rank, 32 replicas, 8 ranks per node."""
    stage = whole(2)
    of = host.node(arguments(), LLAMA, [stage], 8, trains=True)
    assert of.processes == 8 * 4e9 and of.workers == 4 * 2 * 0.5e9
    assert of.saving == pytest.approx(8 * 14 * stage.parameters / 32, rel=1e-6)
    assert of.gathering == of.offloaded == of.order == of.windows == 0
    gathers = host.node(arguments(dist_ckpt_optim_fully_reshardable=True), LLAMA, [stage], 8, trains=True)
    assert gathers.gathering == 8 * 12 * stage.parameters > 385e9  # whatever the number of replicas
    half = host.node(arguments(optimizer_cpu_offload=True, optimizer_offload_fraction=0.5), LLAMA, [stage], 8, True)
    assert half.offloaded == pytest.approx(8 * 16 * stage.parameters / 32 / 2, rel=1e-6)
    alone = host.node(arguments(ckpt_fully_parallel_save=False, save=None), LLAMA, [stage], 8, True)
    assert alone.saving == 0
    permuted = host.node(arguments(stream_permutation_seed=1), LLAMA, [stage], 8, True)
    assert permuted.order == 8 * 4 * 10_000 * 512


def test_windows_of_sparsify_are_on_the_host() -> None:
    args = arguments(method="wanda", modules="fc1", calibration_sequences=128, data_parallel_size=4, save="x")
    stage = whole(2)
    of = host.node(args, LLAMA, [stage], 8, trains=False)
    states = 32 * 8192 // 2 * 4096 * 2  # 32 windows per replica, shared by two ranks, in bf16
    assert of.windows == 8 * (states + stage.linears) and of.saving == 0


@pytest.mark.parametrize(
    ("from_full", "verdict"),
    [(-9e9, "yes"), (-8.1e9, "look"), (-3e6, "look"), (3e6, "look"), (8.1e9, "look"), (9e9, "no")],
)
def test_within_a_tenth_of_full_an_estimate_decides_nothing(from_full, verdict) -> None:
    cluster = Cluster(64)
    rehearsal: Any = SimpleNamespace(
        args=arguments(use_megatron_fsdp=False, use_torch_fsdp2=False), shape=LLAMA, stages=[whole(2)], microbatches=16
    )
    needs = memory.training(rehearsal.args, LLAMA, [whole(2)], 16)[0].total
    reserve = int(cluster.gpu.memory - needs + from_full)
    question: Any = SimpleNamespace(cluster=cluster, trains=True, reserve=reserve)
    found = checks.memory_of_ranks(question, rehearsal)
    assert found.verdict == verdict
    if verdict == "look":
        side = "above" if from_full > 0 else "below"
        assert f"GB {side} full" in found.reason and "three steps of this command would" in found.reason


def test_even_splits_count_the_output_layer() -> None:
    shape = dataclasses.replace(LLAMA, num_layers=12)
    split = cost.even_split(shape, 4, 8192)
    assert sum(split) == 12 and split[-1] < split[0]
    stages = [PipelineStage(n, 0, 0, 0, chunks=(n,), shapes={}) for n in split]
    naive = [PipelineStage(3, 0, 0, 0, chunks=(3,), shapes={}) for _ in range(4)]
    assert max(cost.work(shape, stages, 8192)) < max(cost.work(shape, naive, 8192))
    assert sum(cost.work(shape, stages, 8192)) * 8192 == pytest.approx(shape.forward_flops(8192))


def test_stages_of_layers_that_differ() -> None:
    """Work and activations are those of the layers that a stage holds, virtual stages included."""
    full = LLAMA.by_layer()[0]
    thin = dataclasses.replace(full, ffn_hidden_size=full.ffn_hidden_size // 2)
    bare = dataclasses.replace(full, num_attention_heads=0, num_query_groups=0)
    shape = dataclasses.replace(LLAMA, num_layers=4).with_layers([full, thin, bare, thin])
    stages = [PipelineStage(2, 0, 0, 0, chunks=(1, 1), shapes={}) for _ in range(2)]
    assert cost.layers_of(stages) == [[range(0, 1), range(2, 3)], [range(1, 2), range(3, 4)]]
    work = cost.work(shape, stages, 8192)
    assert sum(work) * 8192 == pytest.approx(shape.forward_flops(8192))
    mlp, attention = 2 * 3 * 4096 * 14336, 2 * 4096 * (2 * 4096 + 2 * 1024) + 4 * 8192 * 4096
    assert work[0] == pytest.approx(2 * mlp + attention)
    args = arguments()
    (uniform, _), (varied, _) = (
        memory.activations(args, one, stages[1], 1, 2, 1, cost.layers_of(stages)[1])
        for one in (dataclasses.replace(LLAMA, num_layers=4), shape)
    )
    # Half the FFN of two layers, in bf16 over TP 2: what enters the activation function, and the input of fc2.
    assert uniform - varied == 2 * 8192 * 2 * 3 * (14336 // 2) // 2


@pytest.mark.parametrize(("groups", "verdict"), [(8, "yes"), (1, "yes"), (2, "yes"), (3, "no")])
def test_ranks_may_share_a_query_group(groups: int, verdict: str) -> None:
    """TP 2 or 4: Megatron takes groups that are a multiple of the ranks, or a divisor."""
    shape = dataclasses.replace(LLAMA, num_attention_heads=24, num_query_groups=groups)
    ranks = 4 if groups == 2 else 2
    [found] = checks.dimensions(arguments(tensor_model_parallel_size=ranks), shape)
    assert found.verdict == verdict
    if verdict == "yes":
        assert found.facts["gemms"]["qkv"][2] == (24 + 2 * groups) * 128 // ranks


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, 10), ({"save_interval": 10_000}, 1), ({"save_retain_interval": 5000}, 4), ({"save_interval": None}, 1)],
)
def test_saves_that_are_kept(changes, kept) -> None:
    assert cost.saves_kept(arguments(**changes), 10_000) == kept


def test_a_save_takes_fourteen_bytes_a_parameter() -> None:
    assert cost.checkpoint_bytes(arguments(), LLAMA) == 14 * LLAMA.parameters()
    assert cost.checkpoint_bytes(arguments(no_save_optim=True), LLAMA) == 2 * LLAMA.parameters()


@pytest.mark.parametrize(("tensor", "layers"), [(1, 32), (8, 4)])
def test_learned_masks_are_counted_on_the_rank_that_has_them(tensor: int, layers: int) -> None:
    """Five fp32 numbers for each of the rank's FFN channels and all 4096 hidden channels, three more for each of two
    micro-batches; nothing for other verbs."""
    asked = verbs.LearnMasksSettings(target_hidden_size=3072, target_ffn_hidden_size=9216)
    args = argparse.Namespace(**asked.to_json(), tensor_model_parallel_size=tensor)
    stage = PipelineStage(layers, 0, 0, 0, (layers,), {})
    assert memory.learned(args, LLAMA, stage, 2) == 11 * 4 * (layers * 14336 // tensor + 4096)
    assert memory.learned(argparse.Namespace(**verbs.PretrainSettings().to_json()), LLAMA, stage, 2) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_is_its_weights_a_block_its_logits_and_hidden_states(tied: bool) -> None:
    """By hand: LLAMA at TP 2 in bf16, sequences of 8192; all of it on one stage, or over four."""
    shape, args = dataclasses.replace(LLAMA, tied=tied), arguments()
    block = 2 * 8192 * memory._blocks(args, shape)[0].full / 2
    logits = 8192 * 2 * 128256 // 2
    norms = 65 * 4096  # on every rank
    split = (shape.parameters() - norms) // 2
    [one] = memory.teacher(args, shape, 1, 16)
    assert one == 2 * (split + norms) + block + logits
    four = memory.teacher(args, shape, 4, 16)
    hidden = 16 * 8192 * 2 * 4096 // 2  # of 16 micro-batches, divided by sequence parallelism
    copy = 2 * 128256 * 4096 // 2 if tied else 0
    assert sum(four) == one + 3 * block + hidden + copy
    assert four[1] == four[2] < four[0] < four[3]
    stage = whole(2)
    with_teacher, without = (memory.training(args, LLAMA, [stage], 16, parent)[0] for parent in (shape, None))
    assert with_teacher.total - without.total == one and without.teacher == 0


@pytest.mark.parametrize("cache", [None, "CACHE"])
def test_a_teacher_runs_unless_its_cache_is_read(tiny_parent: Path, cache: str | None) -> None:
    """With a cache, --teacher is only compared with it: no memory, no time, no demands on the layout."""
    args = argparse.Namespace(
        load=None, save="save", pretrained_checkpoint=None, masks=None, teacher=str(tiny_parent), teacher_cache=cache,
        pipeline_model_parallel_size=3,
    )  # fmt: skip
    question: Any = SimpleNamespace(absent={})
    rehearsal: Any = SimpleNamespace(args=args)
    found = [(one.check, one.verdict) for one in files.start(question, rehearsal)]
    assert found == [("start", "yes"), *([] if cache else [("teacher", "no")])]
    assert checks.teacher_shape(args) == (None if cache else open_checkpoint(tiny_parent).shape)


def test_a_teachers_forward_pass_takes_a_third_of_training_it() -> None:
    cluster = Cluster(64)
    alone, taught = (cost.time(arguments(), LLAMA, cluster, 0.4, parent) for parent in (None, LLAMA))
    assert taught.flops / alone.flops == pytest.approx(4 / 3)
    assert taught.gpu_hours / alone.gpu_hours == pytest.approx(4 / 3)
