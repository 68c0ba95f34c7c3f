"""What is asked of a structured method, as flags say it: the method, its settings, the target."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune import methods
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.data import multiple_choice
from megatron_prune.errors import UsageError
from megatron_prune.methods import Method, Retraining
from megatron_prune.structured import plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured import target as targets
from megatron_prune.structured.candidates import Question, uses_statistics


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
        raise UsageError("--method", got="nothing", expected="one of " + ", ".join(methods.names()))
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


def refuse_unknown(unknown: Sequence[str], name: str) -> None:
    """Refuse flags that are nobody's, or another method's."""
    if not unknown:
        return
    flag = unknown[0].split("=")[0]
    for other in methods.names():
        theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        methods.get(other).add_arguments(theirs)
        if flag in theirs._option_string_actions:
            raise UsageError(flag, got=f"--method {name}", expected=f"--method {other} with it")
    raise UsageError(flag, got="an unknown flag", expected="one of the flags that --help lists")
