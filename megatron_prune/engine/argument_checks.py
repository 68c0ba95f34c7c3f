"""Arguments that Megatron would answer with one traceback per rank, or train with without a word.

``check_finite`` and ``check_recipe`` are tables of what is known; they name the flag. ``explain_assertions`` turns the
rest of what Megatron asserts about its arguments into one line.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from megatron_prune import screen
from megatron_prune.errors import CommandLineError, UsageError

_AT_LEAST_0 = ("lr", "min_lr", "lr_warmup_init", "weight_decay", "start_weight_decay", "end_weight_decay", "clip_grad",
               "init_method_std", "embedding_init_method_std", "adam_eps", "sgd_momentum", "lr_warmup_iters",
               "lr_warmup_samples", "num_workers", "loss_scale", "initial_loss_scale", "min_loss_scale")  # fmt: skip
_BELOW_1 = ("adam_beta1", "adam_beta2", "lr_warmup_fraction")
_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
          "max_position_embeddings")  # fmt: skip
_SHARES = ("hidden_dropout", "attention_dropout")


def check_finite(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """UsageError for a flag whose value is NaN or infinite, and is not its default."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, float) and not math.isfinite(one) and value != action.default:
                raise UsageError(max(action.option_strings, key=len), got=one, expected="a finite number")


def check_numbers(args: argparse.Namespace) -> None:
    """UsageError for a number of the training recipe that is out of its range."""
    ranges: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
        (_AT_LEAST_0, "at least 0", lambda value: value >= 0),
        (_BELOW_1, "a number from 0 to less than 1", lambda value: 0 <= value < 1),
        (_SHARES, "a fraction from 0 to 1", lambda value: 0 <= value <= 1),
    )
    for names, allowed, is_within in ranges:
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not is_within(value):
                raise UsageError(_flag(name), got=value, expected=allowed)


def check_shape(args: argparse.Namespace) -> None:
    """UsageError for sizes that make no model, a sequence longer than the model's positions, and two activations."""
    for name in _SIZES:
        if (size := getattr(args, name)) is not None and size < 1:
            raise UsageError(_flag(name), got=size, expected="at least 1")
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.group_query_attention and heads and groups and heads % groups:
        raise UsageError("--num-query-groups", got=groups, expected=f"a divisor of --num-attention-heads {heads}")
    if args.position_embedding_type == "rope" and args.kv_channels and args.kv_channels % 2:
        raise UsageError("--kv-channels", got=args.kv_channels, expected="an even number with rotary positions")
    length, positions = args.seq_length, args.max_position_embeddings
    if length is not None and positions is not None and length > positions:
        raise UsageError(
            "--seq-length", got=length, expected=f"at most {positions}", why="the model has so many positions",
            do="give a shorter one, or a larger --max-position-embeddings where the model allows it",
        )  # fmt: skip
    activations = [_flag(name) for name in ("swiglu", "quick_geglu", "squared_relu") if getattr(args, name, False)]
    if len(activations) > 1:
        raise UsageError(", ".join(activations), got="all of them", expected="one activation")


def check_recipe(args: argparse.Namespace) -> None:
    """UsageError for a training recipe whose parts contradict each other. Before Megatron validates."""
    if args.lr is None:
        raise UsageError("--lr", got="nothing", expected="a learning rate")
    for name in ("min_lr", "lr_warmup_init"):
        if (getattr(args, name) or 0) > args.lr:
            raise UsageError(_flag(name), got=getattr(args, name), expected=f"at most --lr {args.lr}")
    for unit in ("iters", "samples"):
        length, decay, warmup, cooldown = (
            getattr(args, f"{name}_{unit}") for name in ("train", "lr_decay", "lr_warmup", "lr_wsd_decay")
        )
        if length is None:
            continue
        flag, longest = (f"--lr-decay-{unit}", decay) if decay is not None else (f"--train-{unit}", length)
        if longest < 1:
            raise UsageError(flag, got=longest, expected="at least 1")
        if warmup >= longest:
            raise UsageError(
                f"--lr-warmup-{unit}", got=warmup, expected=f"fewer than the {longest} of {flag}",
                why="the learning rate would never reach --lr",
            )  # fmt: skip
        if args.lr_decay_style == "WSD" and cooldown is None:
            raise UsageError(f"--lr-wsd-decay-{unit}", got="nothing", expected="a number with --lr-decay-style WSD")
    _check_batch(args)


def _check_batch(args: argparse.Namespace) -> None:
    """The global batch is whole micro-batches on every replica; a batch size that ramps up has its own rules."""
    if args.micro_batch_size is None:
        raise UsageError("--micro-batch-size", got="nothing", expected="the samples of a rank at a time")
    if args.global_batch_size is None or args.rampup_batch_size is not None:
        return
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    replicas = max(args.world_size // ranks, 1)
    if args.global_batch_size % (args.micro_batch_size * replicas):
        raise UsageError(
            "--global-batch-size", got=args.global_batch_size,
            expected=f"a multiple of {args.micro_batch_size * replicas}",
            why=f"--micro-batch-size {args.micro_batch_size} on {replicas} data-parallel "
            f"{'replica' if replicas == 1 else 'replicas'}",
        )  # fmt: skip


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@contextlib.contextmanager
def explain_assertions(*kinds: type[Exception]) -> Iterator[None]:
    """Turn an assertion of Megatron about its arguments into a CommandLineError. Every rank fails alike: the first says
    it (``__main__``), and keeps the traceback in its log."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, kinds or (AssertionError, ValueError, RuntimeError, NotImplementedError, TypeError)):
            raise
        last: Any = traceback.extract_tb(error.__traceback__)[-1]
        if "/megatron/" not in last.filename:
            raise
        if screen.is_diverted() and screen.rank() == 0:
            traceback.print_exc()
        said = " ".join(str(error).split()) or (last.line or type(error).__name__)
        place = f"{last.filename.rpartition('/megatron/')[2]}:{last.lineno}"
        raise CommandLineError(f"Megatron refuses these arguments: {said} (megatron/{place})") from error
