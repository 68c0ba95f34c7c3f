"""The checks on layout, dimensions and memory of a command line after its dry run: each yields findings with a verdict
and a reason. Those on files are in ``files.py``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_prune import storage as places
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine.installed import Installed
from megatron_prune.preflight import cost, host, memory
from megatron_prune.preflight.cost import Cluster
from megatron_prune.preflight.dry_run import Rehearsal

Verdict = Literal["yes", "look", "no", "not checked"]
TILE = 64  # below it, tensor cores work on padding
UNEVEN = 1.15  # slowest stage relative to the mean
IDLE = 0.15  # share of a step in the pipeline's bubble


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``facts`` are its figures as JSON."""

    check: str
    verdict: Verdict
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobQuestion:
    """A command line for a cluster, and the other inputs of preflight."""

    verb: str
    argv: list[str]
    cluster: Cluster
    mfu: float
    reserve: int  # bytes
    host: int | None  # bytes of a node's memory
    corpus_tokens: int | None
    absent: dict[str, str]  # checkpoints that are not here, by flag
    installed: Installed  # on the cluster

    @property
    def trains(self) -> bool:
        return self.verb in ("pretrain", "learn-masks")


def installed(question: JobQuestion, rehearsal: Rehearsal) -> Finding:
    """What is assumed to be installed on the cluster, and what is switched off without the rest."""
    words = f"--installed {str(question.installed).replace(' ', '')}: assumed on every node"
    if rehearsal.off:
        words += f"; switched off without the rest: {'; '.join(rehearsal.off)}"
    return Finding("installed", "yes", words, {"installed": str(question.installed), "off": list(rehearsal.off)})


def layout(question: JobQuestion, rehearsal: Rehearsal) -> Iterator[Finding]:
    """The parallel sizes, and where the job would wait."""
    args, cluster = rehearsal.args, question.cluster
    sizes = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "data": args.data_parallel_size,
        "microbatches": rehearsal.microbatches,
    }
    words = f"{cluster}: TP {sizes['tensor']}, PP {sizes['pipeline']}, CP {sizes['context']}, DP {sizes['data']}"
    if not question.trains:
        yield Finding("layout", "yes", words, sizes)
        return
    words += f", {rehearsal.microbatches} micro-batches of {args.micro_batch_size} a step"
    yield Finding("layout", "yes", words, sizes)
    if sizes["tensor"] > cluster.local_ranks:
        yield Finding(
            "layout", "look",
            f"--tensor-model-parallel-size {sizes['tensor']} reaches beyond a node of {cluster.local_ranks} GPUs: its "
            "all-reduces would cross the network in every block",
        )  # fmt: skip
    waits = cost.bubble(args, rehearsal.microbatches)
    if waits > IDLE:
        yield Finding(
            "layout", "look",
            f"the pipeline waits {waits:.0%} of each step: {rehearsal.microbatches} micro-batches for "
            f"{sizes['pipeline']} stages; fewer stages, a smaller --micro-batch-size or virtual stages help",
            {"bubble": waits},
        )  # fmt: skip


def dimensions(args: argparse.Namespace, shape: ModelShape) -> list[Finding]:
    """Every size that tensor parallelism divides, and both sides of every GEMM on a rank.

    FP8's requirements are checked with the arguments (``engine.fp8``).
    """
    t = args.tensor_model_parallel_size
    sizes = dict.fromkeys(one for layer in shape.by_layer() for one in layer.unshared(t).items())
    bad = [f"--{name.replace('_', '-')} {size}" for name, size in sizes]
    bad += [f"--padded-vocab-size {shape.padded_vocab_size}"] if shape.padded_vocab_size % t else []
    if bad:
        return [Finding("dimensions", "no", f"--tensor-model-parallel-size {t} does not divide {', '.join(bad)}")]
    if args.sequence_parallel and args.seq_length % (t * args.context_parallel_size):
        return [Finding(
            "dimensions", "no",
            f"--sequence-parallel: {t} x CP {args.context_parallel_size} ranks cannot split {args.seq_length} tokens",
        )]  # fmt: skip
    gemms = _gemms(args, shape)
    facts = {"gemms": {name: list(sizes) for name, sizes in gemms.items()}}
    sides = {f"{name} {'x'.join(map(str, sizes))}": sizes for name, sizes in gemms.items()}
    ragged = [name for name, sizes in sides.items() if any(n % TILE for n in sizes[1:])]
    if ragged:
        return [Finding(
            "dimensions", "look",
            f"no multiples of {TILE}, so that tensor cores work on padding too: {'; '.join(ragged)}", facts,
        )]  # fmt: skip
    named = ", ".join(f"{name} {sizes[1]}x{sizes[2]}" for name, sizes in gemms.items())
    return [Finding("dimensions", "yes", f"GEMMs of {next(iter(gemms.values()))[0]} tokens: {named}", facts)]


def _gemms(args: argparse.Namespace, shape: ModelShape) -> dict[str, tuple[int, int, int]]:
    """(tokens, inputs, outputs) of the blocks' GEMMs on a rank; if layers differ, of the largest."""
    t, d = args.tensor_model_parallel_size, shape.kv_channels
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    heads, ffn = shape.num_attention_heads // t, shape.ffn_hidden_size // t
    rows = (shape.num_attention_heads + 2 * shape.num_query_groups) * d // t
    return {
        "qkv": (tokens, shape.hidden_size, rows),
        "proj": (tokens, heads * d, shape.hidden_size),
        "fc1": (tokens, shape.hidden_size, ffn * (2 if shape.gated else 1)),
        "fc2": (tokens, ffn, shape.hidden_size),
    }


def balance(args: argparse.Namespace, shape: ModelShape, rehearsal: Rehearsal) -> Iterator[Finding]:
    """Whether stages have equal amounts of work, including the output layer."""
    stages = rehearsal.stages
    if len(stages) == 1:
        return
    work = cost.work(shape, stages, args.seq_length)
    ratio = max(work) * len(work) / sum(work)
    layers = [stage.layers for stage in stages]
    facts = {"layers": layers, "forward_flops_per_token": work, "slowest_to_mean": ratio}
    words = f"layers {layers}; the slowest stage has {ratio:.2f} times the mean work"
    if ratio <= UNEVEN:
        yield Finding("stages", "yes", words, facts)
        return
    best = cost.even_split(shape, len(stages), args.seq_length)
    if best == layers:
        yield Finding("stages", "look", f"{words}, and no split is better: use fewer stages", facts)
        return
    flag = "|".join(["E" + "t" * best[0], *("t" * n for n in best[1:-1]), "t" * best[-1] + "L"])
    yield Finding(
        "stages", "look", f"{words}; {best} is the most even: --pipeline-model-parallel-layout '{flag}'", facts
    )


def memory_of_ranks(question: JobQuestion, rehearsal: Rehearsal) -> Finding:
    """The fullest rank compared with its GPU."""
    args, shape, gpu = rehearsal.args, rehearsal.shape, question.cluster.gpu
    if args.use_torch_fsdp2:
        return Finding("memory", "not checked", "memory under FSDP is not estimated")
    if question.trains:
        parent = teacher_shape(args)
        ranks = memory.training(args, shape, rehearsal.stages, rehearsal.microbatches, parent)
    else:
        ranks = memory.forward(args, shape, rehearsal.stages)
    totals = [rank.total + question.reserve for rank in ranks]
    fullest = max(range(len(ranks)), key=lambda stage: totals[stage])
    parts = {name: size for name, size in asdict(ranks[fullest]).items() if size}
    facts = {
        "stages": [asdict(rank) | {"total": total} for rank, total in zip(ranks, totals, strict=True)],
        "reserve": question.reserve,
        "gpu": gpu.memory,
    }
    gb = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    words = (
        f"stage {fullest} needs {totals[fullest] / 1e9:.1f} of {gpu.memory / 1e9:.1f} GB ({gb}, "
        f"reserve {question.reserve / 1e9:.1f})"
    )
    margin = int(memory.MARGIN * gpu.memory)
    facts["margin"] = margin
    remedy = _REMEDIES[max(parts, key=lambda name: parts[name])]
    if totals[fullest] > gpu.memory + margin:
        return Finding("memory", "no", f"{words}; {remedy}", facts)
    if totals[fullest] > gpu.memory - margin:
        side = "above" if totals[fullest] > gpu.memory else "below"
        trial = "three steps of this command" if question.trains else "this command on a few windows"
        return Finding(
            "memory", "look",
            f"{words}: {abs(gpu.memory - totals[fullest]) / 1e9:.1f} GB {side} full, too close for an estimate to "
            f"decide (within {margin / 1e9:.1f} GB); {trial} would (nvidia-smi, or `max reserved` in Megatron's log); "
            f"room comes from {remedy}", facts,
        )  # fmt: skip
    return Finding("memory", "yes", words, facts)


_REMEDIES = {
    "weights": "more tensor or pipeline parallelism",
    "gradients": "more tensor or pipeline parallelism",
    "optimizer": "--use-distributed-optimizer, more data parallelism or more model parallelism",
    "masks": "more tensor or pipeline parallelism",
    "activations": "--sequence-parallel, a smaller --micro-batch-size, --recompute-granularity selective "
    "--recompute-modules mlp or full, or more tensor parallelism",
    "working": "more tensor parallelism, a shorter --seq-length or a smaller --micro-batch-size",
    "pruning": "another method, or fewer --modules at a time",
    "teacher": "--teacher-cache, or more tensor or pipeline parallelism",
}


def teacher_shape(args: argparse.Namespace) -> ModelShape | None:
    """The shape of the online teacher, if it is on this machine."""
    from megatron_prune.checkpoint.reader import open_checkpoint

    path = online_teacher(args)
    return None if path is None or not places.path(path).exists() else open_checkpoint(path).shape


def online_teacher(args: argparse.Namespace) -> str | None:
    """The teacher that runs in the job; --teacher next to a cache is only compared with it."""
    return None if getattr(args, "teacher_cache", None) else getattr(args, "teacher", None)


def memory_of_nodes(question: JobQuestion, rehearsal: Rehearsal) -> Finding:
    """The fullest node compared with its host memory, if that is known."""
    taken = host.node(rehearsal.args, rehearsal.shape, rehearsal.stages, question.cluster.local_ranks, question.trains)
    parts = {name: size for name, size in asdict(taken).items() if size}
    gb = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    words = f"a node of {question.cluster.local_ranks} ranks needs {taken.total / 1e9:.1f} GB of host memory ({gb})"
    facts = asdict(taken) | {"total": taken.total, "node": question.host}
    if question.host is None:
        return Finding("host memory", "not checked", f"{words}; --host-memory-gb says what a node has", facts)
    words += f" of {question.host / 1e9:.0f}"
    remedy = host.REMEDIES.get(max(parts, key=lambda name: parts[name]), "fewer ranks on a node")
    if taken.total > question.host:
        return Finding("host memory", "no", f"{words}; {remedy}", facts)
    crowded = taken.total > (1 - memory.MARGIN) * question.host
    return Finding("host memory", "look" if crowded else "yes", f"{words}; {remedy}" if crowded else words, facts)
