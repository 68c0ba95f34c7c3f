"""A cell as stages: what to run, how to know that it is done, and what its record is.

``Cell`` is all that the runner sees. The functions here make them from a study: the parent first,
then calibrations, prunings, and the training runs of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.errors import RunError
from megatron_prune.study import commands, records
from megatron_prune.study.commands import Command, Places
from megatron_prune.study.config import Study
from megatron_prune.study.grid import Grid, Pruning, TrainingCell, calibration_cell, prunings
from megatron_prune.study.preflight import Outlook

Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """One command of a cell. ``done`` looks at what the command writes."""

    command: Command
    done: Callable[[], bool]


@dataclass(frozen=True)
class Cell:
    """Stages in order, the record when all are done, and the cells that must be finished before."""

    id: str
    stages: tuple[Stage, ...]
    record: Callable[[Seconds], dict[str, Any]]
    weight: float = 1.0  # how long it may take, relative to others; longer ones start first


def parent(study: Study, places: Places, outlook: Outlook) -> Cell:
    """The parent: trained, imported or only loaded, and evaluated."""
    stages = []
    trained = None
    if study.parent.pretrain is not None:
        trained = outlook.lay.batch.range(0, outlook.lay.parent_end // outlook.lay.batch.samples)
        samples, account = trained, places.account("parent")
        stages.append(
            Stage(commands.parent_training(study, places, samples), lambda: records.trained(account, samples))
        )
    elif study.parent.import_hf is not None:
        checkpoint = places.checkpoint("parent")
        stages.append(Stage(commands.importing(study, places), lambda: records.imported(checkpoint)))
    stages.append(
        _evaluation(study, places, "parent", commands.evaluation(study, places, "parent", places.parent(study)))
    )

    def record(seconds: Seconds) -> dict[str, Any]:
        return records.parent(study, places, parent_account(study, places, outlook), seconds)

    return Cell("parent", tuple(stages), record)


def parent_account(study: Study, places: Places, outlook: Outlook) -> Mapping[str, Any] | None:
    """The account of the parent's training, where there is one."""
    if study.parent.pretrain is not None:
        from megatron_prune.artifacts import read_json

        return read_json(places.account("parent"))
    return outlook.account


def calibrations(study: Study, places: Places, outlook: Outlook) -> list[Cell]:
    """One cell for each set of calibration windows of which some method reads statistics."""
    cells: dict[str, Cell] = {}
    for pruning in prunings(study):
        if outlook.needs[pruning.method.tag].statistics:
            cells.setdefault(calibration_cell(study, pruning.seed), _calibration(study, places, pruning.seed))
    return list(cells.values())


def _calibration(study: Study, places: Places, seed: int) -> Cell:
    name = calibration_cell(study, seed)
    stage = Stage(commands.calibration(study, places, seed), lambda: records.calibrated(places.statistics(name)))
    return Cell(name, (stage,), lambda seconds: records.calibration(study, places, seed, seconds))


def pruning_cells(study: Study, places: Places, outlook: Outlook) -> list[Cell]:
    """Plan and apply, or sparsify, and evaluate before any retraining, for every method, ratio and seed."""
    return [_pruning(study, places, outlook, pruning) for pruning in prunings(study)]


def _pruning(study: Study, places: Places, outlook: Outlook, pruning: Pruning) -> Cell:
    checkpoint, sparse = places.checkpoint(pruning.cell), pruning.method.pattern is not None

    def record(seconds: Seconds) -> dict[str, Any]:
        found = (records.sparse_pruning if sparse else records.pruning)(places, pruning, seconds)
        expected = outlook.targets.get(pruning.name)
        if expected is not None and found["target"] != vars(expected):
            raise RunError(f"{pruning.cell}: the pruned shape is {found['target']}, expected was {vars(expected)}")
        return found

    return Cell(
        pruning.cell,
        (
            *(_sparsifying if sparse else _planning)(study, places, outlook, pruning),
            _evaluation(study, places, pruning.cell, commands.evaluation(study, places, pruning.cell, checkpoint)),
        ),
        record,
    )


def _sparsifying(study: Study, places: Places, outlook: Outlook, pruning: Pruning) -> Iterator[Stage]:
    needs, checkpoint = outlook.needs[pruning.method.tag], places.checkpoint(pruning.cell)
    command = commands.sparsifying(study, places, pruning, text=needs.text, random=needs.random)
    yield Stage(command, lambda: records.sparsified(checkpoint, pruning))


def _planning(study: Study, places: Places, outlook: Outlook, pruning: Pruning) -> Iterator[Stage]:
    """The plan and its checkpoint; before it, where the model's loss must decide, the candidates and their scores."""
    needs, plan, checkpoint = outlook.needs[pruning.method.tag], places.plan(pruning), places.checkpoint(pruning.cell)
    statistics = None
    if needs.statistics:
        statistics = places.statistics(calibration_cell(study, pruning.seed))
    if needs.scores:
        asked, scored = places.candidates(pruning), places.statistics(pruning.cell)
        yield Stage(
            commands.planning(study, places, pruning, statistics, random=needs.random, stage="candidates"),
            lambda: records.asked(asked),
        )
        yield Stage(commands.scoring(study, places, pruning), lambda: records.scored(scored, asked))
        if needs.retraining:
            samples = outlook.lay.retrain(needs.retraining.tokens)
            command = commands.rescoring(study, places, pruning, samples)
            yield Stage(command, lambda: records.rescored(scored, asked))
        statistics = scored
    command = commands.planning(study, places, pruning, statistics, random=needs.random)
    yield Stage(command, lambda: records.planned(plan))
    yield Stage(commands.application(study, places, pruning), lambda: records.applied(checkpoint, plan))


def training_cells(study: Study, places: Places, grid: Grid) -> list[Cell]:
    """The runs that are compared, the longest first."""
    cells = [_training(study, places, cell) for cell in grid.cells]
    return sorted(cells, key=lambda cell: -cell.weight)


def _training(study: Study, places: Places, cell: TrainingCell) -> Cell:
    account = places.account(cell.id)
    return Cell(
        cell.id,
        (
            Stage(commands.training(study, places, cell), lambda: records.trained(account, cell.samples)),
            _evaluation(
                study,
                places,
                cell.id,
                commands.evaluation(study, places, cell.id, places.checkpoint(cell.id)),
            ),
        ),
        lambda seconds: records.training(places, cell, seconds),
        weight=cell.samples.steps,
    )


def _evaluation(study: Study, places: Places, cell: str, command: Command) -> Stage:
    scores = places.scores(cell)
    return Stage(command, lambda: records.evaluated(scores, study.evaluation.windows))


def all_commands(cells: Sequence[Cell]) -> dict[str, list[Command]]:
    """Every cell's command lines, for people."""
    return {cell.id: [stage.command for stage in cell.stages] for cell in cells}
