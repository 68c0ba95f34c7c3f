"""``python -m megatron_prune study run|plan|status|report STUDY.yaml``, and ``study stage``, which Slurm jobs call."""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from megatron_prune.errors import MegatronPruneError, RunError, UsageError
from megatron_prune.study import schema
from megatron_prune.study.commands import Command
from megatron_prune.study.places import Places

MOST_NAMED = 12  # runs that are not shown: the report names all
PEAK_TFLOPS = 989.0  # dense bf16 of an H100 SXM


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.action is _stage:
        code: int = _stage(options)
        return code
    studies = schema.load_all(options.study)
    if options.parent is not None:
        studies = [study for study in studies if study.name.endswith(f".{options.parent}")]
        if not studies:
            raise UsageError(
                "--parent", got=options.parent, expected=f"a label that stands under parents in {options.study}"
            )
    return _each(studies, options)


def _each(studies: Sequence[schema.Study], options: argparse.Namespace) -> int:
    """The verb for the study of every parent; one that fails does not keep the others from theirs."""
    failures = []
    for study in studies:
        try:
            options.action(study, Places(Path(options.runs_dir) / study.name), options)
        except MegatronPruneError as error:
            if len(studies) == 1:
                raise
            failures.append(f"{study.name}: {error}")
    if failures:
        raise RunError("\n".join(failures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_prune study", description=__doc__, allow_abbrev=False)
    actions = parser.add_subparsers(title="what to do", required=True, metavar="run|plan|status|report")
    for name, action, text in (
        ("run", _run, "run every cell that is not finished, then write the report"),
        ("plan", _plan, "print every cell with its tokens, FLOPs, memory, storage and time; run nothing"),
        ("status", _status, "print how far every cell is"),
        ("report", _report, "write the report from what is finished"),
    ):
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("study", metavar="STUDY.yaml")
        sub.add_argument("--runs-dir", default="runs", metavar="DIR", help="where studies lie (default: runs)")
        sub.add_argument("--parent", metavar="LABEL", help="only the study of this one, where STUDY.yaml has parents")
        if name == "plan":
            _add_plan_arguments(sub)
        if name == "status":
            sub.add_argument("--watch", type=float, metavar="SECONDS", nargs="?", const=2.0,
                             help="show it again and again while a runner is at work (default: every 2 s)")  # fmt: skip
        sub.set_defaults(action=action)
    text = "run one stage of a cell unless it is done; leave with 0 when what it wrote says that it is"
    stage = actions.add_parser("stage", help=text, description=text, allow_abbrev=False)
    stage.add_argument("cell", metavar="CELL", type=Path, help="a cell's directory, with its cell.json")
    stage.add_argument("stage", metavar="STAGE")
    stage.add_argument("command", metavar="-- COMMAND", nargs="+")
    stage.set_defaults(action=_stage)
    return parser


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commands", action="store_true", help="print the command line of every stage too")
    parser.add_argument("--scripts", action="store_true", help="write the Slurm script of every cell that is known")
    parser.add_argument("--throughput", metavar="T",
                        help="of one GPU: tokens a second on the parent's shape, or an MFU as 40%%")  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N", help="how many there are (default: launch.nproc x "
                        "launch.parallel_cells)")  # fmt: skip
    parser.add_argument("--peak-tflops", type=float, metavar="TFLOPS",
                        help=f"what an MFU is of (default: {PEAK_TFLOPS:g}, an H100 in bf16)")  # fmt: skip


def _console() -> Console:
    """As wide as the terminal; wide enough for a table where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _quiet() -> None:
    """Megatron's complaints about a process that is no rank and has no GPU are not this command's news."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")


def _run(study: schema.Study, places: Places, options: argparse.Namespace) -> int:
    _quiet()
    from megatron_prune.study.run import scheduler
    from megatron_prune.study.run.local import Local
    from megatron_prune.study.run.progress import Progress
    from megatron_prune.study.run.slurm import Queue

    with Progress() as progress:
        launcher = (Queue if study.launch.launcher == "slurm" else Local)(study, places, progress)
        try:
            scheduler.run(study, places, launcher=launcher, progress=progress)
        except scheduler.CellsFailed:
            if (places.root / "study.json").is_file():  # the cells that did finish have something to say
                _report(study, places, options)
            raise
    return _report(study, places, options)


def _report(study: schema.Study, places: Places, options: argparse.Namespace) -> int:
    _quiet()
    from megatron_prune.study.analysis import results
    from megatron_prune.study.report import page

    if not (places.root / "study.json").is_file():
        raise UsageError(
            "study report",
            got=places.root,
            expected="the folder of a study that has begun",
            do="start it with `study run`",
        )
    found = results.collect(places, study)
    written = page.write(found, places)
    for said in found.disbelieved:
        print(f"not believed: {said}")
    for one in found.left_out[:MOST_NAMED]:
        print(f"not shown: {one.cell}: {one.why}")
    if len(found.left_out) > MOST_NAMED:
        print(f"not shown: {len(found.left_out) - MOST_NAMED} more, which are in the report")
    for verdict in found.verdicts:
        print(f"{verdict.subject}: {verdict.words}")
    print(f"wrote {written}")
    return 0


def _plan(study: schema.Study, places: Places, options: argparse.Namespace) -> int:
    _quiet()
    from megatron_prune.study import jobs as stages
    from megatron_prune.study import outlook as preflight
    from megatron_prune.study.estimate import show
    from megatron_prune.study.run import slurm

    _refuse_times_of_nothing(options)
    outlook = preflight.check(study, places)
    console = _console()
    show(study, outlook, console, options.throughput, options.gpus, options.peak_tflops or PEAK_TFLOPS)
    if options.commands:
        _print_commands(stages.all_commands(stages.all_cells(study, places, outlook)))
    if options.scripts:
        cells = stages.all_cells(study, places, outlook)
        for cell in cells:
            stages.keep(study, places, cell, cells)
            console.print(f"wrote {slurm.write_script(study, places, cell)}", soft_wrap=True)
    return 0


def _refuse_times_of_nothing(options: argparse.Namespace) -> None:
    """Flags that only say how times are reckoned, where none are, or not by an MFU."""
    if options.gpus is not None and options.throughput is None:
        raise UsageError(
            "--gpus",
            got=f"{options.gpus} alone",
            expected="--throughput with it",
            why="without it no times are printed",
        )
    if options.peak_tflops is not None and not str(options.throughput or "").strip().endswith("%"):
        raise UsageError(
            "--peak-tflops", got=f"{options.peak_tflops:g}", expected="an MFU with it, such as --throughput 40%"
        )
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        raise UsageError("--peak-tflops", got=f"{options.peak_tflops:g}", expected="a positive number")


def _print_commands(commands: Mapping[str, list[Command]]) -> None:
    for cell, stages in commands.items():
        print(f"\n# {cell}")
        for command in stages:
            print(shlex.join(command.words))


def _status(study: schema.Study, places: Places, options: argparse.Namespace) -> int:
    from megatron_prune.study.run import status

    status.show(study.name, places, _console(), options.watch)
    return 0


def _stage(options: argparse.Namespace) -> int:
    """What a job of a queue does for each stage: the artifact decides before and after, never the exit code."""
    from megatron_prune.study.execution import described, execute

    known, done = described(options.cell, options.stage)
    if options.command[-len(known["argv"]) :] != known["argv"]:
        raise UsageError(f"{options.cell.name}: {options.stage}", got="another one",
                         expected="the command line in cell.json",
                         why="study.yaml was changed after this script was written")  # fmt: skip
    if done():
        print(f"{options.cell.name}: {options.stage} is done", flush=True)
        return 0

    def command(log: Path) -> int:
        with open(log, "ab") as output:
            return subprocess.run(options.command, stdout=output, stderr=output, stdin=subprocess.DEVNULL).returncode

    execute(options.cell, options.stage, done, command)
    print(f"{options.cell.name}: {options.stage} is done", flush=True)
    return 0
