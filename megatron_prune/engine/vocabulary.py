"""Padding of the vocabulary: how many embeddings are words, and giving the others no probability.

Megatron pads the vocabulary to a multiple of ``--make-vocab-size-divisible-by`` × TP and then treats the padding as
words: its rows count in every softmax, and training pushes them down. An exported model lacks them. So here no loss,
score or log-likelihood counts them, in training either: they get no gradient, and two runs that differ only in their
padding are the same run.

``take`` and ``settle`` find the vocabulary when arguments are parsed. ``mask_padding`` hooks the output layer, which
every loss passes through: Megatron's loop, its validation, and the forward passes of the other verbs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from megatron_prune import screen
from megatron_prune.checkpoint.layout import vocabulary
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.errors import UsageError


def take(args: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Set ``args.vocab_size``, if no flag did, from the ``checkpoint`` of the model; before validation.

    If neither gives it and no tokenizer will, every embedding counts as a word, and rank 0 prints a note.
    """
    if checkpoint is not None:
        args.vocab_size = checkpoint.args.get("vocab_size")
    if args.vocab_size is None and args.tokenizer_type == "NullTokenizer":
        args.vocab_size = args.padded_vocab_size  # without one, Megatron cannot build this tokenizer
        if checkpoint is not None and args.rank == 0:
            screen.say(
                f"{checkpoint.root} does not say how many of its {checkpoint.shape.padded_vocab_size} embeddings are "
                "words: all of them count in losses. If some are padding, give --vocab-size"
            )


def settle(args: argparse.Namespace, *, given: bool) -> None:
    """Make ``args.vocab_size`` the number of words, at most ``args.padded_vocab_size``. Call with the tokenizer built.

    UsageError if ``--vocab-size``, if it is ``given``, or else the tokenizer has more words than the embedding.
    """
    from megatron.training import get_tokenizer

    flag = "--vocab-size" if given else "--tokenizer-model"
    if args.vocab_size is None:
        args.vocab_size, given = get_tokenizer().vocab_size, True
    if given and args.vocab_size > args.padded_vocab_size:
        raise UsageError(
            flag, got=args.vocab_size, expected=f"a vocabulary of at most {args.padded_vocab_size}",
            why="the model has no embeddings for more",
        )  # fmt: skip
    args.vocab_size = vocabulary(vars(args))


def mask_padding(chunks: Sequence[torch.nn.Module], args: argparse.Namespace) -> None:
    """Give padding no probability in the logits of these chunks of a model, on every TP rank."""
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import unwrap_model

    rank, words, padded = mpu.get_tensor_model_parallel_rank(), args.vocab_size, args.padded_vocab_size

    def mask(_: Any, __: Any, output: tuple[torch.Tensor, Any]) -> None:
        # In place and outside autograd: a probability of zero has a gradient of exactly zero, and a graph node
        # would cost a copy of the logits. Finite: if all of a rank's rows are padding, fused cross entropies
        # subtract its own maximum, and -inf - -inf is not a number.
        with torch.no_grad():
            logits = output[0]  # [s, b, padded vocabulary / TP]; whole if the layer gathers it
            first = rank * logits.shape[-1] if logits.shape[-1] < padded else 0
            logits[..., max(0, words - first) :] = torch.finfo(logits.dtype).min

    for chunk in chunks:
        model: Any = unwrap_model(chunk)
        if model.post_process and words < padded:
            model.output_layer.register_forward_hook(mask)


@torch.no_grad()
def clear_padding(chunks: Sequence[torch.nn.Module], args: argparse.Namespace) -> None:
    """Zero the padding rows, as an import writes them: after a model is built, before a checkpoint is loaded."""
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import unwrap_model

    first = args.padded_vocab_size // args.tensor_model_parallel_size * mpu.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for name, parameter in unwrap_model(chunk).named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter[max(0, args.vocab_size - first) :] = 0
