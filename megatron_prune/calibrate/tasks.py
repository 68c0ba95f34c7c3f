"""The task that judges candidates, ready for the model: read, and tokenized as the model's own text was.

All that can be wrong with a task is refused here, before anything starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from megatron_prune.calibrate.accuracy import accuracies
from megatron_prune.calibrate.statistics import TaskScore
from megatron_prune.candidates import Candidate
from megatron_prune.data import multiple_choice
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.engine import text
from megatron_prune.errors import UsageError


def requests(args: argparse.Namespace, path: str, wanted: str) -> Requests:
    """The task in ``path``, which must be the one with the fingerprint ``wanted``, for the checkpoint ``--load``.

    UsageError or DataError where file, tokenizer and model do not fit each other.
    """
    task = multiple_choice.read(path)
    if task.fingerprint != wanted:
        raise UsageError("--task-data", given=path, allowed="the examples that the plan was asked for with")
    text.refuse_fixed_lengths(args)
    return multiple_choice.encode(task, text.tokenizer(args), args.max_position_embeddings)


def task_scores(candidates: Sequence[Candidate], requests: Requests, likelihoods: torch.Tensor) -> list[TaskScore]:
    """The scores of ``candidates`` on a task, from ``likelihoods`` [candidates, choices]."""
    lengths = [len(sequence) - 1 for sequence in requests.sequences]
    return [
        TaskScore(accuracies(requests.task, row), sum(candidate.scoring_flops(length) for length in lengths))
        for candidate, row in zip(candidates, likelihoods, strict=True)
    ]
