"""Runs a study's cells: what is finished is skipped, what was killed goes on, what fails is retried and then marked.

Cells are a graph: a parent before its calibrations and prunings, these before the training runs. A launcher
(``local``, ``slurm``) takes cells and says which of them have ended; the runner decides what may begin, looks at
whether what a cell wrote says that it is done, and gives it its line in the ledger. A cell that failed is begun
again up to ``launch.retries`` times (an attempt that got further is none of them); then it is marked, what needs it
is blocked, and the rest goes on. Running the study again gives it another chance. Only one runner works on a study:
it holds ``study.lock``.
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
from megatron_prune.study import evidence, jobs, schema, validate
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.execution import NO_LOCKS, CellRefused, State, States, reached, unfinished
from megatron_prune.study.jobs import Cell
from megatron_prune.study.outlook import Outlook, look
from megatron_prune.study.prunings import Places
from megatron_prune.study.run.status import CellProgress
from megatron_prune.study.schema import StudyConfig

LOOKS = 10  # at a lock that is held: `study status` holds it too, for a moment
KINDS = ("parent", "calibration", "pruning", "retraining", "training")


class CellsFailed(RunError):
    """Some cells failed; all others that could run have finished."""


class Launcher(Protocol):
    """Takes cells and reports those that have ended. ``orders``: it lets a cell wait for others by itself."""

    orders: bool

    def check(self, cell: Cell) -> None:
        """UsageError for a cell that an earlier runner handed over with other settings, and that has not begun."""
        ...

    def room(self) -> bool:
        """True if another cell may begin now."""
        ...

    def begin(self, cell: Cell, after: Sequence[str]) -> bool:
        """Begin a cell, or hand it over to begin after those of ``after``, which have begun. False: not now."""
        ...

    def ended(self) -> Mapping[str, MegatronPruneError | None]:
        """Wait until cells have ended, or there may be room; why each failed, as far as the launcher knows."""
        ...


def run(study: schema.StudyConfig, places: Places, *, launcher: Launcher, progress: CellProgress) -> None:
    """Run everything that is not finished yet. CellsFailed names cells that failed, when the others are done."""
    with _locked(places.root):
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
        self.lines = self.ledger.read()  # what earlier runners wrote; what is finished, the artifacts say
        self.finished: dict[str, dict[str, Any]] = {}
        self.cells: dict[str, Cell] = {}
        self.begun: set[str] = set()
        self.failures: dict[str, list[str]] = {}  # of every cell, what went wrong at each attempt
        self.failed: dict[str, str] = {}
        self.reached: dict[str, tuple[int, int]] = {}  # how far a cell was when its attempt began

    def run(self) -> None:
        self._expand()
        while True:
            waiting = self._begin_what_may()
            if not self.begun and not waiting:
                break
            ended = self.launcher.ended()
            for cell in [cell for name, cell in self.cells.items() if name in ended]:  # what others wait for is first
                self._take_back(cell, ended[cell.id])
        if self.failed:
            self._mark_blocked()
            raise CellsFailed("\n".join(self.failed.values()))

    def _expand(self) -> None:
        """Name the cells that can be named by now, and look at what earlier runners have left of them."""
        if self.outlook.source is None:  # an import: before it there is no shape to check targets against
            cells = jobs.parents(self.study, self.places, self.outlook)
        else:
            cells = jobs.all_cells(self.study, self.places, self.outlook, frozenset(self.failed))
        for cell in cells:
            if cell.id not in self.begun and cell.id not in self.lines:
                self.launcher.check(cell)
        for cell in cells:
            if cell.id in self.begun:
                continue
            jobs.keep(self.study, self.places, cell, cells)
            if cell.id in self.lines and cell.id not in self.cells:
                self._look_at(cell)
            self.cells[cell.id] = cell

    def _look_at(self, cell: Cell) -> None:
        """A cell that is in the ledger is finished if its artifacts say so; what they contradict is not run again."""
        try:
            record = evidence.record(cell, self.states)
        except MegatronPruneError as wrong:
            self.failed[cell.id] = str(wrong)
            self.states.write(cell.id, State("failed", failures=[str(wrong)]))
            self.progress.failed(cell.id, 1, again=False)
            return
        if record is not None:
            self.finished[cell.id] = record
            self.progress.skipped(cell.id)
            apply(self.study, self.places, cell)

    def _begin_what_may(self) -> bool:
        """Hand out cells, parents first and long ones before short ones; True if there is room for no more."""
        while True:
            may = [cell for cell in self.cells.values() if self._may_begin(cell)]
            if not may or not self.launcher.room():
                return bool(may)
            cell = min(may, key=lambda cell: (KINDS.index(cell.kind), -cell.weight))  # of equals, the first
            try:
                done = cell.is_done()
            except AccountError as wrong:
                self._failed(cell, wrong)
                continue
            if done:  # an earlier runner was killed before its line
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
        """A cell has ended: its line in the ledger, another attempt, or the mark that it failed."""
        self.begun.discard(cell.id)
        if not _done(cell):
            if any(name not in self.finished for name in cell.after):
                return  # the queue dropped it since what it waited for failed: no attempt of its own
            self._failed(cell, error or self._why(cell))
            return
        self._finish(cell)

    def _finish(self, cell: Cell) -> None:
        """A cell's line in the ledger, and what it lets the runner know."""
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
        """True while shapes of searches, or FLOPs that scratch runs are to match, were not known."""
        study = self.study
        flops = any("equal-flops" == setting for entry in study.methods for setting, _ in study.compared(entry))
        return (
            self.outlook.source is None
            or len(self.outlook.targets) < len(self.outlook.needs)
            or (flops and any(name not in self.outlook.spent for name in self.outlook.targets))
        )

    def _failed(self, cell: Cell, error: MegatronPruneError) -> None:
        """An attempt has ended: one that got further, to a time limit for example, has not failed and is continued."""
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
            self._expand()  # scratch runs that were to take their shape from it may take it from another

    def _mark_blocked(self) -> None:
        for cell in self.cells.values():
            if cell.id not in self.finished and cell.id not in self.failed:
                missing = ", ".join(name for name in cell.after if name not in self.finished)
                self.states.write(cell.id, State("blocked", failures=[f"needs {missing}"]))

    def _why(self, cell: Cell) -> MegatronPruneError:
        """What is wrong with a cell that has ended, from what it left."""
        for stage in cell.stages:
            try:
                if not stage.done():
                    return unfinished(self.places.cell(cell.id), stage.command.stage)
            except MegatronPruneError as error:
                return error
        return RunError(f"{cell.id}: it ended, and was done only afterwards")


def _done(cell: Cell) -> bool:
    """True if a cell is done, and is what it should be."""
    try:
        return cell.is_done()
    except AccountError:
        return False


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the study's lock; RunError if another runner does. It goes with the process, however that ends."""
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
            raise RunError(f"another runner (process {handle.read().strip()}) is at work on {root}")
        handle.truncate(0)
        handle.write(f"{os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


# Which checkpoints of the compared runs stay on the disk (``retention`` in study.yaml).
#
# ``all`` keeps every save. ``final`` keeps the last save of each run. ``none`` keeps no weights of a run once its line
# is in the ledger: its account, losses and scores stay. Parents and pruned starts always stay, since a study that grows
# starts new runs from them. Nothing is removed before a cell's line is written, and a removal that was cut short is
# finished when the study is next run.


def apply(study: StudyConfig, places: Places, cell: Cell) -> None:
    """Remove what ``retention`` does not keep of a cell that is finished."""
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
