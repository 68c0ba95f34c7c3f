"""One stage of a cell, run: its log, its seconds, and whether what it wrote says that it succeeded.

Beside a cell's ``cell.json``: ``<stage>.log``, ``stages.json`` (seconds of every stage that was run to its end) and
``state.json`` (what the runner last knew of the cell; ``study status`` shows it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prune import artifacts
from megatron_prune.checkpoint.tracker import TRACKER_FILE
from megatron_prune.errors import EXIT_REFUSED, RunError
from megatron_prune.study.checks import Check
from megatron_prune.study.places import Places

TAIL_LINES = 15
# Why a lock that another does not hold cannot be had.
NO_LOCKS = (
    "its file system has no locks (Lustre has them when it is mounted with flock), and two runs could write the same "
    "files: put the study on another one"
)


class Refused(RunError):
    """A stage that would fail again: its command was refused."""


@dataclass(frozen=True)
class State:
    """What is known of a cell: ``failures`` of every attempt of this runner, and its ``job`` in a queue."""

    state: Literal["waiting", "begun", "finished", "failed", "blocked"]
    failures: Sequence[str] = ()
    job: str | None = None
    queue: str | None = None  # Slurm's word for the state of that job


class States:
    """The files that say how far cells are."""

    def __init__(self, places: Places):
        self.places = places

    def write(self, cell: str, state: State) -> None:
        artifacts.write_json(self.places.cell(cell) / "state.json", asdict(state))

    def read(self, cell: str) -> State | None:
        path = self.places.cell(cell) / "state.json"
        return State(**artifacts.read_json(path)) if path.is_file() else None

    def seconds(self, cell: str) -> dict[str, float]:
        return seconds_of(self.places.cell(cell))


def seconds_of(directory: Path) -> dict[str, float]:
    """Seconds of a cell's stages that have been run to their end. Attempts that were killed are in no sum: nobody
    was there to time them."""
    path = directory / "stages.json"
    return artifacts.read_json(path) if path.is_file() else {}


def reached(directory: Path) -> tuple[int, int]:
    """How far a cell is: stages that have been run to their end, and steps that its trainings have saved."""
    saved = 0
    for path in (*directory.glob("checkpoint"), *directory.glob("candidates/*/retrained")):
        tracker = path / TRACKER_FILE
        text = tracker.read_text().strip() if tracker.is_file() else ""
        saved += int(text) if text.isdecimal() else 0
    return len(seconds_of(directory)), saved


def execute(directory: Path, stage: str, done: Callable[[], bool], command: Callable[[Path], int]) -> None:
    """Run ``command(log)`` in the cell ``directory`` and keep its seconds; RunError unless ``done`` afterwards."""
    began = time.monotonic()
    code = command(directory / f"{stage}.log")
    if not done():
        raise unfinished(directory, stage, code)
    seconds = seconds_of(directory) | {stage: round(time.monotonic() - began, 2)}
    artifacts.write_json(directory / "stages.json", seconds)


def unfinished(directory: Path, stage: str, code: int | None = None) -> RunError:
    """The error of a stage that has ended without saying that it succeeded."""
    log = directory / f"{stage}.log"
    kind = Refused if code == EXIT_REFUSED else RunError
    ended = "ended" if code is None else f"ended (exit code {code})"
    return kind(f"{directory.name}: {stage} {ended} without saying that it succeeded. The end of {log}:\n{_tail(log)}")


def described(directory: Path, stage: str) -> tuple[dict[str, Any], Check]:
    """A stage as a cell's ``cell.json`` has it, and the check that says whether it is done."""
    for known in artifacts.read_json(directory / "cell.json")["stages"]:
        if known["stage"] == stage:
            arguments = dict(known["done"])
            return known, Check(arguments.pop("check"), arguments)
    raise RunError(f"{directory / 'cell.json'} has no stage {stage}")


def _tail(log: Path) -> str:
    if not log.is_file():
        return "(there is no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
