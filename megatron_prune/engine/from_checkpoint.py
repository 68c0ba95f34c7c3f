"""The model's arguments from the checkpoint that the command line names, without ``--use-checkpoint-args``.

``take`` restores what Megatron's ``--use-checkpoint-args`` restores, and what it omits (``FORGOTTEN``): the
model's shape, then the sequence length, the precision and the tokenizer. A flag of what the model computes must agree
with the checkpoint, and is refused else (``model_arguments.of_the_function``); other values on the command line are
kept. With an explicit ``--use-checkpoint-args``, Megatron's precedence holds: what it restores overrides the command
line.

The checkpoint is that of ``--shape-from``, else that of ``--load`` if it holds one, else ``--pretrained-checkpoint``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prune import storage
from megatron_prune.checkpoint.model_arguments import (
    FORGOTTEN,
    differing_value,
    of_the_function,
    refuse_unrestored,
    stored_argument,
)
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration, iteration_directory
from megatron_prune.errors import UsageError

_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")  # required for a model
# An imported model has no training sequence length: its longest is used up to this limit, and required as a flag above.
LONGEST_UNSAID = 8192
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def given(argv: Sequence[str], *options: str) -> bool:
    """True if one of ``options`` is on the command line (as ``--x v`` or ``--x=v``)."""
    return any(word.split("=", 1)[0] in options for word in argv)


def has_checkpoint(path: str | None) -> bool:
    return path is not None and storage.path(path).is_dir() and find_iteration(path) is not None


def source(args: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint whose model this run builds; None if the command line names none that exists."""
    if args.shape_from is not None:
        return open_checkpoint(args.shape_from)
    if has_checkpoint(args.load):
        return open_checkpoint(iteration_directory(args.load, args.ckpt_step) if args.ckpt_step else args.load)
    return None if args.pretrained_checkpoint is None else open_checkpoint(args.pretrained_checkpoint)


def take(
    args: argparse.Namespace, parser: argparse.ArgumentParser, argv: list[str], load_args: Callable[..., Any]
) -> None:
    """Set what the command line does not give; ``load_args`` is Megatron's ``load_args_from_checkpoint``.

    Raises UsageError if ``--use-checkpoint-args`` is given without a checkpoint, CheckpointError for a checkpoint that
    cannot be read or that was trained with an argument which cannot be restored.
    """
    checkpoint = source(args)
    if checkpoint is None:
        if args.use_checkpoint_args:
            raise UsageError(
                "--use-checkpoint-args", got=f"--load {args.load}",
                expected="a checkpoint in --load or --pretrained-checkpoint",
            )  # fmt: skip
        return
    said = {
        action.dest: getattr(args, action.dest) for action in parser._actions if given(argv, *action.option_strings)
    }
    _ = checkpoint.shape  # refuses another kind of model, before Megatron fails on it
    if not args.use_checkpoint_args:
        refuse_contradictions(said, parser, argv, checkpoint)
    own_load, own_step = args.load, args.ckpt_step
    args.load = str(checkpoint.root)
    args.ckpt_step = None if checkpoint.release else checkpoint.iteration
    load_args(args)
    args.load, args.ckpt_step = own_load, own_step
    args.iteration = 0  # the loader sets it again from the checkpoint that is loaded
    if not args.use_checkpoint_args:
        vars(args).update(said)
    else:  # it overrode some of them
        refuse_contradictions(vars(args), parser, argv, checkpoint)
    for name, options in FORGOTTEN.items():
        stored = stored_argument(checkpoint.args, name)
        if stored is not None and not given(argv, *options):
            setattr(args, name, stored)
    refuse_unrestored(checkpoint.args, str(checkpoint.root), vars(args))
    _take_sequence_length(args, checkpoint)
    _take_precision(args, checkpoint)


def refuse_contradictions(
    said: Mapping[str, Any], parser: argparse.ArgumentParser, argv: Sequence[str], checkpoint: Checkpoint
) -> None:
    """UsageError for a flag that asks for another function than the checkpoint's: ``said`` are values by argument."""
    for action in parser._actions:
        options = [option for option in action.option_strings if given(argv, option)]
        if not options or action.dest not in of_the_function():
            continue
        stored = differing_value(checkpoint.args, action.dest, said[action.dest])
        if stored is not None:
            raise UsageError(
                options[0], expected=f"{stored}, as in {checkpoint.root}",
                got="the flag" if action.nargs == 0 else said[action.dest],
                why="its weights are those of another model", do="omit the flag",
            )  # fmt: skip


def _take_sequence_length(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    if args.encoder_seq_length is not None:  # Megatron's other name for it: one of the two may be set
        args.seq_length = None
    elif args.seq_length is None:
        longest = checkpoint.args.get("max_position_embeddings")
        args.seq_length = longest if longest is not None and longest <= LONGEST_UNSAID else None


def _take_precision(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    if args.fp32 and (args.bf16 or args.fp16):
        raise UsageError("--fp32", expected="one of the three", got="it with --bf16 or --fp16")
    if not (args.fp32 or args.bf16 or args.fp16):
        args.bf16, args.fp16 = bool(checkpoint.args.get("bf16")), bool(checkpoint.args.get("fp16"))


def take_tokenizer(args: argparse.Namespace) -> None:
    """Set the tokenizer if the data needs its end-of-text token and no flag gives it; before Megatron builds it.

    A run that continues from its own save keeps its original tokenizer, so ``--load`` is read last.
    """
    if args.tokenizer_type is None and (args.reset_position_ids or args.reset_attention_mask or args.eod_mask_loss):
        for named in (args.shape_from, args.pretrained_checkpoint, args.load if has_checkpoint(args.load) else None):
            folder = None if named is None else tokenizer_folder(open_checkpoint(named))
            if folder is not None:
                args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(folder)
                return


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """The Hugging Face tokenizer that a checkpoint carries."""
    folder = checkpoint.huggingface
    return folder if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def refuse_shapeless(args: argparse.Namespace) -> None:
    """UsageError if neither a checkpoint nor the command line gives the model's shape."""
    absent = [f"--{name.replace('_', '-')}" for name in _SHAPE if getattr(args, name) is None]
    if absent:
        raise UsageError(
            absent[0], got="nothing" + (f", and no checkpoint in --load {args.load}" if args.load else ""),
            expected="a checkpoint that says the model's shape (--load, --pretrained-checkpoint or --shape-from), or "
            f"{', '.join(absent)}",
        )  # fmt: skip
    if args.seq_length is None and args.encoder_seq_length is None:
        raise UsageError(
            "--seq-length", expected="a number of tokens", got="nothing",
            why=f"the model takes up to {args.max_position_embeddings}, and no checkpoint says with how many it was "
            "trained",
        )  # fmt: skip
