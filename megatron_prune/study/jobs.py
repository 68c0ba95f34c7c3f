"""The cells of a study as jobs: commands, the check that they are done, dependencies, and the record.

A ``Cell`` has one or more ``Stage``s; the runner sees nothing else. The functions here make the cells of a study:
parents, then calibrations, prunings, what teachers say, and the training runs of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import AccountError, MegatronPruneError, RunError
from megatron_prune.study import commands, records
from megatron_prune.study.commands import Command
from megatron_prune.study.execution import Check, has_begun, read_cell
from megatron_prune.study.grid import Grid, Teaching, TrainingCell
from megatron_prune.study.outlook import Outlook
from megatron_prune.study.prunings import (
    Places,
    Pruning,
    calibration_cell,
    learning_samples,
    links,
    parent_cell,
    parent_cells,
    source_cell,
)
from megatron_prune.study.sample_ranges import SampleRange
from megatron_prune.study.schema import StudyConfig
from megatron_prune.training import learned_file
from megatron_prune.training.account import ACCOUNT

Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """One command of a cell. ``done`` looks at what the command writes."""

    command: Command
    done: Check


@dataclass(frozen=True)
class Cell:
    """Stages in order, the record once all are done, and the cells that must finish first."""

    id: str
    kind: str  # parent, calibration, pruning, retraining, teaching, training: the order of starting
    stages: tuple[Stage, ...]
    record: Callable[[Seconds], dict[str, Any]]
    after: tuple[str, ...] = ()
    weight: float = 1.0  # relative duration among its kind; longer ones start first
    alone: bool = False  # nothing can run next to it
    about: Mapping[str, Any] = field(default_factory=dict)  # of a training run: its description and comparisons

    def is_done(self) -> bool:
        """True if all its artifacts say that it is done; an unreadable one does not.

        AccountError if it is done, but is not what it should be.
        """
        try:
            return all(stage.done() for stage in self.stages)
        except AccountError:
            raise
        except MegatronPruneError:
            return False

    def to_json(self) -> dict[str, Any]:
        """``cell.json``: the description, the commands, and the checks that they are done."""
        return {
            "cell": self.id,
            "about": {"kind": self.kind, **self.about},
            "stages": [
                {
                    "stage": stage.command.stage,
                    "nproc": stage.command.nproc,
                    "argv": list(stage.command.argv),
                    "done": {"check": stage.done.name, **stage.done.arguments},
                }
                for stage in self.stages
            ],
        }


def all_cells(study: StudyConfig, places: Places, outlook: Outlook, failed: frozenset[str] = frozenset()) -> list[Cell]:
    """Every cell that can be named so far. Scratch runs do not take their shape from a pruning that ``failed``."""
    others = [
        *calibrations(study, places, outlook),
        *(_pruning(study, places, outlook, pruning) for pruning in links(study)),
        *(_teaching(study, places, made) for made in outlook.grid(study).teachings),
        *training_cells(study, places, outlook, failed),
    ]
    found = parents(study, places, outlook)
    alone = len(found) == 1 and all(cell.after for cell in others)
    return [*(replace(cell, alone=alone) for cell in found), *others]


def parents(study: StudyConfig, places: Places, outlook: Outlook) -> list[Cell]:
    """The parents: trained, imported or only loaded, and evaluated."""
    return [_parent(study, places, outlook, cell, seed) for cell, seed in parent_cells(study)]


def _parent(study: StudyConfig, places: Places, outlook: Outlook, cell: str, seed: int) -> Cell:
    stages = []
    samples = outlook.lay.batch.range(0, outlook.lay.parent_end // outlook.lay.batch.samples)
    if study.parent.pretrain is not None:
        command = commands.parent_training(study, places, samples, seed)
        stages.append(_trained(places, cell, samples, *study.parent_run(seed), command, permuted=False))
    elif study.parent.import_hf is not None:
        check = Check("imported", {"checkpoint": str(places.checkpoint(cell))})
        stages.append(Stage(commands.importing(study, places), check))
    beside = places.beside_parent(study, seed) / "account.json"
    trained = study.parent.pretrain is not None or (study.parent.load is not None and beside.is_file())
    stages.append(_evaluation(study, places, cell, places.parent(study, seed), beside if trained else None))

    def record(seconds: Seconds) -> dict[str, Any]:
        return records.parent(study, places, seed, outlook.lay, seconds)

    return Cell(cell, "parent", tuple(stages), record)


def calibrations(study: StudyConfig, places: Places, outlook: Outlook) -> list[Cell]:
    """One cell per set of calibration windows and checkpoint from which a method needs statistics."""
    cells: dict[str, Cell] = {}
    for pruning in links(study):
        if outlook.needs[pruning.name].statistics:
            name = calibration_cell(study, pruning)
            cells.setdefault(name, _calibration(study, places, name, pruning))
    return list(cells.values())


def _calibration(study: StudyConfig, places: Places, name: str, pruning: Pruning) -> Cell:
    check = Check("calibrated", {"statistics": str(places.statistics(name))})
    return Cell(
        name,
        "calibration",
        (Stage(commands.calibration(study, places, pruning), check),),
        lambda seconds: records.calibration(study, places, pruning, seconds),
        after=(source_cell(study, pruning),),
    )


def _pruning(study: StudyConfig, places: Places, outlook: Outlook, pruning: Pruning) -> Cell:
    """Plan and apply, or sparsify, and evaluate before any retraining."""
    checkpoint, sparse = places.checkpoint(pruning.cell), pruning.method.pattern is not None

    def record(seconds: Seconds) -> dict[str, Any]:
        found = (records.sparse_pruning if sparse else records.pruning)(places, pruning, seconds)
        expected = outlook.targets.get(pruning.name)
        if expected is not None and ModelShape.read(found["target"]) != expected:
            raise RunError(f"{pruning.cell}: expected the pruned shape {asdict(expected)}, got {found['target']}")
        return found

    after = [source_cell(study, pruning)]
    if outlook.needs[pruning.name].statistics:
        after.append(calibration_cell(study, pruning))
    stages = (_sparsifying if sparse else _planning)(study, places, outlook, pruning)
    evaluation = _evaluation(study, places, pruning.cell, checkpoint)
    return Cell(pruning.cell, "pruning", (*stages, evaluation), record, tuple(after))


def _sparsifying(study: StudyConfig, places: Places, outlook: Outlook, pruning: Pruning) -> Iterator[Stage]:
    needs, method = outlook.needs[pruning.name], pruning.method
    command = commands.sparsifying(study, places, pruning, text=needs.text, random=needs.random)
    asked = {"checkpoint": str(places.checkpoint(pruning.cell)), "method": method.name, "pattern": method.pattern}
    yield Stage(command, Check("sparsified", asked))


def _planning(study: StudyConfig, places: Places, outlook: Outlook, pruning: Pruning) -> Iterator[Stage]:
    """The plan and its checkpoint; first, if the model's loss must decide, the candidates and their scores."""
    needs, plan = outlook.needs[pruning.name], str(places.plan(pruning))
    statistics = None
    if needs.statistics:
        statistics = places.statistics(calibration_cell(study, pruning))
    if needs.learning:
        samples, folder = learning_samples(study, outlook.lay, pruning), places.learned(pruning)
        command = commands.learning(study, places, pruning, samples)
        statistics = folder / learned_file.FILE
        rate = commands.learning_rate(study, pruning)
        trained = _asked(folder / ACCOUNT, samples, pruning.seed, rate, permuted=True)
        yield Stage(command, Check("learned", trained | {"masks": str(statistics)}))
    if needs.scores:
        asked, scored = str(places.candidates(pruning)), places.statistics(pruning.cell)
        question = {"statistics": str(scored), "candidates": asked}
        yield Stage(
            commands.planning(study, places, pruning, statistics, random=needs.random, stage="candidates"),
            Check("asked", {"candidates": asked}),
        )
        yield Stage(commands.scoring(study, places, pruning), Check("scored", question))
        if needs.retraining:
            samples = outlook.lay.retrain(needs.retraining.tokens, pruning.trained)
            command = commands.rescoring(study, places, pruning, samples)
            yield Stage(command, Check("rescored", question))
        statistics = scored
    command = commands.planning(study, places, pruning, statistics, random=needs.random)
    yield Stage(command, Check("planned", {"plan": plan}))
    applied = Check("applied", {"checkpoint": str(places.checkpoint(pruning.cell)), "plan": plan})
    yield Stage(commands.application(study, places, pruning), applied)


def _teaching(study: StudyConfig, places: Places, made: Teaching) -> Cell:
    """The parent's most probable words on a range of the stream, for all runs that learn from them there."""
    check = Check("taught", {"cache": str(places.taught(made.id)), "samples": list(made.samples.samples)})
    return Cell(
        made.id,
        "teaching",
        (Stage(commands.teaching(study, places, made), check),),
        lambda seconds: records.teaching(places, made, seconds),
        after=(parent_cell(study, made.seed),),
        weight=made.samples.steps,
    )


def training_cells(
    study: StudyConfig, places: Places, outlook: Outlook, failed: frozenset[str] = frozenset()
) -> list[Cell]:
    """The compared runs and those between links, those of most steps first, except those whose name depends on an
    unknown shape."""
    grid = outlook.grid(study)
    compared = _compared(study, outlook, grid)
    return [
        _training(study, places, outlook, cell, _source(places, cell, failed), compared.get(cell.id, []))
        for cell in sorted(grid.cells, key=lambda cell: -cell.samples.steps)
        if cell.kind != "scratch" or cell.masked or cell.source.name in outlook.targets
    ]


def _compared(study: StudyConfig, outlook: Outlook, grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """By run, its comparisons: each as ``Comparison.group``, and whether it is in the study's family.

    This is stored with the run, so that a comparison later removed from study.yaml still counts.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for made in grid.comparisons:
        group = made.group(outlook.lay.retrain(made.budget).steps * outlook.lay.batch.tokens) | {"budget": made.budget}
        group["in_family"] = study.family.holds(group)
        for _, *names in made.runs:
            for name in names:
                if name is not None and group not in found.setdefault(name, []):
                    found[name].append(group)
    return found


def _source(places: Places, cell: TrainingCell, failed: frozenset[str]) -> Pruning:
    """The pruning whose checkpoint gives a run its weights or shape: the one it has begun with, if any.

    A scratch run shared by several prunings takes the first one that did not fail.
    """
    candidates = (cell.source, *cell.others)
    directory = places.cell(cell.id)
    if len(candidates) > 1 and has_begun(directory):
        words = read_cell(directory / "cell.json")["stages"][0]["argv"]
        for pruning in candidates:
            if str(places.checkpoint(pruning.cell)) in words:
                return pruning
    return next((pruning for pruning in candidates if pruning.cell not in failed), cell.source)


def _training(
    study: StudyConfig,
    places: Places,
    outlook: Outlook,
    cell: TrainingCell,
    source: Pruning,
    compared: Sequence[Mapping[str, Any]],
) -> Cell:
    shape = outlook.targets.get(source.name)
    free = shape is not None and commands.needs_no_pruning(study, cell)
    command = commands.training(study, places, cell, source, shape if free else None)
    size = shape or outlook.source
    flops = 1 if size is None else size.training_flops(outlook.lay.batch.seq_length)
    return Cell(
        cell.id,
        "retraining" if cell.kind == "retrained" else "training",
        (
            _trained(places, cell.id, cell.samples, cell.seed, cell.lr, command, objective=cell.objective),
            _evaluation(study, places, cell.id, places.checkpoint(cell.id), places.account(cell.id)),
        ),
        lambda seconds: records.training(places, cell, seconds),
        after=needed(study, cell, source, free=free),
        weight=cell.samples.steps * flops,
        about={"arm": cell.kind, "seed": cell.seed, "lr": cell.lr, "compared": list(compared)},
    )


def needed(study: StudyConfig, cell: TrainingCell, source: Pruning, *, free: bool) -> tuple[str, ...]:
    """The cells that a run starts after; ``free``: it needs no pruning (``commands.needs_no_pruning``)."""
    found = [] if free else [source.cell]
    found += [] if cell.follows is None else [cell.follows]
    if cell.objective == "distill":
        found.append(cell.taught or parent_cell(study, cell.seed))
    return tuple(found)


def _trained(
    places: Places,
    cell: str,
    samples: SampleRange,
    seed: int,
    lr: float,
    command: Command,
    *,
    permuted: bool = True,
    objective: str = "lm",
) -> Stage:
    asked = _asked(places.account(cell), samples, seed, lr, permuted=permuted)
    return Stage(command, Check("trained", asked | ({} if objective == "lm" else {"objective": objective})))


def _asked(account: Path, samples: SampleRange, seed: int, lr: float, *, permuted: bool) -> dict[str, Any]:
    """What an account is to say."""
    asked = {"account": str(account), "start": samples.start, "end": samples.end, "steps": samples.steps}
    return asked | {"seed": seed, "permutation_seed": seed if permuted else None, "lr": lr}


def _evaluation(study: StudyConfig, places: Places, cell: str, checkpoint: Path, account: Path | None = None) -> Stage:
    """``account``: of the training that wrote the checkpoint, if there was one."""
    asked: dict[str, Any] = {"scores": str(places.scores(cell)), "windows": study.evaluation.windows}
    asked |= {"checkpoint": str(checkpoint), "account": None if account is None else str(account)}
    if study.evaluation.corpora:
        asked["corpora"] = list(commands.scored_corpora(study))
    if study.evaluation.tasks:
        asked["tasks"] = study.evaluation.lm_eval_tasks
    return Stage(commands.evaluation(study, places, cell, checkpoint), Check("evaluated", asked))


def all_commands(cells: Sequence[Cell]) -> dict[str, list[Command]]:
    """Every cell's command lines, for display."""
    return {cell.id: [stage.command for stage in cell.stages] for cell in cells}
