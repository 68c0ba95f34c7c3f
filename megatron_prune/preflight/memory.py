"""Memory per rank and pipeline stage, calculated from what Megatron built and from what it keeps.

Weights, gradients and optimizer states are exact for the data types that the flags choose. Activations are the tensors
that each module saves for its backward pass (Korthikanti et al., 2205.05198, for Megatron's blocks; here with grouped
queries, gated MLPs, flash attention and FP8), times the micro-batches that the schedule keeps in flight. The memory of
the CUDA context, NCCL, workspaces and fragmentation is not known in advance: ``reserve`` is set aside for it.

``MARGIN`` is the distance from full at which an estimate decides, in both directions. It covers what is unknown before
a run: the reserve is a guess (a context and NCCL's buffers take 2 to 6 GB; an allocator's holes some percent of what it
holds), and an attention kernel may keep q, k and v as views of one tensor, which holds another 2·(q + kv) bytes per
token and block (2.7 GB for Llama-3.1-8B at TP 1). None of it was measured on a GPU.

Sizes are bytes. T is a micro-batch's tokens per rank (before sequence parallelism), t the tensor-parallel size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.methods.options import READ_GRADIENTS, NoOptions
from megatron_prune.methods.sheared_llama import kinds
from megatron_prune.preflight import cost
from megatron_prune.preflight.dry_run import PipelineStage
from megatron_prune.structured import target as targets
from megatron_prune.training.mask_shards import MaskShards

FP32, FP64 = 4, 8
MARGIN = 0.1  # of a GPU's memory: 8.6 GB of an H100's


@dataclass(frozen=True)
class Memory:
    """Bytes per rank of one stage."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    masks: int = 0
    activations: int = 0  # kept from forward to backward, of all micro-batches in flight
    working: int = 0  # temporary tensors of one block's passes or of the loss
    pruning: int = 0  # the statistics of a pruning method
    teacher: int = 0  # an online teacher: weights, a block's working tensors, what is kept of its outputs

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def training(
    args: argparse.Namespace,
    shape: ModelShape,
    stages: Sequence[PipelineStage],
    microbatches: int,
    parent: ModelShape | None = None,
) -> list[Memory]:
    """Memory of a training step, per stage; ``parent``: the shape of the online teacher, if there is one."""
    found = []
    placed = cost.layers_of(stages)
    taught = [0] * len(stages) if parent is None else teacher(args, parent, len(stages), microbatches)
    for number, stage in enumerate(stages):
        kept, once = activations(args, shape, stage, number, len(stages), microbatches, placed[number])
        found.append(
            Memory(
                weights=_weights(args, stage),
                gradients=stage.parameters
                * (FP32 if args.accumulate_allreduce_grads_in_fp32 else args.params_dtype.itemsize),
                optimizer=_optimizer(args, stage),
                # A byte per weight (training/zeros.py), or numbers that are learned.
                masks=(stage.linears if getattr(args, "masks", None) else 0)
                + learned(args, shape, stage, _most_flying(args, stage, number, len(stages), microbatches)),
                activations=kept,
                working=once,
                teacher=taught[number],
            )
        )
    return found


def teacher(args: argparse.Namespace, shape: ModelShape, stages: int, microbatches: int) -> list[int]:
    """Bytes per rank of each stage that an online teacher takes (``training/teacher.py``).

    Its weights in the model's type, what one of its blocks computes, on the last stage its logits for the micro-batch
    whose loss is being computed, and on several stages the final hidden states of all micro-batches of a step.
    """
    t, e = args.tensor_model_parallel_size, args.params_dtype.itemsize
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    elements = [0] * stages
    for weight in weights(shape):
        at = 0 if weight.name.startswith("embedding.") else stages - 1
        if weight.layer is not None:
            at = weight.layer * stages // shape.num_layers
        here = weight.numel // (1 if weight.tp_axis is None else t)
        elements[at] += here
        if shape.tied and stages > 1 and weight.name == "embedding.word_embeddings.weight":
            elements[-1] += here
    largest = max(block.full for block in _blocks(args, shape))
    found = [e * each + int(tokens * largest) for each in elements]
    found[-1] += tokens * e * shape.padded_vocab_size // t
    if stages > 1:
        found[-1] += microbatches * tokens * e * shape.hidden_size // (t if args.sequence_parallel else 1)
    return found


def learned(args: argparse.Namespace, shape: ModelShape, stage: PipelineStage, flying: int) -> int:
    """Bytes of the masks that ``learn-masks`` learns on a rank: log α, its gradient, two moments, and a copy of the
    gradient while ranks add them up; for each micro-batch that is ``flying``, factor, slope and gradient."""
    if not hasattr(args, "mask_lr"):
        return 0
    asked = verbs.TargetSettings(**{flag.name: getattr(args, flag.name) for flag in verbs.TargetSettings.flags()})
    target = targets.from_settings(asked).choose(shape, methods.get("sheared-llama"), NoOptions())
    shards = MaskShards(kinds(shape, target), range(stage.layers), 0, args.tensor_model_parallel_size)
    return (5 + 3 * flying) * FP32 * sum(shards.count(kind) for kind in shards.kinds)


def _most_flying(args: argparse.Namespace, stage: PipelineStage, number: int, stages: int, microbatches: int) -> int:
    """Micro-batches at most between their forward and backward pass, of all virtual stages."""
    return max(sum(held) for held in _in_flight(args, stage, number, stages, microbatches))


def forward(args: argparse.Namespace, shape: ModelShape, stages: Sequence[PipelineStage]) -> list[Memory]:
    """Memory per stage of the verbs that only run the model, including a sparse method's statistics and solver, and two
    sums per weight where gradients are read (``calibration/gradients.py``)."""
    tokens = args.seq_length * args.micro_batch_size
    pruned = pruning(args, shape)
    found = []
    for number, stage in enumerate(stages):
        if getattr(args, "gradients", False) or getattr(args, "method", None) in READ_GRADIENTS:
            kept, once = activations(args, shape, stage, number, len(stages), 4 * len(stages))
            sums = 2 * FP32 * stage.linears
            found.append(Memory(weights=_weights(args, stage), gradients=sums, activations=kept, working=once))
            continue
        last = number == len(stages) - 1
        working = tokens * max(block.saved for block in _blocks(args, shape))
        working += tokens * _loss(args, shape) if last else 0
        found.append(Memory(weights=_weights(args, stage), working=int(working), pruning=pruned))
    return found


def pruning(args: argparse.Namespace, shape: ModelShape) -> int:
    """Peak bytes for pruning one block, in addition to its weights (``sparse/block.py``).

    Counts the statistics of all its linears, and masks. Also, for one linear at a time, an fp32 copy of this rank's
    rows, and the larger of two peaks: factoring its Hessian, or the factor, the sum in fp32 and one matrix's buffers
    (weights before and after, and what choosing in Wanda or measuring in SparseGPT needs per weight).
    """
    name = getattr(args, "method", None)
    if name not in methods.sparse_names():
        return 0
    from megatron_prune.methods.sparsegpt import PEAK

    t, h, f = args.tensor_model_parallel_size, shape.hidden_size, shape.ffn_hidden_size
    q, kv = shape.kv_channels * shape.num_attention_heads, shape.kv_channels * shape.num_query_groups
    linears = {  # rows and inputs of a rank's share, and rows of its largest matrix
        "qkv": ((q + 2 * kv) // t, h, q // t),
        "proj": (h // t, q, h // t),
        "fc1": (f * (2 if shape.gated else 1) // t, h, f // t),
        "fc2": (h // t, f, h // t),
    }
    chosen = [linears[module] for module in (args.modules.split(",") if args.modules else linears)]
    squares = methods.get_sparse(name).statistic == "hessian"
    held = sum(rows * inputs + (FP64 * inputs**2 if squares else 0) for rows, inputs, _ in chosen)
    once = 0.0
    for rows, inputs, largest in chosen:
        square = FP64 * inputs**2 if squares else 0
        solving = square + (21 if squares else 24) * largest * inputs
        once = max(once, FP32 * rows * inputs + max((PEAK - 1) * square, solving))
    return int(held + once)


def _weights(args: argparse.Namespace, stage: PipelineStage) -> int:
    element: int = args.params_dtype.itemsize
    if not args.fp8:
        return stage.parameters * element
    # TE keeps two FP8 copies of a linear's weight, one per direction; with param gather there are no others.
    linears = stage.linears * (2 if args.fp8_param_gather else element + 2)
    return linears + (stage.parameters - stage.linears) * element


def _optimizer(args: argparse.Namespace, stage: PipelineStage) -> int:
    """Adam's two moments and the fp32 master, or SGD's momentum; sharded by the distributed optimizer."""
    precise = args.use_precision_aware_optimizer
    moments = [args.exp_avg_dtype, args.exp_avg_sq_dtype] if precise else [torch.float32] * 2
    each = sum(dtype.itemsize for dtype in moments)
    if args.optimizer == "sgd":
        each = FP32 if args.sgd_momentum else 0
    if args.bf16 or args.fp16:
        each += args.main_params_dtype.itemsize if precise else FP32
    replicas = args.data_parallel_size * args.context_parallel_size if args.use_distributed_optimizer else 1
    on_gpu = 1.0
    if args.optimizer_cpu_offload:
        on_gpu -= args.optimizer_offload_fraction
    return int(stage.parameters * each / replicas * on_gpu)


@dataclass(frozen=True)
class _Block:
    """Bytes per token of one transformer block: ``saved`` for backward as the flags say, ``full`` without any
    recomputation, ``entry`` of its input alone, ``backward`` of the gradients alive at once."""

    saved: float
    full: float
    entry: float
    backward: float


def _blocks(args: argparse.Namespace, shape: ModelShape) -> list[_Block]:
    made = {layer: _block(args, shape, layer) for layer in set(shape.by_layer())}
    return [made[layer] for layer in shape.by_layer()]


def _block(args: argparse.Namespace, shape: ModelShape, layer: LayerShape) -> _Block:
    t = args.tensor_model_parallel_size
    between = t if args.sequence_parallel else 1  # ranks that divide the tensors between attention and MLP
    e = args.params_dtype.itemsize
    operand = 1 if args.fp8 else e  # of what a linear saves for its weight's gradient
    h, f = shape.hidden_size, layer.ffn_hidden_size
    q, kv = shape.kv_channels * layer.num_attention_heads, shape.kv_channels * layer.num_query_groups
    gates = 2 if shape.gated else 1
    norm = operand * h / between  # a norm's output: the input of qkv or fc1
    entry = e * h / between
    attention = (e * (q + 2 * kv) + e * q + (operand * q if args.fp8 else 0)) / t  # q, k, v; the input of proj
    softmax = FP32 * layer.num_attention_heads / t  # flash attention's log-sum-exp
    if _unfused_attention(args):
        softmax = layer.num_attention_heads / t * args.seq_length * (FP32 + e)
    up = e * gates * f / t  # the input of the activation function
    if shape.gated and not args.bias_swiglu_fusion:
        up += e * f / t
    down = operand * f / t
    dropout = 2 * h / between if args.hidden_dropout else 0
    full = 2 * entry + 2 * norm + attention + softmax + up + down + dropout
    if hasattr(args, "mask_lr"):  # for their gradients, what learned masks multiply is kept as it was before
        full += e * (q + f) / t + 2 * e * h / between
    saved = full
    if args.recompute_granularity == "selective":
        modules = args.recompute_modules or ["core_attn"]
        saved -= softmax if "core_attn" in modules else 0
        saved -= 2 * norm if "layernorm" in modules else 0
        if "mlp" in modules:
            saved -= up + down + (0 if "layernorm" in modules else norm)
    backward = (e * gates * f + e * f) / t + 2 * e * h
    return _Block(saved, full, entry, backward)


def _unfused_attention(args: argparse.Namespace) -> bool:
    return args.transformer_impl == "local" or getattr(args.attention_backend, "name", "") == "unfused"


def _loss(args: argparse.Namespace, shape: ModelShape) -> float:
    """Bytes per token that the loss saves: the logits in the model's type and the softmax in fp32; of a distilled loss
    its gradient, which takes the memory of the logits (``training/distillation_loss.py``)."""
    element: int = args.params_dtype.itemsize
    softmax = 0 if getattr(args, "objective", "") == "distill" else FP32
    return (element + softmax) * shape.padded_vocab_size / int(args.tensor_model_parallel_size)


def activations(
    args: argparse.Namespace,
    shape: ModelShape,
    stage: PipelineStage,
    number: int,
    stages: int,
    microbatches: int,
    layers: Sequence[range] | None = None,
) -> tuple[int, int]:
    """Bytes that stage ``number`` of ``stages`` keeps for backward, and the temporary bytes on top. ``layers`` are the
    stage's, by virtual stage; by default the model's first."""
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    blocks = _blocks(args, shape)
    kept, once, entry = 0.0, 0.0, blocks[0].entry
    held = [[blocks[layer] for layer in chunk] for chunk in layers or map(range, stage.chunks)]
    chunks = [_chunk(args, chunk, entry) for chunk in held]
    flights = _in_flight(args, stage, number, stages, microbatches)
    for flying in flights:
        kept = max(kept, sum(count * per_token for count, (per_token, _) in zip(flying, chunks, strict=True)))
    backward = [max((block.backward for block in chunk), default=0.0) for chunk in held]
    once = max(each + again for each, (_, again) in zip(backward, chunks, strict=True))
    if number == stages - 1:
        kept += 2 * entry  # the final norm
        once = max(once, _loss(args, shape))  # freed before the last block's backward pass
    if stages > 1:  # a hidden state and a gradient arrive while others are in use
        once += (4 if getattr(args, "overlap_p2p_comm", False) else 2) * entry
    gradient = 0
    if not args.gradient_accumulation_fusion:  # of one weight, before it is added to the main gradients
        gradient = args.params_dtype.itemsize * _largest_weight(args, shape, number == stages - 1)
    return int(tokens * kept), int(tokens * once) + gradient


def _largest_weight(args: argparse.Namespace, shape: ModelShape, last: bool) -> int:
    """Elements of a rank's largest matrix that a backward pass reaches while many activations are kept."""
    fc1 = shape.ffn_hidden_size * (2 if shape.gated else 1)
    rows = max(fc1, shape.padded_vocab_size if last else 0)
    return int(rows * shape.hidden_size // args.tensor_model_parallel_size)


def _chunk(args: argparse.Namespace, blocks: Sequence[_Block], entry: float) -> tuple[float, float]:
    """Bytes per token that ``blocks`` keep, and that recomputing them needs at once."""
    if args.recompute_granularity != "full":
        return sum(block.saved for block in blocks), max((block.full - block.saved for block in blocks), default=0.0)
    share = args.tensor_model_parallel_size if args.distribute_saved_activations else 1
    unit = args.recompute_num_layers or 1
    if args.recompute_method == "block":
        again, kept = blocks[:unit], blocks[unit:]
        return len(again) * entry / share + sum(block.full for block in kept), max(block.full for block in blocks)
    units = [sum(block.full for block in blocks[first : first + unit]) for first in range(0, len(blocks), unit)]
    return len(units) * entry / share, max(units, default=0.0)


def _in_flight(
    args: argparse.Namespace, stage: PipelineStage, number: int, stages: int, microbatches: int
) -> list[tuple[int, ...]]:
    """Micro-batches whose activations each virtual stage holds after each forward pass, under 1F1B.

    Megatron's schedule: warm-up passes, then one forward and one backward pass in turn. Passes go through the virtual
    stages by groups of micro-batches, backward through the last one first.
    """
    v = len(stage.chunks)
    if v == 1:
        return [(min(microbatches, stages - number),)]
    group = getattr(args, "microbatch_group_size_per_vp_stage", None) or stages
    forward = [
        chunk
        for first in range(0, microbatches, group)
        for chunk in range(v)
        for _ in range(first, min(first + group, microbatches))
    ]
    warm = min((stages - number - 1) * 2 + (v - 1) * group, len(forward))
    held = [0] * v
    found = []
    for place, chunk in enumerate(forward):
        held[chunk] += 1
        if place >= warm - 1:
            found.append(tuple(held))
        if place >= warm:
            held[v - 1 - forward[place - warm]] -= 1
    return list(dict.fromkeys(found))
