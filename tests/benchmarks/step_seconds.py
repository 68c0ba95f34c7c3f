"""Processor seconds of every training step of a run, in one thread: other work on the machine hardly changes them.

A rank wraps Megatron's ``train_step`` with ``timed`` and gives its seconds to ``write``. ``begin`` and ``end`` are for
runs that go on at the same time, so that a pair is the same step of both.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prune.engine.launch import Job, start_function

WARM_UP_STEPS = 2


def timed(function: Callable[..., Any], note: Callable[[float], None]) -> Callable[..., Any]:
    """``function``; after each call ``note`` gets the seconds that it took."""

    @functools.wraps(function)
    def run(*positional: Any, **named: Any) -> Any:
        began = time.process_time()
        found = function(*positional, **named)
        note(time.process_time() - began)
        return found

    return run


def write(times: Path, *seconds: float) -> None:
    """Add the line of a step to the file that ``end`` reads."""
    with open(times, "a") as file:
        print(*seconds, file=file)


def begin(folder: Path, name: str, work: Callable[[Path], int]) -> Job:
    """Start ``work`` in a rank; it gets the path to ``write`` to."""
    run = functools.partial(work, folder / f"{name}.times")
    return start_function(run, log=folder / f"{name}.log", env={"OMP_NUM_THREADS": "1"})


def end(folder: Path, name: str, job: Job, skip: int = WARM_UP_STEPS) -> list[list[float]]:
    """Wait for a run; the lines of its steps after the first ``skip``."""
    if code := job.wait():
        raise SystemExit(f"{name} exited with code {code}:\n{(folder / f'{name}.log').read_text()[-4000:]}")
    lines = (folder / f"{name}.times").read_text().splitlines()
    return [[float(word) for word in line.split()] for line in lines][skip:]
