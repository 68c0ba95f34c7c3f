"""Runs a study's cells: finished ones are skipped, killed ones resume, failed ones are retried and then marked.

Cells form a graph: a parent before its calibrations and prunings, these before the training runs. A launcher
(``local``, ``slurm``) takes cells and reports which have ended; the runner decides which may start, checks from its
artifacts whether a cell is done, and writes its line in the ledger. A failed cell is restarted up to ``launch.retries``
times (attempts that made progress do not count); then it is marked as failed, cells that need it are blocked, and the
rest continue. Running the study again retries it. Only one runner works on a study: it holds ``study.lock``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_prune import artifacts
from megatron_prune.checkpoint.tracker import TRACKER_FILE
from megatron_prune.errors import AccountError, MegatronPruneError, RunError, UsageError
from megatron_prune.masks import MASKS
from megatron_prune.study import begun, evidence, jobs, schema, validate
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.execution import NO_LOCKS, CellRefused, State, States, reached, unfinished
from megatron_prune.study.jobs import Cell
from megatron_prune.study.outlook import Outlook, look
from megatron_prune.study.prunings import Places
from megatron_prune.study.run.status import CellProgress
from megatron_prune.study.schema import StudyConfig

LOOKS = 10  # attempts at a held lock, which `study status` holds briefly too
KINDS = ("parent", "calibration", "pruning", "retraining", "teaching", "training")


class CellsFailed(RunError):
    """Some cells failed; all others that could run are finished."""


class Launcher(Protocol):
    """Takes cells and reports those that have ended. ``orders``: it handles dependencies between cells itself."""

    orders: bool

    def check(self, cell: Cell) -> None:
        """UsageError for a cell that an earlier runner submitted with other settings, and that has not begun."""
        ...

    def room(self) -> bool:
        """True if another cell may start now."""
        ...

    def begin(self, cell: Cell, after: Sequence[str]) -> bool:
        """Start a cell, or submit it to start after those in ``after``, which have started. False: not now."""
        ...

    def ended(self) -> Mapping[str, MegatronPruneError | None]:
        """Wait until cells have ended or there may be room; returns why each failed, if the launcher knows."""
        ...


def run(study: schema.StudyConfig, places: Places, *, launcher: Launcher, progress: CellProgress) -> None:
    """Run all unfinished cells. Once the others are done, CellsFailed names those that failed."""
    with _locked(places.root):
        for written in (places.cell("parent") / "cell.json", places.root / "report" / "index.html"):
            artifacts.refuse_unwritable("--runs-dir", written)
        artifacts.refuse_unwritable("--runs-dir", places.ledger, appended=True)
        outlook = validate.check(study, places)
        artifacts.write_json(places.root / "study.json", schema.resolved(study))
        _Runner(study, places, outlook, launcher, progress).run()


class _Runner:
    def __init__(
        self,
        study: schema.StudyConfig,
        places: Places,
        outlook: Outlook,
        launcher: Launcher,
        progress: CellProgress,
    ):
        self.study, self.places, self.outlook, self.launcher = study, places, outlook, launcher
        self.progress, self.states = progress, States(places)
        self.ledger = Ledger(places.ledger)
        self.lines = self.ledger.read()  # from earlier runners; the artifacts decide what is finished
        self.finished: dict[str, dict[str, Any]] = {}
        self.cells: dict[str, Cell] = {}
        self.begun: set[str] = set()
        self.failures: dict[str, list[str]] = {}  # by cell, the error of each attempt
        self.failed: dict[str, str] = {}
        self.reached: dict[str, tuple[int, int]] = {}  # progress of a cell at the start of its attempt

    def run(self) -> None:
        self._expand()
        while True:
            waiting = self._begin_what_may()
            if not self.begun and not waiting:
                break
            ended = self.launcher.ended()
            for cell in [
                cell for name, cell in self.cells.items() if name in ended
            ]:  # cells that others depend on come first
                self._take_back(cell, ended[cell.id])
        if self.failed:
            self._mark_blocked()
            raise CellsFailed("\n".join(self.failed.values()))

    def _expand(self) -> None:
        """Name the cells that can be named so far, and check their state from earlier runners."""
        if self.outlook.source is None:  # before an import there is no shape to check targets against
            cells = jobs.parents(self.study, self.places, self.outlook)
        else:
            cells = jobs.all_cells(self.study, self.places, self.outlook, frozenset(self.failed))
        for cell in cells:
            if cell.id not in self.begun and cell.id not in self.lines:
                self.launcher.check(cell)
        begun.refuse_other_commands(self.study, self.places, cells)  # all, before any is changed
        for cell in cells:
            if cell.id in self.begun:
                continue
            begun.keep(self.places, cell)
            known = cell.id in self.cells
            self.cells[cell.id] = cell
            if cell.id in self.lines and not known:
                self._look_at(cell)

    def _look_at(self, cell: Cell) -> None:
        """A cell in the ledger is finished if its artifacts say so; if they contradict it, it is not run again."""
        try:
            record = evidence.record(cell, self.states)
        except MegatronPruneError as wrong:
            self.failed[cell.id] = str(wrong)
            self.states.write(cell.id, State("failed", failures=[str(wrong)]))
            self.progress.failed(cell.id, 1, again=False)
            return
        if record is not None and evidence.grown(self.lines[cell.id], record):
            self._finish(cell)  # an earlier runner was killed before it wrote what was scored in addition
        elif record is not None:
            self.finished[cell.id] = record
            self.progress.skipped(cell.id)
            apply(self.study, self.places, cell)

    def _begin_what_may(self) -> bool:
        """Start cells, parents first and long before short ones; True if there is no room for more."""
        while True:
            may = [cell for cell in self.cells.values() if self._may_begin(cell)]
            if not may or not self.launcher.room():
                return bool(may)
            cell = min(may, key=lambda cell: (KINDS.index(cell.kind), -cell.weight))  # ties: the first
            try:
                done = cell.is_done()
            except AccountError as wrong:
                self._failed(cell, wrong)
                continue
            if done:  # an earlier runner was killed before writing its line
                self._finish(cell)
                continue
            self.states.write(cell.id, State("begun", failures=self.failures.get(cell.id, [])))
            self.reached[cell.id] = reached(self.places.cell(cell.id))
            if self.launcher.begin(cell, [name for name in cell.after if name in self.begun]):
                self.begun.add(cell.id)
            else:
                self.states.write(cell.id, State("waiting", failures=self.failures.get(cell.id, [])))

    def _may_begin(self, cell: Cell) -> bool:
        if cell.id in self.finished or cell.id in self.begun or cell.id in self.failed:
            return False
        return all(name in self.finished or (self.launcher.orders and name in self.begun) for name in cell.after)

    def _take_back(self, cell: Cell, error: MegatronPruneError | None) -> None:
        """Handle a cell that has ended: write its ledger line, retry it, or mark it as failed."""
        self.begun.discard(cell.id)
        if not _done(cell):
            if any(name not in self.finished for name in cell.after):
                return  # dropped by the queue since a dependency failed: not an attempt
            self._failed(cell, error or self._why(cell))
            return
        self._finish(cell)

    def _finish(self, cell: Cell) -> None:
        """Write a cell's line in the ledger and use the results that it makes known."""
        try:
            record = cell.record(self.states.seconds(cell.id))
        except MegatronPruneError as wrong:
            self._failed(cell, CellRefused(str(wrong)))
            return
        self.ledger.append(evidence.line(self.places, cell, record))
        self.finished[cell.id] = record
        self.states.write(cell.id, State("finished", failures=self.failures.get(cell.id, [])))
        self.progress.finished(cell.id, record)
        apply(self.study, self.places, cell)
        if cell.kind in ("parent", "pruning") and self._knows_too_little():
            self.outlook = (validate.check if self.outlook.source is None else look)(self.study, self.places)
            self._expand()

    def _knows_too_little(self) -> bool:
        """True while shapes of searches, or FLOPs for scratch runs, are unknown."""
        study = self.study
        flops = any("equal-flops" == setting for entry in study.methods for setting, _ in study.compared(entry))
        return (
            self.outlook.source is None
            or len(self.outlook.targets) < len(self.outlook.needs)
            or (flops and any(name not in self.outlook.spent for name in self.outlook.targets))
        )

    def _failed(self, cell: Cell, error: MegatronPruneError) -> None:
        """Handle a failed attempt. One that made progress, for example up to a time limit, is continued instead."""
        told, refused = (
            self.failures.setdefault(cell.id, []),
            isinstance(error, CellRefused | UsageError | AccountError),
        )
        now = reached(self.places.cell(cell.id))
        if not refused and now > self.reached.get(cell.id, now):
            self.progress.stopped(cell.id)
            self.states.write(cell.id, State("waiting", failures=told))
            return
        told.append(str(error))
        again = len(told) <= self.study.launch.retries and not refused
        self.progress.failed(cell.id, len(told), again=again)
        if again:
            self.states.write(cell.id, State("waiting", failures=told))
            return
        self.failed[cell.id] = str(error)
        self.states.write(cell.id, State("failed", failures=told))
        if cell.kind == "pruning" and self.outlook.source is not None:
            self._expand()  # scratch runs may take their shape from another pruning

    def _mark_blocked(self) -> None:
        for cell in self.cells.values():
            if cell.id not in self.finished and cell.id not in self.failed:
                missing = ", ".join(name for name in cell.after if name not in self.finished)
                self.states.write(cell.id, State("blocked", failures=[f"needs {missing}"]))

    def _why(self, cell: Cell) -> MegatronPruneError:
        """The error of a cell that has ended, from its files."""
        for stage in cell.stages:
            try:
                if not stage.done():
                    return unfinished(self.places.cell(cell.id), stage.command.stage)
            except MegatronPruneError as error:
                return error
        return RunError(f"{cell.id}: it ended, and was done only afterwards")


def _done(cell: Cell) -> bool:
    """True if a cell is done and consistent."""
    try:
        return cell.is_done()
    except AccountError:
        return False


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the study's lock; RunError if another runner does. It is released when the process ends."""
    artifacts.refuse_unwritable("--runs-dir", root / "study.lock", appended=True)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "study.lock", "a+") as handle:
        for _ in range(LOOKS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError as error:
                raise RunError(f"{root / 'study.lock'} cannot be locked ({error.strerror}): {NO_LOCKS}") from error
        else:
            handle.seek(0)
            raise RunError(
                f"{root}: expected no other runner, got process {handle.read().strip()} at work: wait for it or stop it"
            )
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


# Which checkpoints of the compared runs are kept on disk (``retention`` in study.yaml).
#
# ``all`` keeps every save, ``final`` the last save of each run, ``none`` no weights of a run once its line is in the
# ledger (account, losses and scores are kept). Parents and pruned starts are always kept, since a study that grows
# starts new runs from them. Nothing is removed before a cell's line is written; an interrupted removal is finished on
# the next run.


def apply(study: StudyConfig, places: Places, cell: Cell) -> None:
    """Remove the checkpoints of a finished cell that ``retention`` does not keep."""
    if cell.kind != "training" or study.retention == "all":
        return
    checkpoint = places.checkpoint(cell.id)
    saves = sorted(checkpoint.glob("iter_*"))
    removed = saves if study.retention == "none" else saves[:-1]
    if study.retention == "none":
        (checkpoint / TRACKER_FILE).unlink(missing_ok=True)
        removed = [*saves, checkpoint / MASKS]
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path)
