"""What a verb shows to a person, and where everything else goes.

A person wants to know what a verb read, how far it is, what it found and where it wrote. Megatron prints a dump of its
arguments, and libraries print warnings about packages that are missing. ``quiet`` sends all of that to a log file. It
moves the file descriptors themselves, so that it holds for C code too. ``say`` and ``progress`` still reach the screen.
``--verbose`` leaves everything on the screen.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

_screen: IO[str] | None = None  # the real standard output while it is diverted
_errors: IO[str] | None = None
_log: Path | None = None


def say(text: str) -> None:
    """Print a line on the screen, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=_screen or sys.stdout, flush=True)


def log_file() -> Path | None:
    """Where the rest goes; None while it is not diverted."""
    return _log


@contextlib.contextmanager
def quiet(verb: str, *, verbose: bool) -> Iterator[None]:
    """Divert what anybody but ``say`` and ``progress`` prints to a file of this process; restore it at the end.

    An exception that leaves the block is for the caller to print: by then the screen is back.
    """
    global _screen, _errors, _log
    if verbose or _screen is not None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _log = _new_log(verb)
    kept = [os.dup(1), os.dup(2)]
    _screen, _errors = (os.fdopen(os.dup(one), "w", buffering=1, errors="replace") for one in kept)
    with open(_log, "ab", buffering=0) as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        for descriptor, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        _screen.close()
        _errors.close()
        _screen = _errors = None


def _new_log(verb: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"megatron-prune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    rank = os.environ.get("RANK", "0")
    return folder / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-rank{rank}.log"


def progress[T](items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """``items``, with a bar that has a rate and the time left; on rank 0, and on a terminal alone.

    Elsewhere a line now and then: bars in a file help nobody.
    """
    stream = _errors or sys.stderr
    if os.environ.get("RANK", "0") != "0" or total < 1:
        yield from items
    elif stream.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, file=stream, leave=False, dynamic_ncols=True)
    else:
        yield from _lines(items, total, what)


def _lines[T](items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """At a quarter, a half and three quarters, and only of work that has lasted five seconds by then."""
    began, marks = time.monotonic(), [total // 4, total // 2, 3 * total // 4]
    for done, item in enumerate(items, start=1):
        yield item
        seconds = time.monotonic() - began
        if done in marks and done < total and seconds > 5:
            left = seconds / done * (total - done)
            say(f"{what}: {done} of {total}, about {left:.0f} s left")
