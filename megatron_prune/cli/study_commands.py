"""The verbs for studies: ``study`` and ``advise``."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune import screen, verbs
from megatron_prune.cli.cluster_commands import run_without_gpus
from megatron_prune.cli.parser import Parser, Verbs
from megatron_prune.errors import MegatronPruneError, RunError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_prune.study import schema
    from megatron_prune.study.advise.lifetime import Served
    from megatron_prune.study.commands import Command
    from megatron_prune.study.prunings import Places


MOST_NAMED = 12  # excluded runs; the report names all
PEAK_TFLOPS = 989.0  # dense bf16 of an H100 SXM


STUDY_PARTS = {
    "run": "run every unfinished cell, then write the report",
    "plan": "print every cell with its tokens, FLOPs, memory, storage and time; run nothing",
    "status": "print the progress of every cell",
    "report": "write the report from the finished cells",
    "stage": "run one stage of a cell unless it is done; Slurm jobs call it",
}


def study_group() -> Verbs:
    return Verbs(
        "study",
        "A study compares pruned models with models trained from scratch, on the same tokens. STUDY.yaml says which.",
        STUDY_PARTS,
    )


def study_parser(part: str) -> Parser:
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
    "report": verbs.StudyReportSettings,
}


def study_main(argv: list[str]) -> int:
    """``study run|plan|status|report STUDY.yaml``, and ``study stage``, which Slurm jobs call."""
    part, words = study_group().read(argv)
    if part == "stage":
        cut = words.index("--") if "--" in words else len(words)
        asked = verbs.StudyStageSettings.of(study_parser(part).read(words[:cut])[0])
        return _stage(Path(asked.cell), asked.stage, words[cut + 1 :])
    options: Any = SETTINGS[part].of(study_parser(part).read(words)[0])
    if part == "plan" and (code := run_without_gpus(["study", *argv])) is not None:
        return code
    from megatron_prune.study import schema

    studies = schema.load_all(options.study)
    if options.parent is not None:
        studies = [study for study in studies if study.name.endswith(f".{options.parent}")]
        if not studies:
            raise UsageError(
                "--parent", got=options.parent, expected=f"a label that stands under parents in {options.study}"
            )
    if part == "plan" and options.hf is not None:
        if len(studies) > 1:
            raise UsageError(
                "--hf", got=f"{len(studies)} parents in {options.study}", expected="one study: choose it with --parent"
            )
        studies = [schema.of_hf(studies[0], options.hf)]
    return _each(studies, part, options)


def _each(studies: Sequence[schema.StudyConfig], part: str, options: Any) -> int:
    """Run the verb for the study of every parent; a failure does not stop the others."""
    from megatron_prune.study.prunings import Places
    from megatron_prune.study.study_file import root_of

    action = {"run": _run, "plan": _plan, "status": _status, "report": _report}[part]
    failures = []
    for study in studies:
        try:
            action(study, Places(root_of(options.study, options.runs_dir, study.name)), options)
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

    found, written = write_report(study, places, verify=getattr(options, "verify", False))
    for said in found.disbelieved:
        print(f"not believed: {said}")
    for one in found.left_out[:MOST_NAMED]:
        print(f"not shown: {one.cell}: {one.why}")
    if len(found.left_out) > MOST_NAMED:
        print(f"not shown: {len(found.left_out) - MOST_NAMED} more, which are in the report")
    for verdict in found.verdicts:
        print(f"{verdict.subject}: {verdict.words}")
    for lacks in found.unfinished:
        print(lacks.sentence)
    print(f"wrote {written}")
    if found.verified is not None:
        from megatron_prune.study.report.page import verified_words

        print(f"read again: {verified_words(found.verified)}")
        if found.verified["changed"]:
            raise RunError(f"--verify: {found.verified['changed']} of these are not what the results are of")
    return 0


def _plan(study: schema.StudyConfig, places: Places, options: Any) -> int:
    from megatron_prune.cli import training_commands
    from megatron_prune.study import begun, jobs, validate
    from megatron_prune.study.estimate import show
    from megatron_prune.study.run import slurm

    _refuse_times_of_nothing(options)
    outlook = validate.check(study, places, planned=True, corpus_tokens=options.corpus_tokens)
    console = _console()
    show(
        study,
        places,
        outlook,
        {"pretrain": training_commands.pretrain_main, "learn-masks": training_commands.learn_masks_main},
        console,
        _prices(study, outlook, options),
    )
    if options.commands:
        _print_commands(jobs.all_commands(jobs.all_cells(study, places, outlook)))
    if options.scripts:
        cells = jobs.all_cells(study, places, outlook)
        begun.refuse_other_commands(study, places, cells)
        for cell in cells:
            begun.keep(places, cell)
            console.print(f"wrote {slurm.write_script(study, places, cell)}", soft_wrap=True)
    return 0


def _prices(study: schema.StudyConfig, outlook: Any, options: Any) -> Any:
    """What `plan --throughput` says of times; None without it."""
    from megatron_prune.study import estimate, throughput

    launch = study.launch
    gpus = launch.nproc * launch.parallel_cells if options.gpus is None else options.gpus
    if gpus < launch.nproc:
        raise UsageError("--gpus", got=gpus, expected=f"at least {launch.nproc}, the processes of launch.nproc")
    if options.throughput is None:
        return None
    if options.throughput == "measured":
        return throughput.measure(study, outlook, gpus)
    peak = options.peak_tflops or PEAK_TFLOPS
    return estimate.Speed.parse(options.throughput, peak, gpus, outlook.source, study.data.seq_length)


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


def advise_parser() -> Parser:
    return Parser(
        "advise",
        "Says whether to prune or to train from scratch for a budget of tokens, as far as a ledger of measured "
        'comparisons can say. "Don\'t know" is an answer, with what would settle it.',
        verbs.AdviseSettings,
        example="megatron-prune advise --ratio 0.5 --tokens 400k",
    )


def advise_main(argv: list[str]) -> int:
    """Print the advice; ``--json`` writes it too. "Don't know" is an answer, not an error."""
    options = verbs.AdviseSettings.of(advise_parser().read(argv)[0])
    from megatron_prune import artifacts
    from megatron_prune.study.advise import answer, ledgers, lifetime, question

    if options.json:
        artifacts.refuse_unwritable("--json", options.json)
    ledger = ledgers.read(options.ledger or ledgers.SHIPPED)
    asked = question.from_settings(options, ledger.parent_params)
    advice = answer.advise(ledger, asked)
    served = lifetime.compare(ledger, asked) if asked.served is not None else None
    if options.json:
        found = answer.to_json(ledger, asked, advice)
        if served is not None:
            found["served"] = {"advised": asdict(served[0]), "rivals": [_rival(served[0], one) for one in served[1]]}
        artifacts.write_json(options.json, found)
    print("\n".join(answer.words(ledger, asked, advice)))
    if served is not None:
        print("\n".join(lifetime.words(*served, served=asked.served or 0.0)))
    elif asked.served is not None:
        print("served tokens: the ledger does not reach this target, so nothing is compared")
    return 0


def _rival(best: Served, rival: Served) -> dict[str, Any]:
    from megatron_prune.study.advise.lifetime import break_even

    return {**asdict(rival), "break_even": break_even(best, rival)}
