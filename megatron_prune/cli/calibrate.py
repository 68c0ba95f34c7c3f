"""``torchrun … -m megatron_prune calibrate``: one forward pass over calibration text, statistics out.

Runs the parent at any TP×PP×DP and gathers, in that one pass, all that every forward-only method
needs at every ratio. Data-parallel replicas share out the windows (unevenly where they must).

``calibrate --score candidates.json --statistics FILE`` runs it again on the same windows, with every
candidate that has no score yet, and writes FILE anew with their losses, or ``--output``. Where the plan
was asked for with ``--score-by task``, their accuracies on its ``--task-data`` are added too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune import methods
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.engine import fp8, runtime
from megatron_prune.errors import UsageError
from megatron_prune.structured import candidates
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics, json_path

FLAGS = (
    "--calibration-data-path",
    "--calibration-sequences",
    "--calibration-seq-length",
    "--calibration-sampling",
)
CHOOSING = FLAGS[1:]  # of the windows


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked: tuple[Question, Statistics] | None = None
    requests: Requests | None = None

    def complete_all(args: argparse.Namespace, argv: list[str]) -> None:
        nonlocal asked, requests
        asked = _read_question(args, argv)
        complete(args, argv)
        requests = task_requests(args, asked[0] if asked else None)

    args = runtime.start("calibrate", argv, _add_own_arguments, complete=complete_all)
    from megatron_prune.calibration import run  # imports Megatron, which must be started first

    output = Path(args.output)
    if asked is None:
        statistics = run.gather(args)
        did = f"calibrated on {statistics.sequences} sequences of {statistics.seq_length} tokens, "
        did += f"loss {statistics.loss:.4f}"
    else:
        question, known = asked
        missing = len(question.unscored(known))
        statistics = run.score(args, question, known, requests)
        did = f"scored {missing} candidates"
    if args.rank == 0:
        statistics.write(output)
        print(f"{did}; wrote {output} and {json_path(output)}", flush=True)
    return 0


def _add_own_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--output", metavar="FILE.safetensors", help="where the statistics go")
    parser.add_argument(
        "--score",
        metavar="CANDIDATES.json",
        help="what plan wrote: score these candidates on the windows of --statistics",
    )
    parser.add_argument(
        "--statistics", metavar="FILE", help="with --score: what calibrate wrote; also the default --output"
    )
    parser.add_argument("--task-data", metavar="FILE.jsonl", help="with --score: where the plan's --task-data lies now")
    return add_arguments(parser)


def task_requests(args: argparse.Namespace, question: Question | None) -> Requests | None:
    """What the task of ``question`` asks of the model, if there is one; all that can be wrong with it is refused.

    Call after ``complete``.
    """
    from megatron_prune.calibration import scoring

    if question is None or question.task is None:
        if args.task_data is not None:
            raise UsageError(
                "--task-data",
                got=args.task_data,
                expected="no such flag where candidates are scored by their loss",
                do="plan with --score-by task to score them by their accuracy",
            )
        return None
    asked = methods.get(question.method).task(question.settings)
    assert asked is not None
    return scoring.requests(args, args.task_data or asked.path, question.task)


def _read_question(args: argparse.Namespace, argv: list[str]) -> tuple[Question, Statistics] | None:
    """Check the flags of output and scoring; with ``--score``, what it reads, whose windows ``args`` get."""
    from megatron_prune.engine.arguments import given

    if (args.score is None) != (args.statistics is None):
        raise UsageError("--score, --statistics", got="only one", expected="both or neither")
    args.output = args.output or args.statistics
    if args.output is None or Path(args.output).suffix != ".safetensors":
        raise UsageError("--output", got=args.output or "nothing", expected="a file name that ends in .safetensors")
    if args.score is None:
        return None
    for flag in CHOOSING:
        if given(argv, flag):
            raise UsageError(
                flag, got="it", expected="no such flag with --score",
                why="candidates are scored on the windows of --statistics",
            )  # fmt: skip
    question, of = candidates.read(args.score)
    found = statistics_file.read(args.statistics)
    if found.hash != of:
        raise UsageError(
            "--statistics",
            got=args.statistics,
            expected="the statistics that the candidates of --score were planned from",
            do="plan again with these",
        )
    if len(found.calibrations) != 1:
        raise UsageError("--statistics", got=args.statistics, expected="statistics of one calibration, not merged ones")
    behind = found.calibrations[0]
    args.calibration_data_path = args.calibration_data_path or behind["prefix"]
    args.calibration_sequences, args.calibration_seq_length = found.sequences, found.seq_length
    return question, found


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that say which text is read."""
    group = parser.add_argument_group("megatron_prune: calibration")
    group.add_argument("--calibration-data-path", metavar="PREFIX", help="tokenized corpus, without .bin")
    group.add_argument("--calibration-sequences", type=int, default=128, metavar="N", help="default 128")
    group.add_argument(
        "--calibration-seq-length", type=int, default=2048, metavar="S", help="tokens of each; default 2048"
    )
    group.add_argument(
        "--calibration-sampling",
        choices=("sequential", "random"),
        default="sequential",
        help="the first N windows of the corpus, or N windows drawn with --seed",
    )
    return parser


def complete(args: argparse.Namespace, argv: list[str], *, reads_text: bool = True) -> None:
    """Fill in what follows from the calibration's flags, and refuse flags that contradict them.

    Without ``reads_text`` nothing is calibrated, and the calibration's flags are refused.
    """
    from megatron_prune.engine.arguments import given

    runtime.refuse_layouts(args)
    args.builds_model = reads_text  # without, no package that Megatron's layers want is asked for
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
