"""``megatron-prune study run|plan|status|report STUDY.yaml``, and ``study stage``, which Slurm jobs call."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune import screen, verbs
from megatron_prune.cli.parser import Parser, Verbs
from megatron_prune.errors import MegatronPruneError, RunError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_prune.study import schema
    from megatron_prune.study.commands import Command
    from megatron_prune.study.prunings import Places

MOST_NAMED = 12  # excluded runs; the report names all
PEAK_TFLOPS = 989.0  # dense bf16 of an H100 SXM


PARTS = {
    "run": "run every unfinished cell, then write the report",
    "plan": "print every cell with its tokens, FLOPs, memory, storage and time; run nothing",
    "status": "print the progress of every cell",
    "report": "write the report from the finished cells",
    "stage": "run one stage of a cell unless it is done; Slurm jobs call it",
}


def group() -> Verbs:
    return Verbs(
        "study",
        "A study compares pruned models with models trained from scratch, on the same tokens. STUDY.yaml says which.",
        PARTS,
    )


def parser(part: str) -> Parser:
    """The parser of ``study run`` and the others."""
    if part == "stage":
        return Parser(
            "study stage",
            "Runs one stage of a cell unless it is done, and exits with code 0 if its artifacts say that it is. Slurm "
            "jobs call it.",
            verbs.StudyStageSettings,
            after=" -- COMMAND …",
            example="megatron-prune study stage runs/quickstart/cells/parent pretrain -- python -m megatron_prune …",
        )
    about = {
        "run": "Runs every unfinished cell of a study, on this machine or as Slurm jobs, and then writes the "
        "report. A stopped study resumes where it was.",
        "plan": "Prints every cell of a study with its tokens, FLOPs, memory, storage and time. Runs nothing.",
        "status": "Prints the progress of every cell of a study.",
        "report": "Writes a study's report from the finished cells.",
    }
    return Parser(
        f"study {part}",
        about[part],
        SETTINGS[part],
        example=f"megatron-prune study {part} examples/quickstart/study.yaml",
    )


SETTINGS: dict[str, type[verbs.StudySettings]] = {
    "run": verbs.StudySettings,
    "plan": verbs.StudyPlanSettings,
    "status": verbs.StudyStatusSettings,
    "report": verbs.StudySettings,
}


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    part, words = group().read(argv)
    if part == "stage":
        cut = words.index("--") if "--" in words else len(words)
        asked = verbs.StudyStageSettings.of(parser(part).read(words[:cut])[0])
        return _stage(Path(asked.cell), asked.stage, words[cut + 1 :])
    options = SETTINGS[part].of(parser(part).read(words)[0])
    from megatron_prune.study import schema

    studies = schema.load_all(options.study)
    if options.parent is not None:
        studies = [study for study in studies if study.name.endswith(f".{options.parent}")]
        if not studies:
            raise UsageError(
                "--parent", got=options.parent, expected=f"a label that stands under parents in {options.study}"
            )
    return _each(studies, part, options)


def _each(studies: Sequence[schema.StudyConfig], part: str, options: Any) -> int:
    """Run the verb for the study of every parent; a failure does not stop the others."""
    from megatron_prune.study.prunings import Places

    action = {"run": _run, "plan": _plan, "status": _status, "report": _report}[part]
    failures = []
    for study in studies:
        try:
            action(study, Places(Path(options.runs_dir) / study.name), options)
        except MegatronPruneError as error:
            if len(studies) == 1:
                raise
            failures.append(f"{study.name}: {error}")
    if failures:
        raise RunError("\n".join(failures))
    return 0


def _console() -> Console:
    """A console as wide as the terminal, or wide enough for a table without one."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _run(study: schema.StudyConfig, places: Places, options: Any) -> int:
    from megatron_prune.api.studies import measure_efficiency, run_cells
    from megatron_prune.study.run.scheduler import CellsFailed

    try:
        run_cells(study, places)
    except CellsFailed:
        if (places.root / "study.json").is_file():  # report the cells that did finish
            _report(study, places, options)
        raise
    measure_efficiency(study, places)
    return _report(study, places, options)


def _report(study: schema.StudyConfig, places: Places, options: Any) -> int:
    from megatron_prune.api.studies import write_report

    found, written = write_report(study, places)
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


def _plan(study: schema.StudyConfig, places: Places, options: Any) -> int:
    from megatron_prune.cli import learn_masks, pretrain
    from megatron_prune.study import jobs, validate
    from megatron_prune.study.estimate import show
    from megatron_prune.study.run import slurm

    _refuse_times_of_nothing(options)
    outlook = validate.check(study, places, planned=True, corpus_tokens=options.corpus_tokens)
    console = _console()
    show(
        study,
        places,
        outlook,
        {"pretrain": pretrain.main, "learn-masks": learn_masks.main},
        console,
        options.throughput,
        options.gpus,
        options.peak_tflops or PEAK_TFLOPS,
    )
    if options.commands:
        _print_commands(jobs.all_commands(jobs.all_cells(study, places, outlook)))
    if options.scripts:
        cells = jobs.all_cells(study, places, outlook)
        for cell in cells:
            jobs.keep(study, places, cell, cells)
            console.print(f"wrote {slurm.write_script(study, places, cell)}", soft_wrap=True)
    return 0


def _refuse_times_of_nothing(options: Any) -> None:
    """UsageError for flags about times when no times are printed, or for an MFU's peak without an MFU."""
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


def _status(study: schema.StudyConfig, places: Places, options: Any) -> int:
    from megatron_prune.study.run import status

    status.show(study.name, places, _console(), options.watch)
    return 0


def _stage(cell: Path, stage: str, command: list[str]) -> int:
    """Run one stage of a Slurm job. The artifact decides before and after, never the exit code."""
    from megatron_prune.study.execution import described, execute

    known, done = described(cell, stage)
    if command[-len(known["argv"]) :] != known["argv"]:
        raise UsageError(
            f"{cell.name}: {stage}",
            got="another one",
            expected="the command line in cell.json",
            why="study.yaml was changed after this script was written",
        )
    if done():
        print(f"{cell.name}: {stage} is done", flush=True)
        return 0

    def run(log: Path) -> int:
        environment = os.environ | {screen.VERBOSE_VARIABLE: "1"}
        with open(log, "ab") as output:
            done = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        return done.returncode

    execute(cell, stage, done, run)
    print(f"{cell.name}: {stage} is done", flush=True)
    return 0
