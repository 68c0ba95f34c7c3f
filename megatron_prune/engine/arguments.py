"""Megatron's parser plus this package's flags, the arguments of the named checkpoint, and object stores.

``parse`` does what Megatron's ``parse_and_validate_args`` does, with two differences: if a checkpoint is named, the
model's arguments come from it (``from_checkpoint.take``), and cases in which Megatron would fail an assertion are
refused with a sentence.

Megatron reads and writes checkpoints in an object store (``msc://``) through the Multi-Storage Client, with
``--enable-msc``. Some of its flags still treat such an address as a local directory: these are refused here
(``refuse_unusable``, ``refuse_unfit``), before anything starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_prune import storage, verbs
from megatron_prune.checkpoint.layout import OTHER_MODELS
from megatron_prune.checkpoint.tracker import (
    find_iteration,
    is_sound,
    refuse_foreign,
    refuse_remote,
    repair_tracker,
)
from megatron_prune.data import tokenizers
from megatron_prune.engine import (
    argument_checks,
    cpu,
    fp8,
    from_checkpoint,
    installed,
    layers,
    parallel_residual,
    refusals,
    resume,
    vocabulary,
)
from megatron_prune.errors import CheckpointError, CommandLineError, UsageError
from megatron_prune.settings import Settings, add_flags, nearest

# Megatron's assertions on these name no flag, or it divides by them at the end of a run. Absent flags are None.
_POSITIVE = (
    "seed", "global_batch_size", "micro_batch_size", "seq_length", "stream_epochs", "save_interval", "eval_interval",
    "log_interval", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "dynamic_batch_every", "domain_samples",
)  # fmt: skip
_NOT_NEGATIVE = ("eval_iters", "stream_permutation_seed", "random_masks")
_SEEDS = ("seed", "stream_permutation_seed")  # NumPy's have 32 bits

Complete = Callable[[argparse.Namespace, list[str]], None]


def parse(
    verb: str, words: Sequence[str], own: Settings | None = None, *, complete: Complete | None = None
) -> argparse.Namespace:
    """Parse and validate ``words``, Megatron's part of a command line; sets Megatron's global arguments and timers.

    The verb's ``own`` settings become attributes of the arguments. ``complete(args, argv)`` may set values that the
    verb knows before Megatron validates; ``argv`` is the whole command line.

    Raises UsageError, CommandLineError or CheckpointError before any process group exists.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    argv = [*(own.words() if own is not None else ()), *words]
    refuse_unusable(verb, argv)
    refusals.refuse_yaml(argv)
    # Megatron reads sys.argv; nothing else sets it.
    sys.argv = [f"megatron_prune {verb}", *cpu.flags(), *words]
    parsers: list[argparse.ArgumentParser] = []

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(_with_own_flags(parser))
        refuse_unknown(parser, verb, words, own)
        return parser

    args = parse_args(extra_args_provider=add)
    vars(args).update({} if own is None else own.to_json())
    refusals.refuse_without_effect(parsers[0], args, argv)
    _refuse_unfit_numbers(args)
    argument_checks.check_finite(parsers[0], args)
    argument_checks.check_numbers(args)
    _refuse_unfit_ranks(args)
    if args.bf16 and args.fp16:
        raise UsageError("--bf16, --fp16", expected="at most one of them", got="both")
    _refuse_missing_gpu(args)
    _refuse_expandable_segments(args)
    refuse_unfit(args)
    fp8.apply_preset(args, argv)
    _resolve_checkpoint_paths(args)
    if hasattr(args, "start_over"):  # a verb that trains
        resume.resolve_start(args)
    if not from_checkpoint.given(argv, "--use-tokenizer-model-from-checkpoint-args"):
        # Keep the command line's tokenizer: a stored one is a path on the machine that made the checkpoint.
        args.use_tokenizer_model_from_checkpoint_args = False

    _refuse_other_models(args, argv)
    from_checkpoint.take(args, parsers[0], argv, load_args_from_checkpoint)
    parallel_residual.refuse_unfit(args)
    from_checkpoint.take_tokenizer(args)
    if args.tokenizer_type is None:
        args.tokenizer_type = "NullTokenizer"  # data is tokenized already
    if args.vocab_size is None:
        vocabulary.take(args, from_checkpoint.source(args))
    if complete is not None:
        complete(args, argv)
    from_checkpoint.refuse_shapeless(args)
    layers.settle(args)
    installed.settle(args)
    if args.tokenizer_type == "HuggingFaceTokenizer" and args.tokenizer_model is not None:
        tokenizers.refuse_absent(args.tokenizer_model)  # Megatron will load it
    argument_checks.check_shape(args)
    set_connections(args)
    with layers.unseen(args), argument_checks.explain_assertions():
        validate_args(args, {})
    layers.refuse_unfit(args)
    fp8.refuse_unfit(args)
    args.use_checkpoint_args = False  # done: they must not be read again
    with argument_checks.explain_assertions():
        set_global_variables(args)
    vocabulary.settle(args, given=from_checkpoint.given(argv, "--vocab-size"))
    parsed: argparse.Namespace = args
    return parsed


def megatron_parser() -> argparse.ArgumentParser:
    """Megatron's parser, with the flags that this package adds to it."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(prog="Megatron's flags", usage=argparse.SUPPRESS, add_help=False)
    return _with_own_flags(add_megatron_arguments(parser))


def _with_own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """``parser`` with the flags of ``verbs.Model``; escapes bare percent signs in Megatron's help texts, on which
    ``--help`` fails."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")
    add_flags(parser, verbs.ModelSettings)
    parser.set_defaults(**verbs.ModelSettings().to_json())
    return parser


def refuse_unknown(
    parser: argparse.ArgumentParser, verb: str, words: Sequence[str], own: Settings | None = None
) -> None:
    """Make ``parser`` print errors in one line; CommandLineError for an unknown flag, with the nearest known one."""

    def refuse(message: str) -> NoReturn:
        raise CommandLineError(f"{message}; `megatron-prune {verb} --help-megatron` lists Megatron's flags")

    parser.error = refuse  # type: ignore[method-assign]
    known = [*parser._option_string_actions, *([] if own is None else [flag.option for flag in own.flags()])]
    for word in words:
        flag = word.split("=", 1)[0]
        if flag.startswith("--") and flag not in known:
            hint = nearest(flag, known)
            raise CommandLineError(
                f"{flag} is not a flag of {verb}, nor of Megatron{f'; did you mean {hint}?' if hint else ''}"
            )


def _refuse_unfit_numbers(args: argparse.Namespace) -> None:
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value, least = getattr(args, name, None), int(name in _POSITIVE)
        if value is not None and (value < least or name in _SEEDS and value >= 1 << 32):
            allowed = f"a number from {least} to {(1 << 32) - 1}" if name in _SEEDS else f"at least {least}"
            raise UsageError(f"--{name.replace('_', '-')}", got=value, expected=allowed)


def _refuse_other_models(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Refuse at the start a model whose checkpoint nothing here could read at the end."""
    for name in OTHER_MODELS:
        flag = f"--{name.replace('_', '-')}"
        if getattr(args, name, None) and from_checkpoint.given(argv, flag):
            raise UsageError(
                flag, got=getattr(args, name), expected="no such flag here", why="only dense GPT models are supported"
            )


def _refuse_unfit_ranks(args: argparse.Namespace) -> None:
    """Refuse a model split over more ranks than there are, or over ranks that cannot form whole replicas."""
    split = {
        f"--{name.replace('_', '-')}": size
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        if (size := getattr(args, name)) > 1
    }
    if args.world_size % math.prod(split.values()):
        several = "sizes whose product" if len(split) > 1 else "a size that"
        raise UsageError(
            ", ".join(split), expected=f"{several} divides the number of ranks, {args.world_size}",
            got=", ".join(map(str, split.values())), do="start more ranks, for example with torchrun --nproc-per-node",
        )  # fmt: skip


def _refuse_missing_gpu(args: argparse.Namespace) -> None:
    """Refuse values that the CPU cannot handle by the flag's name, instead of a failing assertion later."""
    if not cpu.is_cpu():
        return
    if args.fp8 or args.fp8_preset:
        raise UsageError(
            fp8.FLAG if args.fp8_preset else "--fp8-format",
            got=args.fp8_preset or args.fp8,
            expected="no FP8 on this machine",
            why="FP8 needs a GPU of compute capability 8.9 or newer, and none is visible",
        )
    if args.fp4:
        raise UsageError(
            "--fp4-format",
            got=args.fp4,
            expected="no FP4 on this machine",
            why="FP4 needs a Blackwell GPU, and none is visible",
        )
    if args.transformer_impl != "local":
        raise UsageError(
            "--transformer-impl",
            got=args.transformer_impl,
            expected="local",
            why="Transformer Engine needs a GPU, and none is visible",
        )
    if args.async_save and args.use_persistent_ckpt_worker:  # alone, Megatron switches it off
        raise UsageError(
            "--async-save",
            got="on",
            expected="off on this machine",
            why="no GPU is visible, and without one the run would wait for ever for Megatron's saving process",
        )
    if args.distributed_backend != "gloo":
        raise UsageError(
            "--distributed-backend", got=args.distributed_backend, expected="gloo", why="no GPU is visible"
        )
    if args.sequence_parallel:
        raise UsageError(
            "--sequence-parallel",
            got="on",
            expected="off on this machine",
            why="no GPU is visible, and Megatron's local RMSNorm cannot do it",
        )


def _refuse_expandable_segments(args: argparse.Namespace) -> None:
    """Refuse asynchronous saves with expandable segments: the saving process cannot open these in most containers."""
    if not (args.async_save and args.use_persistent_ckpt_worker):
        return
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if re.search(r"expandable_segments\s*:\s*true", os.environ.get(name, ""), re.IGNORECASE):
            raise UsageError(
                "--async-save", got=f"{name}={os.environ[name]}", expected="expandable_segments to be off",
                why="the saving process gets CUDA tensors, and opening such segments fails in unprivileged containers: "
                "pytorch#165685",
                do=f"unset {name}, or save without --async-save",
            )  # fmt: skip


def set_connections(args: argparse.Namespace) -> None:
    """One hardware queue per device, unless the user chose: Megatron requires it for tensor and context parallelism up
    to Hopper, and refuses FSDP with it. CUDA reads it when its context is created."""
    if not (args.use_torch_fsdp2 or args.use_megatron_fsdp):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _resolve_checkpoint_paths(args: argparse.Namespace) -> None:
    """``--load DIR/iter_N`` means ``--load DIR --ckpt-step N``; broken trackers are repaired first."""
    for name in ("load", "pretrained_checkpoint", "shape_from", "teacher"):
        value = getattr(args, name, None)
        if value is None:
            continue
        path = storage.path(value)
        if name == "load" and args.save is not None and not path.exists():
            continue  # a run that resumes from its own save directory, which does not exist yet
        if not path.exists():
            _refuse_absent(name, value)
            continue
        if path.name.startswith("iter_") and path.name[5:].isdigit():
            if name == "load":
                args.ckpt_step = int(path.name[5:])
            elif name == "pretrained_checkpoint" and _latest(path.parent) != path.name:
                raise UsageError(
                    "--pretrained-checkpoint", got=value, expected=f"the latest iteration of {path.parent}",
                    why="Megatron loads only the latest iteration of a pretrained checkpoint",
                )  # fmt: skip
            setattr(args, name, value if name in ("shape_from", "teacher") else str(path.parent))
        elif path.name == "release" and name not in ("shape_from", "teacher"):
            setattr(args, name, str(path.parent))
        root = path.parent if path.name == "release" or path.name.startswith("iter_") else path
        refuse_foreign(root)
        if path == root and (args.save is None or root != storage.path(args.save)):
            find_iteration(root)  # refuses a tracker that names a save which is gone: its others are other weights
        _repair(args, root)
    if args.save is not None and storage.path(args.save).is_dir():
        _repair(args, storage.path(args.save))


def _refuse_absent(name: str, value: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    raise CheckpointError(f"{flag}: expected the directory of a checkpoint, got {value}, which does not exist")


def _repair(args: argparse.Namespace, root: Path) -> None:
    """Rank 0 checks whether the tracked checkpoint is complete; the others repair what Megatron could not read."""
    if args.rank == 0 or not is_sound(root):
        repair_tracker(root)


def _latest(root: Path) -> str | None:
    found = find_iteration(root)
    return None if found is None else found.directory.name


_CONVERTED = "--ckpt-convert-save"
_FLAGS = ("--load", "--save", "--pretrained-checkpoint", "--shape-from", "--teacher", "--masks", _CONVERTED)


def refuse_unusable(verb: str, argv: Sequence[str]) -> None:
    """Refuse (UsageError) a command line whose stores ``verb`` cannot use here, before Megatron reads it."""
    refuse_malformed(argv)
    if "--enable-msc" in argv and importlib.util.find_spec("multistorageclient") is None:
        raise UsageError(
            "--enable-msc", got="none", expected="the Multi-Storage Client to be installed for it", do=storage.EXTRA
        )
    for flag, value in _checkpoints(argv):
        if flag == "--save" and verb not in ("pretrain", "learn-masks"):
            refuse_remote(flag, value)
        storage.refuse_unusable(flag, value)


def refuse_malformed(argv: Sequence[str]) -> None:
    """Refuse (UsageError) what works on no machine: other URLs, and ``msc://`` without ``--enable-msc``."""
    for flag, value in _checkpoints(argv):
        if flag == _CONVERTED:
            storage.refuse_stored(flag, value, "Megatron's converter writes to disks")
        storage.refuse_other_url(flag, value)
        if storage.is_stored(value) and "--enable-msc" not in argv:
            raise UsageError(
                flag, got=value, expected="--enable-msc with the address of an object store",
                why="it switches on the Multi-Storage Client, through which Megatron reads and writes object stores",
            )  # fmt: skip


def _checkpoints(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(flag, value) of all flags that name a checkpoint."""
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in _FLAGS:
            yield flag, value or (argv[position + 1] if position + 1 < len(argv) else "")


def refuse_unfit(args: argparse.Namespace) -> None:
    """Refuse (UsageError) flags with which Megatron would treat a ``--save`` in a store as a local directory."""
    if args.save is None or not storage.is_stored(args.save):
        return
    for unfit, flag, given, allowed, why in (
        (
            args.ckpt_format != "torch_dist", "--ckpt-format", args.ckpt_format, "torch_dist",
            "Megatron writes the other formats with torch.save, to disks only",
        ),
        (
            args.save_retain_interval is not None, "--save-retain-interval", args.save_retain_interval, "no such flag",
            "Megatron removes old saves from disks only; let the store expire them",
        ),
        (args.log_progress, "--log-progress", "on", "off", "Megatron appends to a file there"),
        (
            args.non_persistent_ckpt_type == "global" and args.non_persistent_global_ckpt_dir is None,
            "--non-persistent-ckpt-type", "global", "local, or --non-persistent-global-ckpt-dir on a disk",
            "Megatron removes older ones from disks only",
        ),
        (
            args.wandb_project and not args.wandb_save_dir,
            "--wandb-save-dir", "nothing", "a directory of this machine", "by default it is in --save",
        ),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, got=given, expected=f"{allowed} where --save is in an object store", why=why)
