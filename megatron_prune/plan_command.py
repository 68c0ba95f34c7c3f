"""``python -m megatron_prune plan``: statistics and a target in, ``plan.json`` and a table out.

Needs no model and no GPU: the parent is read for its shape and fingerprint only. One calibration
serves every method and every ratio.

Where the loss of the model must decide between candidates (minitron-depth, minitron-width --search),
those that the statistics have no score for are written to candidates.json, beside the plan that is not
written yet, and the exit code is 3. `calibrate --score candidates.json --statistics FILE` adds their
scores to the statistics; then the same plan command chooses.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prune import methods, plan, targets
from megatron_prune.calibrate import statistics as statistics_file
from megatron_prune.candidates import FILE, Question, unscored, uses_statistics
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.errors import EXIT_NEEDS_SCORES, UsageError
from megatron_prune.methods import DIMENSIONS, Method

SEQUENCE_LENGTH = 2048  # of the FLOPs in the table


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
        """What is asked about ``parent``."""
        return Question(
            self.name, self.settings, parent.shape, self.shapes(parent.shape), parent.fingerprint(), self.seed
        )

    def shapes(self, source: ModelShape) -> tuple[ModelShape, ...]:
        """The shape that the target makes of ``source``, or those that compete.

        UsageError where the target cannot be met.
        """
        search = self.method.search(self.settings)
        if search is None:
            return (self.target.choose(source, self.method, self.settings),)
        return tuple(self.target.near(source, search)[: search.max_candidates])

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
    name = first.parse_known_args(list(argv))[0].method
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
    # Without a method there is still help to give.
    asked_for_help = {"-h", "--help"} & set(argv) and not any(a.split("=")[0] == "--method" for a in argv)
    name = methods.names()[0] if asked_for_help else method_of(argv)
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
    parser.add_argument(
        "--seed", type=int, help="for methods that draw: the choice is a function of it (default 0)"
    )
    parser.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        metavar="TP",
        help="refuse shapes that this tensor-parallel size does not divide",
    )
    own = add_choice_arguments(parser, method)
    options, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, name)
    if options.seed is not None and not method.random:
        raise UsageError(
            "--seed", given=options.seed, allowed=f"no seed with --method {name}, which draws nothing"
        )
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
    question = choice.question(parent)  # refuse a target before reading statistics
    statistics = None
    if options.statistics:
        statistics = statistics_file.merge([statistics_file.read(path) for path in options.statistics])
    if choice.needs_scores:
        assert statistics is not None
        if unscored(question.candidates(statistics), statistics):
            return _ask(question, statistics, options)
    made = choice.make(question, statistics)
    made.write(options.output)
    show(made)
    print(f"wrote {Path(options.output)}")
    return 0


def _ask(question: Question, statistics: statistics_file.Statistics, options: argparse.Namespace) -> int:
    """Write the candidates and say what is to be run."""
    path = Path(options.output).with_name(FILE)
    missing = question.write(path, statistics)
    if len(options.statistics) > 1:
        raise UsageError(
            "--statistics",
            given=" ".join(options.statistics),
            allowed="one file, until its candidates are scored",
            why=f"{len(missing)} candidates have no score in all of them",
        )
    words = ["calibrate", "--load", options.load, "--use-checkpoint-args", "--score", str(path)]
    words += ["--statistics", *options.statistics]
    print(
        f"{len(missing)} candidates have no score yet: wrote {path}. Run the model with each of them, then plan "
        f"again:\n  torchrun … -m megatron_prune {shlex.join(words)}"
    )
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


def show(made: plan.PruningPlan, console: Console | None = None) -> None:
    """Print the plan as a table: shape, parameters and FLOPs before and after, and near-ties."""
    console = console or Console(width=110, highlight=False)
    source, target = made.source, made.target
    table = Table(title=f"{made.method}: plan for parent {made.parent[:16]}")
    for column in ("", "before", "after", "removed"):
        table.add_column(column, justify="left" if not column else "right")

    def row(label: str, before: int, after: int) -> None:
        table.add_row(
            label, f"{before:,}", f"{after:,}", f"{1 - after / before:.2%}" if after != before else "–"
        )

    for field in DIMENSIONS:
        row(field.replace("_", " "), getattr(source, field), getattr(target, field))
    table.add_section()
    row("linear weights", source.linear_parameters(), target.linear_parameters())
    row("all parameters", source.parameters(), target.parameters())
    row(
        f"forward FLOPs at {SEQUENCE_LENGTH}",
        source.forward_flops(SEQUENCE_LENGTH),
        target.forward_flops(SEQUENCE_LENGTH),
    )
    console.print(table)
    if target.num_layers < source.num_layers:
        gone = sorted(set(range(source.num_layers)) - set(made.kept_layers))
        console.print(f"removed layers: {', '.join(map(str, gone))}")
    asked = "" if made.ratio is None else f" (asked for: {made.ratio:.2%} of {made.ratio_of})"
    console.print(f"removed: {made.removed_linears:.2%} of linears, {made.removed_all:.2%} of all{asked}")
    if made.candidates:
        _show_candidates(made, console)
    if not made.near_ties:
        console.print("near-ties: none")
        return
    ties = Table(title=f"near-ties: {len(made.near_ties)} cuts that rounding could move (scores within 1e-5)")
    for column in ("unit", "layer", "group", "kept", "removed", "kept score", "removed score", "others"):
        ties.add_column(column, justify="right")
    for tie in made.near_ties[:20]:
        ties.add_row(
            tie.unit,
            *("–" if n is None else str(n) for n in (tie.layer, tie.group)),
            str(tie.kept),
            str(tie.removed),
            f"{tie.kept_score:.8g}",
            f"{tie.removed_score:.8g}",
            str(len(tie.others)),
        )
    console.print(ties)
    if len(made.near_ties) > 20:
        console.print(f"… and {len(made.near_ties) - 20} more, all in the plan")


def _show_candidates(made: plan.PruningPlan, console: Console) -> None:
    """The candidates, the best first."""
    search = methods.get(made.method).search(made.settings)
    # The shapes beyond the limit were never looked at, which a reader should know.
    full = search is not None and len(made.candidates) == search.max_candidates
    limit = " (as many as --max-candidates allows)" if full else ""
    table = Table(title=f"candidates: {len(made.candidates)}{limit}, by the loss without what they remove")
    table.add_column("")
    table.add_column("candidate")
    for column in ("parameters", "loss", "above the best"):
        table.add_column(column, justify="right")
    best = min(row.loss for row in made.candidates)
    for index, row in sorted(enumerate(made.candidates), key=lambda item: (item[1].loss, item[0])):
        mark = "chosen" if index == made.chosen else ""
        table.add_row(mark, row.candidate, f"{row.parameters:,}", f"{row.loss:.5f}", f"{row.loss - best:.5f}")
    console.print(table)
