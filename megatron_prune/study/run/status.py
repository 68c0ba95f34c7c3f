"""Progress of a study: a table of its cells, and the lines that a runner prints while it works.

The table is made only from files, so that any process can print it.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_prune.study import custody
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.execution import States, read_cell
from megatron_prune.study.prunings import Places

COLUMNS = "cell state validation test seconds"


def show(name: str, places: Places, console: Console, watch: float | None = None) -> None:
    """Print the table; with ``watch``, refresh it every so many seconds until no runner is at work."""
    if watch is None:
        console.print(table(name, places))
    else:
        with Live(table(name, places), console=console, auto_refresh=False) as live:
            while at_work(places):
                time.sleep(watch)
                live.update(table(name, places), refresh=True)
    if not any(places.root.glob("cells/*/cell.json")):
        console.print(f"{places.root}: nothing has been run")


def table(name: str, places: Places) -> Table:
    """The cells, finished ones first, in order of completion."""
    finished = Ledger(places.ledger).read()
    known = {path.parent.name for path in places.root.glob("cells/*/cell.json")}
    running = at_work(places)
    states, rows, counts = States(places), [], Counter[str]()
    for cell in [*finished, *sorted(known - set(finished), key=lambda cell: (not _begun(places, cell), cell))]:
        seconds = states.seconds(cell)
        if cell in finished:
            word, text = "finished", "finished"
        else:
            word, text = _state(places, states, cell, running)
        counts[word] += 1
        shown = _losses(places, cell) if cell in finished else ["", ""]
        rows.append((cell, text, *shown, f"{sum(seconds.values()):.1f}" if seconds else ""))
    together = ", ".join(f"{count} {word}" for word, count in counts.items())
    at = "a runner is at work" if running else "no runner is at work"
    made = Table(title=f"study {name}: {together or 'no cells yet'}; {at}")
    for column in COLUMNS.split():
        made.add_column(column, justify="left" if column in ("cell", "state") else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def at_work(places: Places) -> bool:
    """True while a runner of this machine holds the study's lock."""
    path = places.root / "study.lock"
    if not path.is_file():
        return False
    with open(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no runner starts on a file system without locks
            return False
    return False


def _state(places: Places, states: States, cell: str, running: bool) -> tuple[str, str]:
    """A word for the state of an unfinished cell, and a text with details."""
    state, done = states.read(cell), states.seconds(cell)
    stages = [stage["stage"] for stage in read_cell(places.cell(cell) / "cell.json")["stages"]]
    of_stages = f"{len(done)} of {len(stages)} stages" if done else ""
    if state is None or state.state == "waiting":
        return "waiting", _joined("waiting", of_stages, f"attempt {len(state.failures) + 1}" if state else "")
    if state.state in ("failed", "blocked"):
        told = state.failures[-1].splitlines()[0] if state.failures else ""
        return state.state, _joined(f"{state.state} after {len(state.failures)} attempts" if state.state == "failed"
                                    else "blocked", "" if state.state == "failed" else told)  # fmt: skip
    stage = next((name for name in stages if name not in done), stages[-1])
    job = f"job {state.job} {state.queue}" if state.job else ""
    if not running and not state.job:
        return "interrupted", _joined("interrupted", of_stages)
    return "running", _joined(stage, _steps(places, cell) if stage == "pretrain" else "", job)


def _losses(places: Places, cell: str) -> list[str]:
    """Validation and test loss from a cell's scores, not from the ledger; empty if it has none."""
    path = places.scores(cell)
    corpora = custody.read_scores(path)["corpora"] if path.is_file() else {}
    return [f"{corpora[name]['loss']:.4f}" if name in corpora else "" for name in ("validation", "test")]


def _steps(places: Places, cell: str) -> str:
    """The number of steps in a training run's table of losses."""
    path = places.losses(cell)
    return f"step {max(_lines(path) - 1, 0):,}" if path.is_file() else ""


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _joined(*words: Any) -> str:
    return ", ".join(word for word in words if word)


def _begun(places: Places, cell: str) -> bool:
    return (places.cell(cell) / "stages.json").is_file()


class CellProgress:
    """Prints through rich; without a terminal only lines for finished stages appear."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, width=None)
        self.began = time.monotonic()
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> CellProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def stage(self, cell: str, stage: str) -> Iterator[None]:
        """Show a stage while it runs, then its seconds."""
        task = self._bars.add_task(f"{cell}  {stage}")
        began = time.monotonic()
        try:
            yield
        except BaseException:
            self._line("failed", cell, stage, time.monotonic() - began)
            raise
        else:
            self._line("done", cell, stage, time.monotonic() - began)
        finally:
            self._bars.remove_task(task)

    def skipped(self, cell: str) -> None:
        """A cell that an earlier run finished."""
        self.console.print(f"{self._clock()}  {'kept':<7}{cell}", soft_wrap=True)

    def finished(self, cell: str, record: dict[str, Any]) -> None:
        """A finished cell; prints its losses from the record."""
        if record.get("validation_loss") is not None:
            text = f"validation {record['validation_loss']:.4f}  test {record['test_loss']:.4f}"
            self.console.print(f"{self._clock()}  {'loss':<7}{cell}  {text}", soft_wrap=True)

    def failed(self, cell: str, attempt: int, *, again: bool) -> None:
        """A failed attempt, and whether the cell is retried."""
        what = "is run again" if again else "is given up"
        self.console.print(f"{self._clock()}  {'failed':<7}{cell}  attempt {attempt}, {what}", soft_wrap=True)

    def stopped(self, cell: str) -> None:
        """A cell whose attempt ended early but made progress."""
        self.console.print(f"{self._clock()}  {'stopped':<7}{cell}  resumes from its last save", soft_wrap=True)

    def left(self, cell: str, stage: str) -> None:
        """A stage on which processes of an earlier runner still work."""
        text = f"{stage}  waits for processes of an earlier runner to end"
        self.console.print(f"{self._clock()}  {'held':<7}{cell}  {text}", soft_wrap=True)

    def queued(self, cell: str, job: str, *, adopted: bool = False) -> None:
        """A cell in a cluster's queue; ``adopted`` if an earlier runner put it there."""
        what = "found in the queue" if adopted else "submitted"
        self.console.print(f"{self._clock()}  {'queue':<7}{cell}  job {job} {what}", soft_wrap=True)

    def refused(self, cell: str, why: str) -> None:
        """A cell that the cluster's queue did not accept."""
        self.console.print(f"{self._clock()}  {'queue':<7}{cell}  not taken, tried again later: {why}", soft_wrap=True)

    def _line(self, what: str, cell: str, stage: str, seconds: float) -> None:
        self.console.print(f"{self._clock()}  {what:<7}{cell}  {stage}  {seconds:.1f} s", soft_wrap=True)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"{minutes:3d}:{seconds:02d}"
