"""The cells of a study as jobs: commands, the check that they are done, dependencies, and the record.

A ``Cell`` has one or more ``Stage``s; the runner sees nothing else. The functions here make the cells of a study:
parents, then calibrations, prunings, what teachers say, and the training runs of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.errors import AccountError, MegatronPruneError, RunError, UsageError
from megatron_prune.study import commands, records
from megatron_prune.study.commands import Command
from megatron_prune.study.execution import Check, read_cell
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
        if expected is not None and found["target"] != vars(expected):
            raise RunError(f"{pruning.cell}: expected the pruned shape {vars(expected)}, got {found['target']}")
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


# Flags in which accounts may differ: a cell that has begun may continue with other values.
FREE = (
    "--save-interval", "--micro-batch-size", "--tensorboard-dir", "--wandb-project", "--wandb-entity",
    "--wandb-exp-name", "--wandb-save-dir", commands.SAVES_WHEN_TOLD,
)  # fmt: skip


def keep(places: Places, cell: Cell) -> None:
    """Write cell.json, after ``refuse_other_commands``.

    Flags in which accounts may differ (save interval, parallel layout, tracking) may change until a cell is finished.
    A finished cell keeps its commands.
    """
    path, content = places.cell(cell.id) / "cell.json", cell.to_json()
    earlier = read_cell(path) if path.is_file() else None
    if earlier is not None and has_begun(path.parent):
        content["about"] = _with_earlier(earlier.get("about", {}), content["about"])
        if earlier["stages"] != content["stages"] and _was_done(cell):
            content["stages"] = earlier["stages"]
    if earlier != content:
        artifacts.write_json(path, content)


def refuse_other_commands(study: StudyConfig, places: Places, cells: Sequence[Cell]) -> None:
    """UsageError if one of a study's ``cells`` has begun with commands that differ in flags that are not ``FREE``,
    except for corpora and tasks that its evaluation gets in addition."""
    for cell in cells:
        _refuse_other_commands(study, places, cell, cells)


def _refuse_other_commands(study: StudyConfig, places: Places, cell: Cell, cells: Sequence[Cell]) -> None:
    path = places.cell(cell.id) / "cell.json"
    if not path.is_file() or not (has_begun(path.parent) or places.scores(cell.id).is_file()):
        return
    earlier, now = read_cell(path), cell.to_json()
    if changed := _first_difference(earlier, now):
        raise UsageError(
            f"study {study.name}",
            got=f"{cell.id} with {changed}",
            expected="the commands that it was begun with",
            do=f"rename the study, or remove {path.parent}{_begun_after(places, cell, cells)}",
        )
    if cell.kind == "training" and earlier["stages"] != now["stages"] and not _was_done(cell) and _lost(places, cell):
        raise UsageError(
            "evaluation",
            got=f"corpora or tasks that {cell.id} was not scored on",
            expected="those that it was scored on",
            why=f"its weights in {places.checkpoint(cell.id)} were removed (retention: none)",
            do="take them out again, or give the study another name",
        )


def _lost(places: Places, cell: Cell) -> bool:
    """Whether a run was trained and scored, and its weights are gone since."""
    trained = cell.stages[0].done()
    return trained and places.scores(cell.id).is_file() and find_iteration(places.checkpoint(cell.id)) is None


def _was_done(cell: Cell) -> bool:
    try:
        return cell.is_done()
    except MegatronPruneError:  # the runner reports it
        return True


def _with_earlier(earlier: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons of a run now, and those before study.yaml was changed."""
    if "compared" not in about:
        return dict(about)
    groups = [*earlier.get("compared", []), *about["compared"]]
    return {**about, "compared": [group for number, group in enumerate(groups) if group not in groups[:number]]}


def _begun_after(places: Places, cell: Cell, cells: Sequence[Cell]) -> str:
    """Begun cells that depend on ``cell``, for an error text: remaking it alone would leave them stale."""
    resting, more = {cell.id}, {cell.id}
    while more:
        more = {one.id for one in cells if more.intersection(one.after) and not _takes_a_shape(one)} - resting
        resting |= more
    found = [one.id for one in cells if one.id in resting - {cell.id} and has_begun(places.cell(one.id))]
    return f" and what rests on it ({', '.join(found)})" if found else ""


def _takes_a_shape(cell: Cell) -> bool:
    """True for a dense scratch run: its name has the shape, and it needs no weights of the pruning."""
    argv = cell.stages[0].command.argv
    return "--shape-from" in argv and "--masks" not in argv


def has_begun(directory: Path) -> bool:
    """True once a stage or the job of a cell has written a log."""
    return any(directory.glob("*.log"))


def _first_difference(earlier: Any, now: Any) -> str:
    """The first difference between the commands of two cell.json, ignoring ``FREE`` flags; empty if there is none."""
    for old, new in zip(earlier["stages"], now["stages"], strict=False):
        words, others = _fixed(old["argv"]), _fixed(new["argv"])
        if old["stage"] == new["stage"] == "evaluate":
            if _adds(words, others):
                continue
            return _first_other_flag(words, others)
        if (old["stage"], words) != (new["stage"], others):
            return first_other_word(words, others) or f"another command line for {new['stage']}"
    return "other stages" if len(earlier["stages"]) != len(now["stages"]) else ""


def _fixed(argv: Sequence[str]) -> list[str]:
    """A command's words without ``FREE`` flags, sorted, since the order of keys in YAML has no meaning."""
    first, *others = _split(argv)
    kept = sorted((words for words in others if words[0] not in FREE), key=lambda words: words[0])
    return [*first, *(word for words in kept for word in words)]


def _split(argv: Sequence[str]) -> list[list[str]]:
    """The words before the first flag, then every flag with its values."""
    found: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return found


def _adds(earlier: Sequence[str], now: Sequence[str]) -> bool:
    """Whether two command lines of ``evaluate`` differ only in corpora and tasks that the later one has in addition."""
    before, after = _by_flag(earlier), _by_flag(now)
    corpora, more = ([*zip(one["--labels"], one["--data-path"], strict=True)] for one in (before, after))
    tasks, others = (set(one.get("--tasks", [""])[0].split(",")) - {""} for one in (before, after))
    grown = {"--labels", "--data-path", "--tasks", *(() if tasks else ("--tasks-path", "--num-fewshot", "--limit"))}
    same = all(before.get(flag) == after.get(flag) for flag in {*before, *after} - grown)
    return same and corpora == [pair for pair in more if pair in corpora] and tasks <= others


def _first_other_flag(earlier: Sequence[str], now: Sequence[str]) -> str:
    """``--limit 80 in place of 79``; ``no --limit in place of 79``"""
    before, after = _by_flag(earlier), _by_flag(now)
    flag = next(flag for flag in sorted({*before, *after}) if before.get(flag) != after.get(flag))
    words = f"{flag} {' '.join(after[flag])}".strip() if flag in after else f"no {flag}"
    return f"{words} in place of {' '.join(before[flag])}".strip() if flag in before else words


def _by_flag(words: Sequence[str]) -> dict[str, list[str]]:
    return {flag: values for flag, *values in _split(words)[1:]}


def first_other_word(earlier: Sequence[str], now: Sequence[str]) -> str:
    """``--lr 0.002 in place of 0.001``; empty if one is a prefix of the other."""
    for position, (a, b) in enumerate(zip(earlier, now, strict=False)):
        if a != b:
            flag = now[position - 1] if position and not b.startswith("--") else ""
            return f"{flag} {b} in place of {a}".strip()
    return ""
