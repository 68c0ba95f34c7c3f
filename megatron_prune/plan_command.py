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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune import methods, plan, plan_table, targets
from megatron_prune.calibrate import statistics as statistics_file
from megatron_prune.candidates import FILE, Candidate, Question, uses_statistics
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.data import multiple_choice
from megatron_prune.errors import EXIT_NEEDS_SCORES, UsageError
from megatron_prune.methods import Method, Retraining


@dataclass(frozen=True)
class Choice:
    """A method, its settings and its target, as flags say them; checked against no model yet."""

    name: str
    method: Method
    settings: dict[str, Any]
    target: targets.Target
    seed: int | None

    def make(self, question: Question, statistics: statistics_file.Statistics | None) -> plan.PruningPlan:
        """The plan that answers ``question``."""
        ratio, ratio_of = self.target.ratio, self.target.ratio_of
        return plan.make(question, ratio=ratio, ratio_of=ratio_of, statistics=statistics)

    def question(self, parent: Checkpoint) -> Question:
        """What is asked about ``parent``; UsageError or DataError where target or task cannot be met."""
        shapes, task = self.shapes(parent.shape), self.task
        return Question(self.name, self.settings, parent.shape, shapes, parent.fingerprint(), self.seed, task)

    def shapes(self, source: ModelShape) -> tuple[ModelShape, ...]:
        """The shape that the target makes of ``source``, or those that compete.

        UsageError where the target cannot be met.
        """
        search = self.method.search(self.settings)
        if search is None:
            return (self.target.choose(source, self.method, self.settings),)
        return tuple(self.target.compete(source, search))

    @property
    def task(self) -> str | None:
        """Fingerprint of the task that is to decide; DataError where its file is none."""
        task = self.method.task(self.settings)
        return multiple_choice.read(task.path).fingerprint if task else None

    @property
    def retraining(self) -> Retraining | None:
        """What the best candidates are to be trained on before one is chosen."""
        search = self.method.search(self.settings)
        return search.retraining if search else None

    @property
    def needs_statistics(self) -> bool:
        return uses_statistics(self.method, self.settings)

    @property
    def needs_scores(self) -> bool:
        return self.method.needs_scores(self.settings)


def method_of(argv: Sequence[str]) -> str:
    """The value of ``--method``, which decides what other flags there are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    name: str | None = first.parse_known_args(list(argv))[0].method
    if name is None and {"-h", "--help"} & set(argv):
        return methods.names()[0]  # without a method there is still help to give
    if name is None:
        raise UsageError("--method", given="nothing", allowed="one of " + ", ".join(methods.names()))
    return name


def add_choice_arguments(parser: argparse.ArgumentParser, method: Method) -> list[str]:
    """Add the flags of target and method to a parser; returns the ``dest``s of the method's own flags."""
    parser.add_argument("--method", required=True, help="pruning method: " + ", ".join(methods.names()))
    targets.add_arguments(parser)
    before = {action.dest for action in parser._actions}
    method.add_arguments(parser)
    return [action.dest for action in parser._actions if action.dest not in before]


def choice_from(
    name: str,
    method: Method,
    own: Sequence[str],
    options: argparse.Namespace,
    tensor_parallel: int,
    seed: int | None,
) -> Choice:
    """The choice that parsed flags describe."""
    settings = {dest: getattr(options, dest) for dest in own}
    return Choice(name, method, settings, targets.from_arguments(options, tensor_parallel), seed)


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    name = method_of(argv)
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
    own = add_choice_arguments(parser, method)
    options, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, name)
    if options.seed is not None and not method.random:
        raise UsageError("--seed", given=options.seed, allowed=f"no seed with --method {name}, which draws nothing")
    if options.seed is not None and options.seed < 0:
        raise UsageError("--seed", given=options.seed, allowed="0 or more")
    seed = (options.seed or 0) if method.random else None
    choice = choice_from(name, method, own, options, options.tensor_model_parallel_size, seed)
    if options.statistics and not choice.needs_statistics:
        raise UsageError(
            "--statistics",
            given=" ".join(options.statistics),
            allowed=f"no statistics with --method {name}, which needs none",
        )
    if choice.needs_statistics and not options.statistics:
        raise UsageError(
            "--statistics",
            given="nothing",
            allowed="a file that calibrate wrote",
            why=f"--method {name} reads it",
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
            given=" ".join(options.statistics),
            allowed="one file, until its candidates are scored",
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


def refuse_unknown(unknown: Sequence[str], name: str) -> None:
    """Refuse flags that are nobody's, or another method's."""
    if not unknown:
        return
    flag = unknown[0].split("=")[0]
    for other in methods.names():
        theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        methods.get(other).add_arguments(theirs)
        if flag in theirs._option_string_actions:
            raise UsageError(flag, given=f"with --method {name}", allowed=f"only with --method {other}")
    raise UsageError(flag, given="an unknown argument", allowed="the flags that --help lists")
