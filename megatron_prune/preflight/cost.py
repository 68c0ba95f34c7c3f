"""What a run costs: time at a stated MFU, the pipeline's bubble, storage, and how even its stages are."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.preflight.dry_run import PipelineStage

FP32 = 4


@dataclass(frozen=True)
class Time:
    """``flops`` per step are the model's: dense GEMMs forward and backward, no recomputation; and an online teacher's
    forward."""

    flops: float
    step_seconds: float
    steps: int
    gpu_hours: float
    tokens: int


def time(
    args: argparse.Namespace, shape: ModelShape, cluster: Cluster, mfu: float, teacher: ModelShape | None = None
) -> Time:
    """Time of a training run that reaches ``mfu`` of the GPUs' dense bf16 FLOPs, with FP8 or without."""
    taught = 0 if teacher is None else teacher.forward_flops(args.seq_length)
    flops = float(shape.training_flops(args.seq_length) + taught) * args.global_batch_size
    seconds = flops / (cluster.gpus * cluster.gpu.flops * mfu)
    steps = args.train_iters or math.ceil((args.train_samples or 0) / args.global_batch_size)
    tokens = steps * args.global_batch_size * args.seq_length
    return Time(flops, seconds, steps, seconds * steps * cluster.gpus / 3600, tokens)


def bubble(args: argparse.Namespace, microbatches: int) -> float:
    """Share of a step in which a stage waits for the pipeline to fill and drain."""
    waiting: int = args.pipeline_model_parallel_size - 1
    working: int = microbatches * (args.virtual_pipeline_model_parallel_size or 1)
    return waiting / (waiting + working)


def work(shape: ModelShape, stages: Sequence[PipelineStage], seq_length: int) -> list[float]:
    """Forward FLOPs per token of each stage: its blocks, and the output layer on the last."""
    output = 2 * shape.hidden_size * shape.padded_vocab_size
    blocks = [shape.layer_flops(layer, seq_length) / seq_length for layer in range(shape.num_layers)]
    held = [sum(blocks[layer] for chunk in chunks for layer in chunk) for chunks in layers_of(stages)]
    return [work + (output if stage is stages[-1] else 0) for work, stage in zip(held, stages, strict=True)]


def layers_of(stages: Sequence[PipelineStage]) -> list[list[range]]:
    """The layers of each stage, by virtual stage: the first virtual stage of all stages comes first."""
    found: list[list[range]] = [[] for _ in stages]
    first = 0
    for virtual in range(len(stages[0].chunks) if stages else 0):  # none: Megatron could not build the model
        for number, stage in enumerate(stages):
            found[number].append(range(first, first + stage.chunks[virtual]))
            first += stage.chunks[virtual]
    return found


def even_split(shape: ModelShape, stages: int, seq_length: int) -> list[int]:
    """Layers per stage such that the slowest has the least work, including the output layer; if layers differ, as if
    each had their mean work."""
    whole = shape.forward_flops(seq_length) / seq_length
    output = 2 * shape.hidden_size * shape.padded_vocab_size
    extra = output / ((whole - output) / shape.num_layers)  # in layers
    best: list[int] | None = None
    least = (0.0, 0.0)
    for last in range(shape.num_layers + 1):
        base, more = divmod(shape.num_layers - last, stages - 1)
        split = [base + (i < more) for i in range(stages - 1)] + [last]
        loads = [*split[:-1], last + extra]
        if best is None or (max(loads), sum(n * n for n in loads)) < least:
            best, least = split, (max(loads), sum(n * n for n in loads))
    assert best is not None
    return best


def checkpoint_bytes(args: argparse.Namespace, shape: ModelShape) -> int:
    """Bytes of one save: weights, and with the optimizer its fp32 masters and two moments."""
    with_optimizer: int = 0 if args.no_save_optim else 2 * FP32 + (FP32 if args.bf16 or args.fp16 else 0)
    return shape.parameters() * (int(args.params_dtype.itemsize) + with_optimizer)


def saves_kept(args: argparse.Namespace, steps: int) -> int:
    """Checkpoints kept at the end, plus the one that is written before an old one is removed."""
    if not args.save_interval or args.save_interval >= steps:
        return 1
    if args.save_retain_interval:  # the newest always stays; others only at multiples of it
        return steps // int(args.save_retain_interval) + 2
    return math.ceil(steps / int(args.save_interval))


# The machines of a job: how many GPUs, of which kind, how many per node.


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: bytes of memory, dense bf16 FLOPs per second (no sparsity), compute capability.

    Memory is as the driver reports it; FLOPs are from NVIDIA's data sheets for the SXM form.
    """

    memory: int
    flops: float
    capability: tuple[int, int]


MIB = 2**20
GPUS = {
    "a100-80gb": Gpu(81_920 * MIB, 312e12, (8, 0)),
    "h100": Gpu(81_559 * MIB, 989e12, (9, 0)),
    "h200": Gpu(143_771 * MIB, 989e12, (9, 0)),
    "b200": Gpu(183_359 * MIB, 2250e12, (10, 0)),
}


@dataclass(frozen=True)
class Cluster:
    """``gpus`` GPUs of one ``kind``, ``per_node`` of them per node."""

    gpus: int
    kind: str = "h100"
    per_node: int = 8

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise UsageError("--gpus, --gpus-per-node", got=f"{self.gpus}, {self.per_node}", expected="at least 1 each")
        if self.kind not in GPUS:
            raise UsageError("--gpu", got=self.kind, expected="one of " + ", ".join(GPUS))
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise UsageError("--gpus", got=self.gpus, expected=f"a multiple of --gpus-per-node {self.per_node}")

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.kind]

    @property
    def local_ranks(self) -> int:
        """Ranks on each node of the job."""
        return min(self.gpus, self.per_node)

    def __str__(self) -> str:
        return f"{self.gpus} x {self.kind}"
