"""Memory of a rank, by pipeline stage: arithmetic on what Megatron built, with its rules for what is kept.

Weights, gradients and optimizer states are exact for the data types that the flags choose. Activations follow what
each module saves for its backward pass (Korthikanti et al., 2205.05198, for Megatron's blocks; here with grouped
queries, gated MLPs, flash attention and FP8), times the micro-batches that the schedule keeps in flight. What the
CUDA context, NCCL, workspaces and fragmentation take is not known beforehand: ``reserve`` is set aside for them.

Sizes are bytes. T is a micro-batch's tokens on a rank (before sequence parallelism), t the tensor parallel size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine.rehearsal import Stage

FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank of one stage."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    masks: int = 0
    activations: int = 0  # kept from forward to backward, of all micro-batches in flight
    working: int = 0  # what one block's passes or the loss need for a moment
    pruning: int = 0  # what a pruning method gathers

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def training(args: argparse.Namespace, shape: ModelShape, stages: Sequence[Stage], microbatches: int) -> list[Memory]:
    """Memory of a training step, of each stage."""
    found = []
    for number, stage in enumerate(stages):
        kept, once = activations(args, shape, stage, number, len(stages), microbatches)
        found.append(
            Memory(
                weights=_weights(args, stage),
                gradients=stage.parameters
                * (FP32 if args.accumulate_allreduce_grads_in_fp32 else args.params_dtype.itemsize),
                optimizer=_optimizer(args, stage),
                masks=stage.linears if getattr(args, "masks", None) else 0,  # a byte a weight: training/zeros.py
                activations=kept,
                working=once,
            )
        )
    return found


def forward(args: argparse.Namespace, shape: ModelShape, stages: Sequence[Stage]) -> list[Memory]:
    """Memory of the verbs that only run the model, of each stage; SparseGPT's Hessians too."""
    tokens = args.seq_length * args.micro_batch_size
    hessians = 0
    if getattr(args, "method", None) == "sparsegpt":
        # One block's at a time, over the whole inputs, in float64; the largest is copied, factored and inverted.
        inputs = [shape.hidden_size, shape.kv_channels * shape.num_attention_heads]
        inputs += [shape.hidden_size, shape.ffn_hidden_size]
        hessians = 8 * sum(n * n for n in inputs) + (8 + 8 + FP32) * max(inputs) ** 2
    found = []
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        working = tokens * _block(args, shape).saved
        working += tokens * _loss(args, shape) if last else 0
        found.append(Memory(weights=_weights(args, stage), working=int(working), pruning=hessians))
    return found


def _weights(args: argparse.Namespace, stage: Stage) -> int:
    element: int = args.params_dtype.itemsize
    if not args.fp8:
        return stage.parameters * element
    # TE keeps two FP8 copies of a linear's weight, one a direction; with param gather they are all there is.
    linears = stage.linears * (2 if args.fp8_param_gather else element + 2)
    return linears + (stage.parameters - stage.linears) * element


def _optimizer(args: argparse.Namespace, stage: Stage) -> int:
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
    """Bytes a token of one transformer block: ``saved`` for backward as the flags say, ``full`` without any
    recomputation, ``entry`` of its input alone, ``backward`` of the gradients that live at once."""

    saved: float
    full: float
    entry: float
    backward: float


def _block(args: argparse.Namespace, shape: ModelShape) -> _Block:
    t = args.tensor_model_parallel_size
    between = t if args.sequence_parallel else 1  # ranks that share out what lies between attention and MLP
    e = args.params_dtype.itemsize
    operand = 1 if args.fp8 else e  # of what a linear saves to make its weight's gradient
    h, f = shape.hidden_size, shape.ffn_hidden_size
    q, kv = shape.kv_channels * shape.num_attention_heads, shape.kv_channels * shape.num_query_groups
    gates = 2 if shape.gated else 1
    norm = operand * h / between  # a norm's output: what qkv or fc1 reads
    entry = e * h / between
    attention = (e * (q + 2 * kv) + e * q + (operand * q if args.fp8 else 0)) / t  # q, k, v; what proj reads
    softmax = FP32 * shape.num_attention_heads / t  # flash attention's log-sum-exp
    if _unfused_attention(args):
        softmax = shape.num_attention_heads / t * args.seq_length * (FP32 + e)
    up = e * gates * f / t  # what the activation function reads
    if shape.gated and not args.bias_swiglu_fusion:
        up += e * f / t
    down = operand * f / t
    dropout = 2 * h / between if args.hidden_dropout else 0
    full = 2 * entry + 2 * norm + attention + softmax + up + down + dropout
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
    """Bytes a token of the logits in the model's type and of the softmax in fp32, which the loss saves."""
    element: int = args.params_dtype.itemsize
    return (element + FP32) * shape.padded_vocab_size / int(args.tensor_model_parallel_size)


def activations(
    args: argparse.Namespace, shape: ModelShape, stage: Stage, number: int, stages: int, microbatches: int
) -> tuple[int, int]:
    """Bytes that stage ``number`` of ``stages`` keeps for backward, and that it needs beside them for a moment."""
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    block = _block(args, shape)
    kept, once = 0.0, block.backward
    flights = _in_flight(stage, number, stages, microbatches)
    for layers, flying in zip(stage.chunks, flights, strict=True):
        per_token, again = _chunk(args, block, layers)
        kept += flying * per_token
        once = max(once, block.backward + again)
    if number == stages - 1:
        kept += 2 * block.entry  # the final norm
        once += _loss(args, shape)
    return int(tokens * kept), int(tokens * once)


def _chunk(args: argparse.Namespace, block: _Block, layers: int) -> tuple[float, float]:
    """Bytes a token that ``layers`` blocks keep, and that recomputing them needs at once."""
    if args.recompute_granularity != "full":
        return layers * block.saved, block.full - block.saved if layers else 0.0
    share = args.tensor_model_parallel_size if args.distribute_saved_activations else 1
    unit = args.recompute_num_layers or 1
    if args.recompute_method == "block":
        recomputed = min(unit, layers)
        return recomputed * block.entry / share + (layers - recomputed) * block.full, block.full
    return -(-layers // unit) * block.entry / share, min(unit, layers) * block.full


def _in_flight(stage: Stage, number: int, stages: int, microbatches: int) -> list[int]:
    """Micro-batches whose activations each virtual stage holds at the worst moment, under 1F1B."""
    v = len(stage.chunks)
    if v == 1:
        return [min(microbatches, stages - number)]
    # Interleaved: as many passes as its warm-up runs and one more, each virtual stage `stages` micro-batches in turn.
    flying = min((stages - number - 1) * 2 + (v - 1) * stages + 1, microbatches * v)
    return [sum(i // stages % v == chunk for i in range(flying)) for chunk in range(v)]
