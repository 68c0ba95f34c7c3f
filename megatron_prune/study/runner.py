"""Runs a study's cells on this machine: what is finished is skipped, what was killed goes on.

Phases in order: the parent; calibrations; prunings; the training runs. Inside a phase up to
``launch.parallel_cells`` cells run at a time. A stage is run when its artifact does not already say
that it is done, and has failed when the artifact still does not say so afterwards. A finished
cell gets its line in the ledger. Only one runner works on a study: it holds ``study.lock``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_prune import artifacts
from megatron_prune.errors import MegatronPruneError, RunError, UsageError
from megatron_prune.study import config, grid, preflight, stages
from megatron_prune.study.commands import Command, Places
from megatron_prune.study.ledger import Ledger
from megatron_prune.study.progress import Progress
from megatron_prune.study.stages import Cell, Stage

TAIL_LINES = 15


class CellsFailed(RunError):
    """Some cells failed; all others that could run have finished."""


class Launcher(Protocol):
    """Runs one command to its end; the return code is only for the error message."""

    def __call__(self, command: Command, *, log: Path, env: dict[str, str]) -> int: ...


def launch_local(command: Command, *, log: Path, env: dict[str, str]) -> int:
    """Processes on this machine (torchrun's ranks where there is a GPU)."""
    if command.stage == "import":
        from megatron_prune.checkpoint.huggingface import import_hf

        arguments = dict(zip(command.argv[1::2], command.argv[2::2], strict=True))
        import_hf(arguments["--hf"], arguments["--save"])
        return 0
    from megatron_prune.engine.launch import launch

    return launch(command.argv, nproc=command.nproc, log=log, env=env)


def run(study: config.Study, places: Places, *, launcher: Launcher = launch_local, progress: Progress) -> None:
    """Run everything that is not finished yet. RunError names cells that failed, when the others are done."""
    with _locked(places.root):
        outlook = preflight.check(study, places)
        artifacts.write_json(places.root / "study.json", config.resolved(study))
        runner = _Runner(study, places, launcher, progress)
        runner.phase([stages.parent(study, places, outlook)], parallel=1)
        if outlook.source is None:  # an import: only now is there a shape to check targets against
            outlook = preflight.check(study, places)
        artifacts.write_json(places.root / "outlook.json", outlook.to_json(study))
        parallel = study.launch.parallel_cells
        runner.phase(stages.calibrations(study, places, outlook), parallel=1)
        runner.phase(stages.pruning_cells(study, places, outlook), parallel)
        if len(outlook.targets) < len(grid.prunings(study)):  # a search: only now is its shape known
            outlook = preflight.check(study, places)
            artifacts.write_json(places.root / "outlook.json", outlook.to_json(study))
        runner.phase(stages.training_cells(study, places, outlook.grid(study)), parallel)


class _Runner:
    def __init__(self, study: config.Study, places: Places, launcher: Launcher, progress: Progress):
        self.study, self.places, self.launcher, self.progress = study, places, launcher, progress
        self.ledger = Ledger(places.root / "ledger.jsonl")
        self.finished = self.ledger.read()

    def phase(self, cells: Sequence[Cell], parallel: int) -> None:
        """Run cells that do not depend on each other; RunError at the end when some failed."""
        for cell in cells:
            self._keep_commands(cell)
        open_cells = [cell for cell in cells if cell.id not in self.finished]
        for cell in cells:
            if cell.id in self.finished:
                self.progress.skipped(cell.id)
        threads = self.study.launch.threads_per_process(parallel)
        failures = _in_threads(lambda cell: self._run(cell, threads), open_cells, parallel)
        if failures:
            raise CellsFailed("\n".join(str(failure) for failure in failures))

    def _keep_commands(self, cell: Cell) -> None:
        """Write cell.json; refuse a cell that was run with other commands."""
        path = self.places.cell(cell.id) / "cell.json"
        content = {
            "cell": cell.id,
            "stages": [
                {
                    "stage": stage.command.stage,
                    "nproc": stage.command.nproc,
                    "argv": list(stage.command.argv),
                }
                for stage in cell.stages
            ],
        }
        if path.is_file():
            earlier = artifacts.read_json(path)
            if earlier != content:
                raise UsageError(
                    f"study {self.study.name}",
                    given=f"{cell.id} with {_first_difference(earlier, content)}",
                    allowed="its earlier commands",
                    why=f"rename the study, or remove {path.parent} and its line",
                )
            return
        artifacts.write_json(path, content)

    def _run(self, cell: Cell, threads: int) -> None:
        directory = self.places.cell(cell.id)
        timings = directory / "stages.json"
        seconds: dict[str, float] = artifacts.read_json(timings) if timings.is_file() else {}
        for stage in cell.stages:
            name = stage.command.stage
            if stage.done():
                continue
            with self.progress.stage(cell.id, name):
                began = time.monotonic()
                self._execute(cell, stage, directory / f"{name}.log", threads)
                # Attempts that were killed are not in the sum: nobody was there to time them.
                seconds[name] = round(time.monotonic() - began, 2)
            artifacts.write_json(timings, seconds)
        record = cell.record(seconds)
        with _LEDGER:
            self.ledger.append(record)
            self.finished[cell.id] = record
        self.progress.finished(cell.id, record)

    def _execute(self, cell: Cell, stage: Stage, log: Path, threads: int) -> None:
        code = self.launcher(stage.command, log=log, env={"OMP_NUM_THREADS": str(threads)})
        if not stage.done():
            raise RunError(
                f"{cell.id}: {stage.command.stage} ended (exit code {code}) without saying that it succeeded. "
                f"The end of {log}:\n{_tail(log)}"
            )


_LEDGER = threading.Lock()


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the study's lock; it goes with the process, however that ends."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "study.lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise RunError(f"another runner (process {handle.read().strip()}) is at work on {root}") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _in_threads(work: Callable[[Cell], None], cells: Sequence[Cell], parallel: int) -> list[MegatronPruneError]:
    """Do ``work`` for all cells, ``parallel`` at a time; refusals are collected, anything else is raised.

    Daemon threads, so that an interrupt ends the program, and with it the jobs that it started.
    """
    queue = list(cells)
    failures: list[MegatronPruneError] = []
    bugs: list[BaseException] = []
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                if not queue or bugs:
                    return
                cell = queue.pop(0)
            try:
                work(cell)
            except MegatronPruneError as error:
                failures.append(error)
            except BaseException as error:
                bugs.append(error)

    workers = [threading.Thread(target=worker, daemon=True) for _ in range(min(parallel, len(cells)))]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    if bugs:
        raise bugs[0]
    return failures


def _first_difference(earlier: Any, now: Any) -> str:
    """The first words in which two cell.json differ."""
    for old, new in zip(earlier["stages"], now["stages"], strict=False):
        if old == new:
            continue
        for position, (a, b) in enumerate(zip(old["argv"], new["argv"], strict=False)):
            if a != b:
                flag = new["argv"][position - 1] if not b.startswith("--") else ""
                return f"{flag} {b} in place of {a}".strip()
        return f"another command line for {new['stage']}"
    return "other stages"


def _tail(log: Path) -> str:
    if not log.is_file():
        return "(there is no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
