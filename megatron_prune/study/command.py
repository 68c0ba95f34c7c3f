"""``python -m megatron_prune study run|plan|status|report STUDY.yaml``."""

from __future__ import annotations

import argparse
import logging
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prune.errors import UsageError
from megatron_prune.study import config
from megatron_prune.study.commands import Command, Places
from megatron_prune.study.ledger import Ledger


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_args(argv)
    study = config.load(options.study)
    places = Places(Path(options.runs_dir) / study.name)
    return options.action(study, places, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_prune study", description=__doc__, allow_abbrev=False)
    actions = parser.add_subparsers(title="what to do", required=True, metavar="run|plan|status|report")
    for name, action, text in (
        ("run", _run, "run every cell that is not finished, then write the report"),
        ("plan", _plan, "print every cell with its tokens, steps and FLOPs; run nothing"),
        ("status", _status, "print which cells are finished"),
        ("report", _report, "write the report from what is finished"),
    ):
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("study", metavar="STUDY.yaml")
        sub.add_argument("--runs-dir", default="runs", metavar="DIR", help="where studies lie (default: runs)")
        if name == "plan":
            sub.add_argument("--commands", action="store_true", help="print the command line of every stage too")
        sub.set_defaults(action=action)
    return parser


def _console() -> Console:
    """As wide as the terminal; wide enough for a table where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _quiet() -> None:
    """Megatron's complaints about a process that is no rank and has no GPU are not this command's news."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")


def _run(study: config.Study, places: Places, options: argparse.Namespace) -> int:
    _quiet()
    from megatron_prune.study import runner
    from megatron_prune.study.progress import Progress

    with Progress() as progress:
        try:
            runner.run(study, places, progress=progress)
        except runner.CellsFailed:
            if (places.root / "outlook.json").is_file():  # the cells that did finish have something to say
                _report(study, places, options)
            raise
    return _report(study, places, options)


def _report(study: config.Study, places: Places, options: argparse.Namespace) -> int:
    from megatron_prune.report import page
    from megatron_prune.study import results

    if not (places.root / "outlook.json").is_file():
        raise UsageError("study report", given=places.root, allowed="a study that has begun: `study run` it first")
    found = results.collect(places)
    written = page.write(found, places)
    for verdict in found.verdicts:
        print(f"{verdict.subject}: {verdict.words}")
    print(f"wrote {written}")
    return 0


def _plan(study: config.Study, places: Places, options: argparse.Namespace) -> int:
    _quiet()
    from megatron_prune.study import grid, preflight, stages

    outlook = preflight.check(study, places)
    laid = outlook.grid(study)
    console = _console()
    table = _table(f"study {study.name}: {len(laid.cells)} training runs", "cell samples steps tokens FLOPs parameters")
    flops = {"parent": 0}
    batch, source = outlook.lay.batch, outlook.source

    def row(cell: str, samples: Any, shape: Any) -> None:
        cost = shape.training_flops(batch.seq_length) * samples.steps * batch.samples if shape else None
        flops[cell] = cost or 0
        table.add_row(
            cell, str(samples), f"{samples.steps:,}", f"{samples.steps * batch.tokens:,}",
            "not known yet" if cost is None else f"{cost:.3e}", f"{shape.parameters():,}" if shape else "",
        )  # fmt: skip

    if study.parent.pretrain is not None:
        row("parent", batch.range(0, outlook.lay.parent_end // batch.samples), source)
    for cell in laid.cells:
        row(cell.id, cell.samples, outlook.targets.get(cell.source.name))
    console.print(table)
    console.print(f"FLOPs of training together: {sum(flops.values()):.3e}")
    for note in grid.notes(study):
        console.print(note)
    for comparison in laid.comparisons:
        if comparison.not_run:
            console.print(f"not run: {comparison.setting} for {comparison.pruned}: {comparison.not_run}")
    if options.commands:
        cells = [
            stages.parent(study, places, outlook),
            *stages.calibrations(study, places, outlook),
            *stages.pruning_cells(study, places, outlook),
            *stages.training_cells(study, places, laid),
        ]
        _print_commands(stages.all_commands(cells))
    return 0


def _print_commands(commands: Mapping[str, list[Command]]) -> None:
    for cell, stages in commands.items():
        print(f"\n# {cell}")
        for command in stages:
            print(shlex.join(command.words))


def _status(study: config.Study, places: Places, options: argparse.Namespace) -> int:
    """From the files alone, so that it can be asked while a runner is at work."""
    from megatron_prune import artifacts

    finished = Ledger(places.root / "ledger.jsonl").read()
    table = _table(f"study {study.name}", "cell state validation test seconds")
    begun = {path.parent.name for path in places.root.glob("cells/*/cell.json")}
    cells = [*finished, *sorted(begun - set(finished), key=lambda name: (not _begun(places, name), name))]
    for name in cells:
        record = finished.get(name)
        done = artifacts.read_json(places.cell(name) / "stages.json") if _begun(places, name) else {}
        total = len(artifacts.read_json(places.cell(name) / "cell.json")["stages"])
        losses = [
            f"{record[key]:.4f}" if record and record.get(key) else "" for key in ("validation_loss", "test_loss")
        ]
        state = "finished" if record else f"{len(done)} of {total} stages" if done else "not finished"
        table.add_row(name, state, *losses, f"{sum(done.values()):.1f}" if done else "")
    console = _console()
    console.print(table)
    if not cells:
        console.print(f"{places.root}: nothing has been run")
    return 0


def _begun(places: Places, cell: str) -> bool:
    return (places.cell(cell) / "stages.json").is_file()


def _table(title: str, columns: str) -> Table:
    table = Table(title=title)
    for column in columns.split():
        table.add_column(column, justify="left" if column in ("cell", "state") else "right", no_wrap=True)
    return table
