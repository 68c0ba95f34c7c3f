"""What a running study tells the terminal: a line a finished stage, and what is running now."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn


class Progress:
    """Prints through rich; where there is no terminal only the lines of finished stages appear."""

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

    def __enter__(self) -> Progress:
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
        """A cell with its record; its losses are worth a line."""
        if record.get("validation_loss") is not None:
            text = f"validation {record['validation_loss']:.4f}  test {record['test_loss']:.4f}"
            self.console.print(f"{self._clock()}  {'loss':<7}{cell}  {text}", soft_wrap=True)

    def failed(self, cell: str, attempt: int, *, again: bool) -> None:
        """A cell that failed, and whether it is begun again."""
        what = "is run again" if again else "is given up"
        self.console.print(f"{self._clock()}  {'failed':<7}{cell}  attempt {attempt}, {what}", soft_wrap=True)

    def stopped(self, cell: str) -> None:
        """A cell whose attempt ended before it was done, but got further."""
        self.console.print(f"{self._clock()}  {'stopped':<7}{cell}  goes on from what it saved", soft_wrap=True)

    def left(self, cell: str, stage: str) -> None:
        """A stage that an earlier runner's processes are still at."""
        text = f"{stage}  waits for processes of an earlier runner to end"
        self.console.print(f"{self._clock()}  {'held':<7}{cell}  {text}", soft_wrap=True)

    def queued(self, cell: str, job: str, *, adopted: bool = False) -> None:
        """A cell in a cluster's queue; ``adopted`` if an earlier runner put it there."""
        what = "found in the queue" if adopted else "submitted"
        self.console.print(f"{self._clock()}  {'queue':<7}{cell}  job {job} {what}", soft_wrap=True)

    def refused(self, cell: str, why: str) -> None:
        """A cell that a cluster's queue did not take."""
        self.console.print(f"{self._clock()}  {'queue':<7}{cell}  not taken, tried again later: {why}", soft_wrap=True)

    def _line(self, what: str, cell: str, stage: str, seconds: float) -> None:
        self.console.print(f"{self._clock()}  {what:<7}{cell}  {stage}  {seconds:.1f} s", soft_wrap=True)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        return f"{minutes:3d}:{seconds:02d}"
