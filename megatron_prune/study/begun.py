"""What a cell that has begun keeps: its ``cell.json``, and the commands in it.

study.yaml may be changed between two runs of a study. A cell that has begun goes on with the commands that it was begun
with, but for flags in which accounts may differ, and for corpora and tasks that its evaluation gets in addition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.study import commands
from megatron_prune.study.execution import has_begun, read_cell
from megatron_prune.study.jobs import Cell
from megatron_prune.study.prunings import Places
from megatron_prune.study.schema import StudyConfig

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
