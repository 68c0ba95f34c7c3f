"""The checks on a command line after its dry run: each yields findings with a verdict and a reason."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_prune import methods
from megatron_prune import storage as places
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.engine.installed import Installed
from megatron_prune.errors import MegatronPruneError
from megatron_prune.preflight import cost, host, memory
from megatron_prune.preflight.cost import Cluster
from megatron_prune.preflight.dry_run import Rehearsal

Verdict = Literal["yes", "look", "no", "not checked"]
DECIDING = ("memory", "host memory", "data", "storage")  # a "look" of other checks: it runs, but badly
TILE = 64  # below it, tensor cores work on padding
UNEVEN = 1.15  # slowest stage relative to the mean
IDLE = 0.15  # share of a step in the pipeline's bubble
LONG_STREAM = 20e9  # tokens from which rank 0 may exceed its time limit building indices


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


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Will it run? "look" if nothing refuses it and one of ``DECIDING`` is undecided."""
    if any(finding.verdict == "no" for finding in findings):
        return "no"
    return "look" if any(f.verdict == "look" and f.check in DECIDING for f in findings) else "yes"


def all_findings(question: JobQuestion, rehearsal: Rehearsal) -> list[Finding]:
    """Every check on a command line that Megatron accepts."""
    args, shape, stages = rehearsal.args, rehearsal.shape, rehearsal.stages
    alone = question.verb == "sparsify" and methods.get_sparse(args.method).statistic == "none"
    if alone and args.allocation == "uniform":
        return [*layout(question, rehearsal), *weights_alone(args)]
    found = [installed(question, rehearsal), *layout(question, rehearsal), *dimensions(args, shape)]
    if rehearsal.unbuilt is not None:
        return [*found, Finding("model", "no", f"Megatron cannot build it: {rehearsal.unbuilt}")]
    found += balance(args, shape, rehearsal)
    found.append(memory_of_ranks(question, rehearsal))
    found.append(memory_of_nodes(question, rehearsal))
    found += data(question, args)
    found += start(question, rehearsal)
    if question.trains:
        spent = cost.time(args, shape, question.cluster, question.mfu, _teacher(args))
        found.append(Finding(
            "time", "yes",
            f"{spent.step_seconds:.2f} s a step and {spent.gpu_hours:,.0f} GPU-hours for {spent.tokens / 1e9:,.2f}B "
            f"tokens in {spent.steps:,} steps, if MFU is {question.mfu:g}",
            asdict(spent) | {"mfu": question.mfu},
        ))  # fmt: skip
        found.append(storage(args, shape, spent.steps))
    assert len(stages) == args.pipeline_model_parallel_size
    return found


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


def weights_alone(args: argparse.Namespace) -> Iterator[Finding]:
    """A pruning that builds no model: anything that fits on the disk works, whatever layout wrote the checkpoint."""
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.engine import runtime

    yield Finding("memory", "yes", f"{args.method} reads and writes blocks of rows: no model is built, no GPU is used")
    if not places.path(args.load).is_dir():
        yield Finding("start", "not checked", f"--load {args.load} is not on this machine")
        return
    try:
        open_checkpoint(runtime.loaded_directory(args))
    except MegatronPruneError as error:
        yield Finding("start", "no", str(error))
    else:
        yield Finding("start", "yes", f"--load {args.load} is complete")


def dimensions(args: argparse.Namespace, shape: ModelShape) -> list[Finding]:
    """Every size that tensor parallelism divides, and both sides of every GEMM on a rank.

    FP8's requirements are checked with the arguments (``engine.fp8``).
    """
    t = args.tensor_model_parallel_size
    if bad := [f"{flag} {size}" for flag, size in _divided(shape) if size % t]:
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


def _divided(shape: ModelShape) -> list[tuple[str, int]]:
    return [
        ("--num-attention-heads", shape.num_attention_heads),
        ("--num-query-groups", shape.num_query_groups),
        ("--ffn-hidden-size", shape.ffn_hidden_size),
        ("--padded-vocab-size", shape.padded_vocab_size),
    ]


def _gemms(args: argparse.Namespace, shape: ModelShape) -> dict[str, tuple[int, int, int]]:
    """(tokens, inputs, outputs) of the blocks' GEMMs on a rank."""
    t, d = args.tensor_model_parallel_size, shape.kv_channels
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    heads, groups = shape.num_attention_heads // t, shape.num_query_groups // t
    ffn = shape.ffn_hidden_size // t
    return {
        "qkv": (tokens, shape.hidden_size, (heads + 2 * groups) * d),
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
        parent = _teacher(args)
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


def _teacher(args: argparse.Namespace) -> ModelShape | None:
    """The shape of the online teacher, if it is on this machine."""
    from megatron_prune.checkpoint.reader import open_checkpoint

    path = _online_teacher(args)
    return None if path is None or not places.path(path).exists() else open_checkpoint(path).shape


def _online_teacher(args: argparse.Namespace) -> str | None:
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


def data(question: JobQuestion, args: argparse.Namespace) -> Iterator[Finding]:
    """Whether there is enough text, for ranges of a stream or windows."""
    from megatron_prune.data import windows
    from megatron_prune.training.data import refuse_unfit_range, train_blend

    if question.trains:
        blend = train_blend(args)
        prefixes = [word for word in blend if not _is_number(word)]
        wanted = args.seq_length * _end(args)
    else:
        named = getattr(args, "calibration_data_path", None) or args.data_path or []
        prefixes = [named] if isinstance(named, str) else list(named)
        windows_wanted = getattr(args, "calibration_sequences", None) or getattr(args, "windows", None) or 1
        wanted = windows_wanted * args.seq_length + 1
    if args.mock_data or not prefixes:
        yield Finding("data", "yes", "no corpus is read")
        return
    absent = [prefix for prefix in prefixes if not Path(f"{prefix}.idx").is_file()]
    if absent:
        yield _declared(question, absent, wanted)
        return
    try:
        if question.trains:
            refuse_unfit_range(args, _seen(args))
        else:
            for prefix in prefixes:
                flag = "--windows" if hasattr(args, "windows") else "--calibration-sequences"
                windows.windows(prefix, args.seq_length, windows_wanted, flag=flag)
    except MegatronPruneError as error:
        yield Finding("data", "no", str(error))
        return
    yield Finding("data", "yes", f"{wanted / 1e9:,.3f}B tokens are needed, and available", {"tokens": wanted})
    if question.trains and args.stream_range and wanted > LONG_STREAM and not _has_caches(args, prefixes):
        yield Finding(
            "data", "look",
            "the stream's index caches are missing: build them with `megatron-prune build-index` before the job: "
            "rank 0 has ten minutes to build them while all others wait",
        )  # fmt: skip


def _declared(question: JobQuestion, absent: Sequence[str], wanted: int) -> Finding:
    where = f"{absent[0]} is not on this machine"
    if question.corpus_tokens is None:
        return Finding("data", "not checked", f"{where}; {wanted / 1e9:,.3f}B tokens are needed", {"tokens": wanted})
    words = f"{where}; of the {question.corpus_tokens / 1e9:,.3f}B tokens declared, {wanted / 1e9:,.3f}B are needed"
    return Finding("data", "no" if wanted > question.corpus_tokens else "yes", words, {"tokens": wanted})


def _end(args: argparse.Namespace) -> int:
    """The first sample of the stream that the run does not read."""
    from megatron_prune.data.streams import parse_range

    if args.stream_range:
        return parse_range(args.stream_range)[1]
    return int(args.train_iters or 0) * int(args.global_batch_size)


def _has_caches(args: argparse.Namespace, prefixes: Sequence[str]) -> bool:
    caches = Path(args.data_cache_path or f"{prefixes[0]}.streams")
    return any(caches.glob("stream-*/stream.json"))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _seen(args: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.training import lineage

    path = args.pretrained_checkpoint
    here = path and places.path(path).is_dir()
    return lineage.seen(lineage.of(open_checkpoint(places.path(path)))) if here else []


def start(question: JobQuestion, rehearsal: Rehearsal) -> Iterator[Finding]:
    """Whether the starting checkpoint and its masks fit this model and load on this layout."""
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.engine import runtime

    args = rehearsal.args
    for flag, path in question.absent.items():
        yield Finding("start", "not checked", f"{flag} {path} is not on this machine")
    own = args.load is not None and places.path(args.load).is_dir() and find_iteration(args.load) is not None
    flag, path = ("--load", args.load) if own or not args.pretrained_checkpoint else (
        "--pretrained-checkpoint", args.pretrained_checkpoint
    )  # fmt: skip
    if path is None or (flag == "--load" and not own and path == args.save):
        if not question.absent:
            yield Finding("start", "yes", "from random weights")
    elif not places.path(path).is_dir():
        yield Finding("start", "not checked", f"{flag} {path} is not on this machine")
    else:
        try:
            runtime.refuse_unfit_checkpoint(args, path, flag)
            checkpoint = open_checkpoint(runtime.loaded_directory(args) if flag == "--load" else path)
            stored = {key: tuple(tensor.shape) for key, tensor in checkpoint.stored.items()}
            wanted = {key: shape for stage in rehearsal.stages for key, shape in stage.shapes.items()}
            odd = [f"{key} {list(shape)}" for key, shape in wanted.items() if stored.get(key) != shape]
            if odd:
                yield Finding("start", "no", f"{flag} {path} does not hold {', '.join(odd[:3])} as the stages ask")
            else:
                yield Finding("start", "yes", f"{flag} {path}: all {len(wanted)} tensors in the shapes asked for")
        except MegatronPruneError as error:
            yield Finding("start", "no", str(error))
    if getattr(args, "masks", None):
        yield _masks(args)
    if _online_teacher(args):
        yield _taught(args)


def _taught(args: argparse.Namespace) -> Finding:
    from megatron_prune.training import teacher

    if not places.path(args.teacher).exists():
        return Finding("teacher", "not checked", f"{teacher.FLAG} {args.teacher} is not on this machine")
    try:
        found = teacher.arguments(args)
    except MegatronPruneError as error:
        return Finding("teacher", "no", str(error))
    reason = f"{args.teacher}: {found.num_layers} layers of {found.hidden_size}, with the student's vocabulary"
    return Finding("teacher", "yes", reason)


def _masks(args: argparse.Namespace) -> Finding:
    from megatron_prune.training import masked

    if not places.path(args.masks).is_dir():
        return Finding("masks", "not checked", f"--masks {args.masks} is not on this machine")
    try:
        chosen = masked.choose(args)
    except MegatronPruneError as error:
        return Finding("masks", "no", str(error))
    assert chosen is not None
    return Finding("masks", "yes", f"{args.masks} fit the model: {chosen.masks.removed:,} weights removed")


def storage(args: argparse.Namespace, shape: ModelShape, steps: int) -> Finding:
    """The size of the saves, and whether they fit if the disk is this machine's."""
    if args.save is None:
        return Finding("storage", "look", "without --save, no checkpoint is kept")
    one, kept = cost.checkpoint_bytes(args, shape), cost.saves_kept(args, steps)
    facts: dict[str, Any] = {"checkpoint": one, "kept": kept, "total": one * kept}
    words = f"{kept} checkpoints of {one / 1e9:,.1f} GB: {one * kept / 1e12:,.2f} TB"
    if places.is_stored(args.save):
        return Finding("storage", "yes", f"{words} (an object store is not asked what it has room for)", facts)
    parent = next((folder for folder in Path(args.save).absolute().parents if folder.is_dir()), None)
    if parent is None or not Path(args.save).absolute().parent.is_dir():
        return Finding("storage", "yes", f"{words} (free space not checked: {args.save} is not on this machine)", facts)
    free = shutil.disk_usage(parent).free
    if free < one * kept:
        return Finding(
            "storage", "no" if free < one else "look",
            f"{words}, and {parent} has {free / 1e12:,.2f} TB free; keep fewer with --save-retain-interval", facts,
        )  # fmt: skip
    return Finding("storage", "yes", words, facts)
