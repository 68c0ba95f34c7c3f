"""The task that judges candidates, ready for the model: read, and tokenized as the model's own text was.

The tokenizer is that of ``--tokenizer-type`` and ``--tokenizer-model``, or else the one that an imported
checkpoint carries. All that can be wrong with a task is refused here, before anything starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from megatron_prune.calibrate.accuracy import accuracies
from megatron_prune.calibrate.statistics import TaskScore
from megatron_prune.candidates import Candidate
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.data import multiple_choice, tokenizers
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.engine import runtime
from megatron_prune.errors import UsageError


def requests(args: argparse.Namespace, argv: list[str], path: str, wanted: str) -> Requests:
    """The task in ``path``, which must be the one with the fingerprint ``wanted``, for the checkpoint ``--load``.

    UsageError or DataError where file, tokenizer and model do not fit each other.
    """
    task = multiple_choice.read(path)
    if task.fingerprint != wanted:
        raise UsageError("--task-data", given=path, allowed="the examples that the plan was asked for with")
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
    checkpoint = open_checkpoint(runtime.loaded_directory(args))
    tokenizer = _tokenizer(args, argv, checkpoint)
    tokenizers.check_fits_checkpoint(tokenizer, checkpoint)
    return multiple_choice.encode(task, tokenizer, args.max_position_embeddings)


def _tokenizer(args: argparse.Namespace, argv: list[str], checkpoint: Checkpoint) -> Tokenizer:
    from megatron_prune.engine.arguments import given

    if args.tokenizer_type in (None, "NullTokenizer"):
        if checkpoint.huggingface is None:
            raise UsageError(
                "--tokenizer-type", given="nothing", allowed=" or ".join(tokenizers.TYPES),
                why="a task is text, and this checkpoint carries no tokenizer",
            )  # fmt: skip
        return tokenizers.load_tokenizer("HuggingFaceTokenizer", checkpoint.huggingface)
    if args.tokenizer_model is None:
        raise UsageError("--tokenizer-model", given="nothing", allowed="its files, with --tokenizer-type")
    settings: dict[str, Any] = {}
    if args.tokenizer_type == "TikTokenizer":
        own = args.vocab_size if given(argv, "--vocab-size") else checkpoint.args.get("vocab_size")
        settings = {
            "vocab_size": own,
            "pattern": args.tiktoken_pattern,
            "num_special_tokens": args.tiktoken_num_special_tokens,
            "special_tokens": args.tokenizer_special_tokens,
        }
    return tokenizers.load_tokenizer(args.tokenizer_type, args.tokenizer_model, **settings)


def task_scores(candidates: Sequence[Candidate], requests: Requests, likelihoods: torch.Tensor) -> list[TaskScore]:
    """The scores of ``candidates`` on a task, from ``likelihoods`` [candidates, choices]."""
    lengths = [len(sequence) - 1 for sequence in requests.sequences]
    return [
        TaskScore(accuracies(requests.task, row), sum(candidate.scoring_flops(length) for length in lengths))
        for candidate, row in zip(candidates, likelihoods, strict=True)
    ]
