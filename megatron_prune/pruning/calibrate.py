"""Statistics of a parent, from one forward pass over calibration text.

Runs the parent at any TP×PP×DP and gathers everything that the forward-only methods need, for every ratio.
Data-parallel replicas divide the windows, evenly or not.

With ``score`` and ``statistics`` it runs the parent again on the same windows, once for every candidate without a
score, and adds the losses to the statistics. If the plan was made with ``--score-by task``, it adds their accuracies
on ``--task-data`` too.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune import methods, screen, verbs
from megatron_prune.artifacts import refuse_unwritable
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.engine import fp8, runtime
from megatron_prune.engine.from_checkpoint import given
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.structured import candidates
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics

FLAGS = (
    "--calibration-data-path",
    "--calibration-sequences",
    "--calibration-seq-length",
    "--calibration-sampling",
)
CHOOSING = FLAGS[1:]  # flags that choose windows


@dataclass(frozen=True)
class Calibrated:
    """The result of a calibration and its file, written by rank 0; ``scored``: the number of candidates, if any."""

    statistics: Statistics
    output: Path
    scored: int | None


def calibrate(own: verbs.CalibrateSettings, words: Sequence[str]) -> Calibrated:
    """Gather statistics, or score candidates; ``words`` are Megatron's flags. Every rank calls it."""
    output = _output(own)
    asked: tuple[Question, Statistics] | None = None
    requests: Requests | None = None

    def complete_all(args: argparse.Namespace, argv: list[str]) -> None:
        nonlocal asked, requests
        asked = _read_question(args, argv)
        complete(args, argv, gradients=own.gradients)
        requests = task_requests(args, asked[0] if asked else None, own.task_data)

    args = runtime.start("calibrate", words, own, complete=complete_all)
    from megatron_prune.calibration import run  # imports Megatron, which must be started first

    if asked is None:
        made = Calibrated(run.gather(args, gradients=own.gradients), output, None)
    else:
        question, known = asked
        missing = len(question.unscored(known))
        made = Calibrated(
            run.score(args, question, known, requests, lambda found: found.write(output)), output, missing
        )
    if args.rank == 0:
        made.statistics.write(output)
    return made


def _complete_gradients(args: argparse.Namespace) -> None:
    """Settings of a backward pass without an optimizer; UsageError for a precision that it is not made for."""
    if args.fp8:
        raise UsageError("--fp8-format", got=args.fp8, expected="no FP8 with gradients", do="give --bf16")
    if args.fp16:
        raise UsageError(
            "--fp16", got="it", expected="bf16 or fp32 with gradients", why="no loss scale keeps small ones from zero"
        )
    args.gradient_accumulation_fusion = False  # it adds to the buffer of an optimizer, which there is none of


def _output(own: verbs.CalibrateSettings) -> Path:
    """Where the statistics are written; UsageError if the flags that name files contradict each other."""
    if (own.score is None) != (own.statistics is None):
        raise UsageError("--score, --statistics", got="only one", expected="both or neither")
    if own.score is not None and own.gradients:
        raise UsageError("--gradients", got="it", expected="no such flag with --score, which adds no statistics")
    output = own.output or own.statistics
    if output is None or Path(output).suffix != ".safetensors":
        raise UsageError("--output", got=output or "nothing", expected="a file name that ends in .safetensors")
    if screen.rank() == 0:
        refuse_unwritable("--output", output)
    return Path(output)


def task_requests(args: argparse.Namespace, question: Question | None, moved: str | None = None) -> Requests | None:
    """The requests to the model of ``question``'s task, if there is one; a task that does not fit is refused.

    ``moved`` is its file's new path. Call after ``complete``.
    """
    from megatron_prune.calibration import scoring

    if question is None or question.task is None:
        if moved is not None:
            raise UsageError(
                "--task-data",
                got=moved,
                expected="no such flag where candidates are scored by their loss",
                do="plan with --score-by task to score them by their accuracy",
            )
        return None
    asked = methods.get(question.method).task(question.settings)
    assert asked is not None
    return scoring.requests(args, moved or asked.path, question.task)


def _read_question(args: argparse.Namespace, argv: list[str]) -> tuple[Question, Statistics] | None:
    """The files that ``--score`` reads; ``args`` get the windows of the statistics."""
    if args.score is None:
        return None
    for flag in CHOOSING:
        if given(argv, flag):
            raise UsageError(
                flag,
                got="it",
                expected="no such flag with --score",
                why="candidates are scored on the windows of --statistics",
            )
    question, of = candidates.read(args.score)
    found = statistics_file.read(args.statistics)
    if found.hash != of:
        raise UsageError(
            "--statistics",
            got=args.statistics,
            expected="the statistics that the candidates of --score were planned from",
            do="plan again with these",
        )
    if args.output is not None and statistics_file.json_path(args.output).is_file():
        with contextlib.suppress(MegatronPruneError):  # an interrupted attempt, or something else
            found = earlier if (earlier := statistics_file.read(args.output)).hash == of else found
    if len(found.calibrations) != 1:
        raise UsageError("--statistics", got=args.statistics, expected="statistics of one calibration, not merged ones")
    behind = found.calibrations[0]
    args.calibration_data_path = args.calibration_data_path or behind["prefix"]
    args.calibration_sequences, args.calibration_seq_length = found.sequences, found.seq_length
    return question, found


def complete(args: argparse.Namespace, argv: list[str], *, reads_text: bool = True, gradients: bool = False) -> None:
    """Fill in settings that follow from the calibration's flags, and refuse flags that contradict each other.

    Without ``reads_text`` nothing is calibrated, and the calibration's flags are refused.
    """
    runtime.refuse_layouts(args)
    if gradients:
        _complete_gradients(args)
    args.builds_model = reads_text  # if False, packages for Megatron's layers are not required
    if reads_text:
        fp8.refuse_delayed(args)
    for flag in () if reads_text else FLAGS:
        if given(argv, flag):
            raise UsageError(flag, got="it", expected="no such flag with a method that needs no statistics")
    if reads_text and args.calibration_data_path is None:
        raise UsageError(
            "--calibration-data-path",
            got="nothing",
            expected="the prefix of a tokenized corpus, PREFIX.bin without .bin",
        )
    if args.load is None:
        raise UsageError("--load", got="nothing", expected="the parent checkpoint")
    if given(argv, "--seq-length"):
        raise UsageError(
            "--seq-length",
            got=args.seq_length,
            expected="no such flag with this verb",
            do="give --calibration-seq-length",
        )
    if args.micro_batch_size not in (None, 1):
        raise UsageError(
            "--micro-batch-size",
            got=args.micro_batch_size,
            expected="1",
            why="larger batches would change the sums by rounding",
        )
    ranks = args.tensor_model_parallel_size
    if reads_text and args.sequence_parallel and args.calibration_seq_length % ranks:
        raise UsageError(
            "--calibration-seq-length",
            got=args.calibration_seq_length,
            expected=f"a multiple of --tensor-model-parallel-size {ranks}",
            why="--sequence-parallel splits its tokens among the ranks",
        )
    length, longest = args.calibration_seq_length, args.max_position_embeddings
    if reads_text and longest is not None and length > longest:
        raise UsageError(
            "--calibration-seq-length", got=length, expected=f"at most {longest}, the longest sequence of the model"
        )
    args.max_position_embeddings = longest or length
    length = min(length, args.max_position_embeddings)
    args.seq_length = length
    args.micro_batch_size, args.global_batch_size = 1, None
    args.save = None
