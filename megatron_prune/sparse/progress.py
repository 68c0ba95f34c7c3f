"""How far a pruning is, on the first rank: a bar on a terminal, a line a block elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """``with Progress(name, total, shown) as progress: progress.block(row)``; every block is counted once."""

    def __init__(self, name: str, total: int, *, shown: bool):
        self._total, self._shown = total, shown
        self._seen: set[int] = set()
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Bar(
            TextColumn(f"{name}: blocks"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=self._console,
            disable=not shown or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, last="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def block(self, row: Mapping[str, Any], *, resumed: bool = False) -> None:
        """A block is finished; ``row`` is what the scratch folder keeps of it."""
        if not self._shown or row["layer"] in self._seen:
            return
        self._seen.add(row["layer"])
        last = f"layer {row['layer']}: " + ("kept from before" if resumed else _says(row))
        self._bar.update(self._task, completed=len(self._seen), last=last)
        if not self._console.is_terminal:
            self._console.print(f"block {len(self._seen)} of {self._total}, {last}")


def _says(row: Mapping[str, Any]) -> str:
    errors = [f"{found['matrix']} {found['error']:.4f}" for found in row["matrices"] if found["error"] is not None]
    return f"{row['seconds']:.1f} s, relative error " + ", ".join(errors)
