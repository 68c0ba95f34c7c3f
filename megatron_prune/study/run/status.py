"""How far a study is: a table of its cells, from the files alone, so that it can be asked while a runner is at work."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_prune import artifacts
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.execution import States
from megatron_prune.study.places import Places

COLUMNS = "cell state validation test seconds"


def show(name: str, places: Places, console: Console, watch: float | None = None) -> None:
    """Print the table; every ``watch`` seconds again, in place, until no runner is at work."""
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
    """The cells, finished ones first in the order in which they ended."""
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
        except OSError:  # a file system without locks, on which no runner starts
            return False
    return False


def _state(places: Places, states: States, cell: str, running: bool) -> tuple[str, str]:
    """A word for the state of an unfinished cell, and the same with what more there is to say."""
    state, done = states.read(cell), states.seconds(cell)
    stages = [stage["stage"] for stage in artifacts.read_json(places.cell(cell) / "cell.json")["stages"]]
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
    """Validation and test loss from a cell's scores, not from the ledger; nothing where it has none."""
    path = places.scores(cell)
    corpora = artifacts.read_json(path)["corpora"] if path.is_file() else {}
    return [f"{corpora[name]['loss']:.4f}" if name in corpora else "" for name in ("validation", "test")]


def _steps(places: Places, cell: str) -> str:
    """How many steps of a training run are in its table of losses."""
    path = places.losses(cell)
    return f"step {max(_lines(path) - 1, 0):,}" if path.is_file() else ""


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _joined(*words: Any) -> str:
    return ", ".join(word for word in words if word)


def _begun(places: Places, cell: str) -> bool:
    return (places.cell(cell) / "stages.json").is_file()
