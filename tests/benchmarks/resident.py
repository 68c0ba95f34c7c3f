"""Time and peak memory of a command; peak memory of a call in this process."""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def timed(words: list[str], *, every: float = 0.1) -> tuple[float, float]:
    """Run a command; its seconds, and the peak of RssAnon + RssShmem of it and its descendants, in bytes.

    Memory is sampled every ``every`` seconds.
    """
    started, peak = time.perf_counter(), 0.0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(every)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} left with {process.returncode}")
    return seconds, peak


def resident(pid: int) -> float:
    """RssAnon + RssShmem of a process and its descendants, in bytes."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]  # fmt: skip
    except OSError:
        return 0.0
    lines = (line.split() for line in status.splitlines() if line.startswith(("RssAnon:", "RssShmem:")))
    return sum(1024.0 * int(words[1]) for words in lines) + sum(map(resident, children))


def high_water[T](call: Callable[[], T]) -> tuple[T, float]:
    """The result of ``call``, and by how many bytes this process grew at most during it, as the kernel counts."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _field("VmRSS")
    found = call()
    return found, _field("VmHWM") - before


def give_back_at_once() -> None:
    """Let this process map every allocation of 64 KiB and more separately, so that freed memory is returned."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-4, 1 << 30)  # M_MMAP_MAX


def _field(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024.0 * int(line.split()[1])
    raise ValueError(name)
