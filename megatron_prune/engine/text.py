"""What text for a loaded model needs: its tokenizer, and sequences that keep their lengths.

The tokenizer is that of ``--tokenizer-type`` and ``--tokenizer-model``, or else the one that an imported
checkpoint carries.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import tokenizers
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.engine import runtime
from megatron_prune.errors import UsageError


def refuse_fixed_lengths(args: argparse.Namespace) -> None:
    """A task's sequences are as long as they are; UsageError where the model's kernels want multiples."""
    if args.fp8:
        raise UsageError(
            "--fp8-format", given=args.fp8, allowed="nothing with a task",
            why="its sequences keep their lengths, and FP8 kernels take multiples of 16",
        )  # fmt: skip
    if args.sequence_parallel:
        raise UsageError(
            "--sequence-parallel", given="on", allowed="off with a task",
            why="its sequences keep their lengths, and ranks share out multiples of their number",
        )  # fmt: skip


def tokenizer(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of the checkpoint ``--load``; UsageError or DataError where there is none, or it does not fit."""
    checkpoint = open_checkpoint(runtime.loaded_directory(args))
    if args.tokenizer_type in (None, "NullTokenizer"):
        if checkpoint.huggingface is None:
            raise UsageError(
                "--tokenizer-type", given="nothing", allowed=" or ".join(tokenizers.TYPES),
                why="a task is text, and this checkpoint carries no tokenizer",
            )  # fmt: skip
        found = tokenizers.load_tokenizer("HuggingFaceTokenizer", checkpoint.huggingface)
    elif args.tokenizer_model is None:
        raise UsageError("--tokenizer-model", given="nothing", allowed="its files, with --tokenizer-type")
    else:
        settings: dict[str, Any] = {}
        if args.tokenizer_type == "TikTokenizer":
            settings = {
                "vocab_size": args.vocab_size,
                "pattern": args.tiktoken_pattern,
                "num_special_tokens": args.tiktoken_num_special_tokens,
                "special_tokens": args.tokenizer_special_tokens,
            }
        found = tokenizers.load_tokenizer(args.tokenizer_type, args.tokenizer_model, **settings)
    tokenizers.check_fits_checkpoint(found, checkpoint, args.vocab_size)
    return found
