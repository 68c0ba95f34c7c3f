"""Host memory of a node: what its ranks hold outside their GPUs at the peak.

Tensors are counted exactly: a save is staged in host memory, offloaded optimizers stay there, ``sparsify`` keeps its
windows there. A process's memory before it holds any tensor is an estimate (``PROCESS``, ``WORKER``). Corpora and
index caches are mapped files in the reclaimable page cache, so they are not counted. Sizes are bytes.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune import storage
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.config import args_of
from megatron_prune.engine import arguments
from megatron_prune.errors import UsageError
from megatron_prune.preflight.dry_run import PipelineStage

FP32 = 4
PROCESS = 4e9  # per rank: Python, torch, Megatron and CUDA's libraries
WORKER = 0.5e9  # of a data loader's worker, a fork that shares most of its parent's memory


@dataclass(frozen=True)
class Host:
    """Bytes of one node."""

    processes: int = 0
    workers: int = 0  # of data loaders
    order: int = 0  # of a permuted range, in every rank
    saving: int = 0  # weights and optimizer states staged for storage
    gathering: int = 0  # optimizer states in a form that any layout loads
    offloaded: int = 0  # pinned: optimizer states kept on the host
    windows: int = 0  # of calibration, between blocks, and masks

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


REMEDIES = {
    "saving": "more data parallelism divides a save; --no-save-optim omits most of it",
    "gathering": "leave --dist-ckpt-optim-fully-reshardable out: it gathers a model-parallel rank's states in every "
    "data-parallel one, whatever their number",
    "offloaded": "a smaller --optimizer-offload-fraction, or more data parallelism",
    "windows": "more data parallelism, or fewer --calibration-sequences",
    "workers": "a smaller --num-workers",
}


def node(
    args: argparse.Namespace, shape: ModelShape, stages: Sequence[PipelineStage], ranks: int, trains: bool
) -> Host:
    """The memory of a node with ``ranks`` ranks, all of the stage with the most parameters."""
    parameters = max((stage.parameters for stage in stages), default=0)
    processes = int(ranks * PROCESS)
    if not trains:
        return Host(processes=processes, windows=ranks * _windows(args, shape, stages))
    replicas = args.data_parallel_size * args.context_parallel_size
    states = 0 if args.no_save_optim or args.optimizer == "sgd" else 3 * FP32  # a master and two moments
    gathers = bool(getattr(args, "dist_ckpt_optim_fully_reshardable", False)) and args.use_distributed_optimizer
    saves = args.save is not None
    loading = max(ranks // args.tensor_model_parallel_size, 1)  # ranks that read data: one per tensor-parallel group
    weights = parameters * args.params_dtype.itemsize / (replicas if args.ckpt_fully_parallel_save else 1)
    shard = parameters * states / (replicas if args.use_distributed_optimizer or args.ckpt_fully_parallel_save else 1)
    offloaded = 0.0
    if args.optimizer_cpu_offload:  # weights and gradients in fp32, and two moments
        offloaded = 4 * FP32 * parameters / replicas * args.optimizer_offload_fraction
    return Host(
        processes=processes,
        workers=int(loading * args.num_workers * WORKER),
        order=ranks * _order(args),
        saving=int(ranks * (weights + shard)) if saves else 0,
        gathering=ranks * parameters * states if saves and gathers else 0,
        offloaded=int(ranks * offloaded),
    )


def _order(args: argparse.Namespace) -> int:
    """Four bytes per sample of a permuted range (``data/streams.py``)."""
    if getattr(args, "stream_permutation_seed", None) is None:
        return 0
    return int(4 * args.train_iters * args.global_batch_size)


def _windows(args: argparse.Namespace, shape: ModelShape, stages: Sequence[PipelineStage]) -> int:
    """``sparsify``'s residual stream of a replica's windows (``sparse/driver.py``), and the masks of its stage."""
    if getattr(args, "method", None) is None or not hasattr(args, "modules"):  # None: all of them
        return 0
    shared = args.tensor_model_parallel_size if args.sequence_parallel else 1
    windows = -(-args.calibration_sequences // args.data_parallel_size)
    states = windows * args.seq_length // shared * shape.hidden_size * args.params_dtype.itemsize
    return int(states + max((stage.linears for stage in stages), default=0))


# Command lines with checkpoints that are elsewhere or not made yet. A file (``--model``) can give their models' flags
# instead: Megatron's flags; ``#`` starts a comment. The flags that would read the checkpoint are left out of the dry
# run and reported as not checked.


STARTS = ("--pretrained-checkpoint", "--shape-from")


@dataclass(frozen=True)
class CommandLine:
    """``argv`` for a dry run on this machine; ``absent`` are the omitted flags with their directories."""

    argv: list[str]
    absent: dict[str, str]


def resolve(argv: list[str], model: str | None, hf: str | None = None) -> CommandLine:
    """Omit flags whose checkpoints are elsewhere, or in a store that this machine cannot reach.

    UsageError if the model's arguments are in one of them and neither ``model`` nor ``hf`` gives them; UsageError or
    StorageError if the store of ``--load`` or ``--save`` cannot be reached."""
    if model is not None and hf is not None:
        raise UsageError("--model, --hf", got="both", expected="at most one of them")
    arguments.refuse_malformed(argv)
    for flag in ("--load", "--save"):  # the dry run reads them
        if (value := _value(argv, flag)) is not None and storage.is_stored(value):
            storage.refuse_unusable(flag, value)
            storage.path(value).exists()
    load, pretrained, scratch = (_value(argv, flag) for flag in ("--load", *STARTS))
    starts = zip(STARTS, (pretrained, scratch), strict=True)
    absent = {flag: path for flag, path in starts if path is not None and _is_absent(path)}
    # Megatron's precedence: the run's own checkpoint if it has one, else its start.
    source = load if load is not None and not _is_absent(load) else pretrained or load
    left_out = set(absent)
    if _is_absent(source):
        left_out.add("--use-checkpoint-args")
    model_elsewhere = "--shape-from" in absent or (source is not None and scratch is None and _is_absent(source))
    if model is None and hf is None and model_elsewhere and _value(argv, "--num-layers") is None:
        raise UsageError(
            "--model, --hf", got="neither", expected="a file with the model's flags, or its Hugging Face config",
            why=f"they are in {absent.get('--shape-from', source)}, which is not on this machine",
        )  # fmt: skip
    described: list[str] = []
    if left_out or (source is None and scratch is None):
        described = read_flags(model) if model is not None else [] if hf is None else flags_of(args_of(hf))
    return CommandLine([*described, *_without(argv, left_out)], absent)


def _without(argv: list[str], flags: set[str]) -> list[str]:
    """``argv`` without these flags and their values."""
    words = iter(argv)
    kept = []
    for word in words:
        flag, has_value, _ = word.partition("=")
        if flag not in flags:
            kept.append(word)
        elif flag in STARTS and not has_value:
            next(words, None)
    return kept


def read_flags(path: str | Path) -> list[str]:
    """The flags in a file, as words."""
    if not Path(path).is_file():
        raise UsageError("--model", got=path, expected="a file with the model's flags")
    return shlex.split(Path(path).read_text(), comments=True)


def flags_of(args: Mapping[str, Any]) -> list[str]:
    """Megatron's flags for model arguments, where they differ from its defaults."""
    words: list[str] = []
    for action in arguments.megatron_parser()._actions:
        value = args.get(action.dest)
        if value is None or value == action.default or (action.nargs == 0 and action.const != value):
            continue
        words.append(action.option_strings[0])
        if action.nargs != 0:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return words


def _is_absent(path: str | None) -> bool:
    if path is None or (storage.is_stored(path) and not storage.is_reachable(path)):
        return path is not None
    return not storage.path(path).exists()


def _value(argv: list[str], flag: str) -> str | None:
    """The last value of ``flag``, as argparse reads it."""
    found = None
    for place, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        elif word == flag and place + 1 < len(argv):
            found = argv[place + 1]
    return found
