"""A target and a training run in, weights and learned masks out: the first part of Sheared-LLaMA."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_prune import methods, screen, storage, verbs
from megatron_prune.artifacts import refuse_unwritable
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.engine import layers, runtime
from megatron_prune.errors import UsageError
from megatron_prune.methods.options import NoOptions
from megatron_prune.methods.sheared_llama import kinds, refuse_unfit
from megatron_prune.structured import target as targets
from megatron_prune.training import data, lineage, pretrain
from megatron_prune.training.account import ACCOUNT
from megatron_prune.training.learned_masks import Learner, LearnerSettings

METHOD = "sheared-llama"


def learn_masks(own: verbs.LearnMasksSettings, words: Sequence[str]) -> int:
    """Train; 0 when the run is complete, also when it was so before. ``words`` are Megatron's flags."""
    wanted = targets.from_settings(own)  # no layout decides the shape
    args = runtime.start("learn-masks", words, own, complete=_complete)
    if args.rank == 0:
        refuse_unwritable("--save", storage.path(args.save) / ACCOUNT)
    source = ModelShape.from_args(vars(args))
    wanted.limits.refuse_other_model(vars(args), args.params_dtype)
    target = wanted.choose(source, methods.get(METHOD), NoOptions())
    refuse_unfit(source, target)
    cut = ", ".join(f"{kind.kept} of {kind.size} {kind.name}" for kind in kinds(source, target))
    screen.say(f"learning masks that keep {cut}")
    return pretrain.run(
        args, Learner(args, LearnerSettings(source, target, own.mask_lr, own.mask_ramp, own.multiplier_lr))
    )


def _complete(args: argparse.Namespace, argv: list[str]) -> None:
    if args.mask_tokens is not None:
        args.stream_range = _unseen(args)
    pretrain.complete(args, argv)
    layers.refuse(args, "masks are learned for layers of one shape")
    for unfit, flag, got, expected, why in (
        (args.save is None, "--save", "nothing", "a directory", "the masks are written next to the weights"),
        (args.fp16, "--fp16", "on", "--bf16 or neither", "the loss scale is not taken out of the masks' gradients"),
        (
            args.calculate_per_token_loss, "--calculate-per-token-loss", "on", "off",
            "masks' gradients are means over micro-batches",
        ),
        (args.context_parallel_size > 1, "--context-parallel-size", args.context_parallel_size, "1", "not proven"),
        (args.use_torch_fsdp2, "--use-torch-fsdp2", "on", "off", "not proven"),
        (args.use_megatron_fsdp, "--use-megatron-fsdp", "on", "off", "not proven"),
        (
            args.cuda_graph_impl != "none", "--cuda-graph-impl", args.cuda_graph_impl, "none",
            "a captured graph would repeat one draw of the masks",
        ),
        (args.optimizer not in ("adam", "sgd"), "--optimizer", args.optimizer, "adam or sgd", "not proven"),
        (not args.mask_lr > 0, "--mask-lr", args.mask_lr, "a number above 0", ""),
        (
            args.multiplier_lr is not None and not args.multiplier_lr > 0,
            "--multiplier-lr", args.multiplier_lr, "a number above 0", "",
        ),
        (not 0 <= args.mask_ramp <= 1, "--mask-ramp", args.mask_ramp, "a fraction from 0 to 1", ""),
        (not args.lr, "--lr", args.lr, "a number above 0", "masks follow its schedule"),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, got=got, expected=f"{expected} with learn-masks", why=why)


def _unseen(args: argparse.Namespace) -> str:
    """The range of ``--mask-tokens``: the samples after the last that the parent was trained on, of this stream."""
    batch = (args.global_batch_size or 0) * (args.seq_length or 0)
    for wrong, flag, got, expected in (
        (args.stream_range is not None, "--stream-range", args.stream_range, "no such flag with --mask-tokens"),
        (not args.seq_length, "--seq-length", "nothing", "a number with --mask-tokens"),
        (not args.global_batch_size, "--global-batch-size", "nothing", "a number with --mask-tokens"),
        (
            args.mask_tokens < 1 or (batch and args.mask_tokens % batch), "--mask-tokens", args.mask_tokens,
            f"a multiple of {batch}, the tokens of a step",
        ),
        (not (blend := data.train_blend(args)), "--train-data-path", "nothing", "tokenized corpora with --mask-tokens"),
    ):  # fmt: skip
        if wrong:
            raise UsageError(flag, got=got, expected=expected)
    stream = data.described(blend, args.seq_length, args.stream_seed, args.stream_epochs)["id"]
    parent = args.pretrained_checkpoint
    seen = lineage.seen(lineage.of(open_checkpoint(parent))) if parent else []
    start = max((one["range"][1] for one in seen if one["stream"] and one["stream"]["id"] == stream), default=0)
    return f"{start}:{start + args.mask_tokens // args.seq_length}"
