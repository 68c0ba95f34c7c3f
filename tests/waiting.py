"""Waiting for what other processes do, on a machine however busy.

A fixed wait that is long enough on one machine is too short on a busier one. So a wait fails only when nothing
changes any more, or after an hour.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

QUIET = 300.0  # seconds without any change
LONGEST = 3600.0
GENEROUS = 1200.0  # for the whole of a job that a test only waits for


def wait_for_progress(
    condition: Callable[[], object],
    what: str,
    progress: Callable[[], object] = lambda: None,
    quiet: float = QUIET,
    longest: float = LONGEST,
) -> None:
    """Return once ``condition`` holds. Fail when ``progress``, which may return anything that is compared, has been
    the same for ``quiet`` seconds, or after ``longest``."""
    began = moved = looked = time.monotonic()
    last = progress()
    while not condition():
        time.sleep(0.005)
        now = time.monotonic()
        if now - looked < 1:
            continue
        looked, found = now, progress()
        if found != last:
            last, moved = found, now
        assert now - moved < quiet, f"{what}: nothing has moved for {quiet:.0f} s"
        assert now - began < longest, f"{what}: not within {longest:.0f} s"


def alive(pid: int | str) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def content(folder: Path) -> frozenset[tuple[str, int]]:
    """Names and sizes of everything in a folder, which change while a job works there."""
    found = set()
    for at, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(at, name)
            try:
                found.add((path, os.stat(path).st_size))
            except FileNotFoundError:
                continue
    return frozenset(found)
