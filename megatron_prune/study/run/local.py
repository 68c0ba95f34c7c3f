"""Cells on this machine: up to ``launch.parallel_cells`` at a time, each on its own GPUs if there are any.

Processes end with their runner. If some outlive it, the next runner waits for them before it starts their cells, so two
runs never write to one folder. Without GPUs, each process needs a core, which limits the number of cells.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_prune.engine.launch import wait_until_free
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.study.commands import Command, environment
from megatron_prune.study.execution import execute
from megatron_prune.study.jobs import Cell
from megatron_prune.study.prunings import Places
from megatron_prune.study.run.status import CellProgress
from megatron_prune.study.schema import StudyConfig


class Execute(Protocol):
    """Runs one command to completion; the return code is only used in the error message."""

    def __call__(self, command: Command, *, log: Path, env: dict[str, str]) -> int: ...


def launch_command(command: Command, *, log: Path, env: dict[str, str]) -> int:
    """Start processes on this machine (torchrun's ranks if there is a GPU)."""
    from megatron_prune.engine.launch import launch

    return launch(command.argv, nproc=command.nproc, log=log, env=env)


class Local:
    """One thread per running cell. The threads are daemons: an interrupt ends the program and its jobs."""

    orders = False

    def __init__(
        self, study: StudyConfig, places: Places, progress: CellProgress, execute_command: Execute = launch_command
    ):
        self.study, self.places, self.progress, self.execute_command = study, places, progress, execute_command
        visible = _visible() if execute_command is launch_command else []
        cores = len(os.sched_getaffinity(0))
        bound = study.launch.parallel_cells if visible else max(1, cores // study.launch.nproc)
        self.cells = min(study.launch.parallel_cells, bound)
        self.devices = _devices(study, visible)
        self.running: dict[str, threading.Thread] = {}
        self.results: queue.Queue[tuple[str, BaseException | None]] = queue.Queue()

    def check(self, cell: Cell) -> None:
        """Nothing to check: an earlier runner's cells have a log, which ``begun.refuse_other_commands`` looks at."""

    def room(self) -> bool:
        return len(self.running) < self.cells

    def begin(self, cell: Cell, after: Sequence[str]) -> bool:
        self.running[cell.id] = threading.Thread(target=self._run, args=(cell,), daemon=True)
        self.running[cell.id].start()
        return True

    def ended(self) -> Mapping[str, MegatronPruneError | None]:
        name, error = self.results.get()
        self.running.pop(name).join()
        if error is not None and not isinstance(error, MegatronPruneError):
            for thread in self.running.values():
                thread.join()
            raise error
        return {name: error}

    def _run(self, cell: Cell) -> None:
        devices = self.devices.get()
        error: BaseException | None = None
        try:
            self._stages(cell, devices)
        except BaseException as found:
            error = found
        self.devices.put(devices)
        self.results.put((cell.id, error))

    def _stages(self, cell: Cell, devices: str | None) -> None:
        threads = self.study.launch.threads_per_process(1 if cell.alone else self.cells)
        env = environment(self.study, threads)
        if devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = devices
        for stage in cell.stages:
            if stage.done():
                continue
            with self.progress.stage(cell.id, stage.command.stage):
                command = functools.partial(self._command, stage.command, env)
                directory, name = self.places.cell(cell.id), stage.command.stage
                tell = functools.partial(self.progress.left, cell.id, name)
                if wait_until_free(directory / f"{name}.log", tell) and stage.done():
                    continue
                execute(directory, name, stage.done, command)

    def _command(self, command: Command, env: dict[str, str], log: Path) -> int:
        return self.execute_command(command, log=log, env=env)


def _visible() -> list[str]:
    """The GPUs available to this process, as named in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device for device in given.split(",") if device]
    import torch

    return [str(device) for device in range(torch.cuda.device_count())]


def _devices(study: StudyConfig, visible: Sequence[str]) -> queue.Queue[str | None]:
    """Disjoint sets of GPUs for concurrent cells; None for each if there are no GPUs."""
    launch = study.launch
    needed = launch.parallel_cells * launch.nproc
    if visible and needed > len(visible):
        raise UsageError(
            "launch.parallel_cells", got=f"{launch.parallel_cells} cells of {launch.nproc}",
            expected=f"at most {len(visible)} processes, one per GPU",
        )  # fmt: skip
    free: queue.Queue[str | None] = queue.Queue()
    for slot in range(launch.parallel_cells):
        names = visible[slot * launch.nproc : (slot + 1) * launch.nproc]
        free.put(",".join(names) if names else None)
    return free
