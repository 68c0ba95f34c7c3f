"""``python -m megatron_prune plan``: statistics and a target in, ``plan.json`` and a table out.

Needs no model and no GPU: the parent is read for its shape and fingerprint only. One calibration
serves every method and every ratio.

Where the model must decide between candidates (minitron-depth, minitron-width --search or
--target-shapes), those that the statistics have no score for are written to candidates.json, beside
the plan that is not written yet, and the exit code is 3. `calibrate --score candidates.json
--statistics FILE` adds their scores to the statistics; then the same plan command chooses. With
--retrain-candidates it leaves with 3 once more: `rescore` retrains the best of them and adds their
losses after that.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_prune import methods
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import EXIT_NEEDS_SCORES, UsageError
from megatron_prune.structured import choice as choices
from megatron_prune.structured import plan_table
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidates import FILE, Candidate, Question


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    name = choices.method_of(argv)
    method = methods.get(name)
    parser = argparse.ArgumentParser(
        prog="megatron_prune plan",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load", required=True, metavar="CKPT", help="the parent checkpoint")
    parser.add_argument(
        "--statistics",
        nargs="+",
        metavar="FILE",
        help="what calibrate wrote for this parent; several files are merged",
    )
    parser.add_argument("--output", required=True, metavar="PLAN.json")
    parser.add_argument("--seed", type=int, help="for methods that draw: the choice is a function of it (default 0)")
    parser.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="TP",
        help="refuse shapes that this tensor-parallel size does not divide",
    )
    parser.add_argument(
        "--verify-integrity", action="store_true", help="check the parent's files against integrity.json first"
    )
    own = choices.add_choice_arguments(parser, method)
    options, unknown = parser.parse_known_args(argv)
    choices.refuse_unknown(unknown, name)
    if options.seed is not None and not method.random:
        raise UsageError(
            "--seed", got=options.seed, expected=f"no such flag with --method {name}, which draws no random numbers"
        )
    if options.seed is not None and options.seed < 0:
        raise UsageError("--seed", got=options.seed, expected="0 or more")
    seed = (options.seed or 0) if method.random else None
    choice = choices.choice_from(name, method, own, options, options.tensor_model_parallel_size, seed)
    if options.statistics and not choice.needs_statistics:
        raise UsageError(
            "--statistics",
            got=" ".join(options.statistics),
            expected=f"no such flag with --method {name}, which needs no statistics",
        )
    if choice.needs_statistics and not options.statistics:
        raise UsageError(
            "--statistics",
            got="nothing",
            expected=f"a file of statistics, which --method {name} reads",
            do="make one with calibrate",
        )

    parent = open_checkpoint(options.load)
    if options.verify_integrity:
        parent.verify(hashes=True)
    question = choice.question(parent)  # refuse a target before reading statistics
    statistics = None
    if options.statistics:
        statistics = statistics_file.merge([statistics_file.read(path) for path in options.statistics])
    if choice.needs_scores:
        assert statistics is not None
        if missing := question.unscored(statistics):
            return _ask(question, statistics, options, missing, retrain=False)
        if missing := question.unretrained(statistics):
            return _ask(question, statistics, options, missing, retrain=True)
    made = choice.make(question, statistics)
    made.write(options.output)
    plan_table.show(made)
    print(f"wrote {Path(options.output)}")
    return 0


def _ask(
    question: Question,
    statistics: statistics_file.Statistics,
    options: argparse.Namespace,
    missing: Sequence[Candidate],
    *,
    retrain: bool,
) -> int:
    """Write the candidates and say what is to be run with those of them that are ``missing``."""
    path = Path(options.output).with_name(FILE)
    question.write(path, statistics)
    lack = "have not been retrained" if retrain else "have no score"
    if len(options.statistics) > 1:
        raise UsageError(
            "--statistics",
            got=" ".join(options.statistics),
            expected="one file until its candidates are scored",
            why=f"{len(missing)} candidates {lack} in all of them",
        )
    load, found = ["--load", options.load], ["--statistics", *options.statistics]
    if retrain:
        asked = question.retraining
        assert asked is not None
        run = f"Train each on {asked.tokens:,} tokens"
        words = ["python", "-m", "megatron_prune", "rescore", *load, *found, "--candidates", str(path)]
        command = f"{shlex.join(words)} --scratch … --nproc … --pretrain …"
    else:
        run = "Run the model with each of them"
        words = ["-m", "megatron_prune", "calibrate", *load, "--use-checkpoint-args", "--score", str(path), *found]
        command = f"torchrun … {shlex.join(words)}"
    print(f"{len(missing)} candidates {lack} yet: wrote {path}. {run}, then plan again:\n  {command}")
    return EXIT_NEEDS_SCORES
