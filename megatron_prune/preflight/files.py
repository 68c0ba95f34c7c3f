"""The checks on what a command line reads and writes: text, checkpoint, masks, teacher, and space for the saves."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_prune import storage as places
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.errors import MegatronPruneError
from megatron_prune.preflight import cost
from megatron_prune.preflight.checks import Finding, JobQuestion, online_teacher
from megatron_prune.preflight.dry_run import Rehearsal

LONG_STREAM = 20e9  # tokens from which rank 0 may exceed its time limit building indices


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
    if online_teacher(args):
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
