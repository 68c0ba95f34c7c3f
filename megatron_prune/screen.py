"""What a verb shows to a person, and where everything else goes.

A person wants to know what a verb read, how far it is, what it found and where it wrote: ``say``, ``console`` and
``Bar`` show that, on rank 0. Megatron prints its arguments, and libraries warn of packages that are missing; from
``divert`` on, which the engine calls before it imports Megatron, that goes to a log file whose name is said. The file
descriptors themselves are diverted, so that it holds for C code and for processes that are started later.

Only inside ``quiet``, which is around a verb of the command line, is anything diverted. With ``--verbose``, or with
``MEGATRON_PRUNE_VERBOSE=1`` in the environment (as jobs have whose output is a log file already: those of a study),
everything stays on the screen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

VERBOSE = "--verbose"
VERBOSE_VARIABLE = "MEGATRON_PRUNE_VERBOSE"
LOGS_VARIABLE = "MEGATRON_PRUNE_LOGS"  # a folder for log files
SECONDS_BETWEEN_LINES = 5.0  # of progress where there is no terminal
SHARE_BETWEEN_LINES = 0.1
MOST_SECONDS_BETWEEN_LINES = 300.0


@dataclass
class _Diverted:
    """The screen while standard output and error go to ``log``."""

    log: Path
    out: IO[str]
    errors: IO[str]
    named: bool = False


_verb: str | None = None  # inside `quiet`
_diverted: _Diverted | None = None
_bar: Any = None  # tqdm's, while one is on the screen


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def say(text: str, *, everywhere: bool = False) -> None:
    """Print a line on the screen, on rank 0, or on whichever rank this is."""
    if rank() == 0 or everywhere:
        if _bar is not None:
            _bar.write(text, file=_out())
        else:
            print(text, file=_out(), flush=True)


def console(**settings: Any) -> Any:
    """rich's console on the screen."""
    from rich.console import Console

    return Console(file=_out(), **settings)


def is_diverted() -> bool:
    return _diverted is not None


def _out() -> IO[str]:
    """The screen's standard output; with the first line on it, rank 0 says where everything else is."""
    if _diverted is None:
        return sys.stdout
    if rank() == 0 and not _diverted.named:
        _diverted.named = True
        print(f"log: {_diverted.log} ({VERBOSE} shows it here)", file=_diverted.out, flush=True)
    return _diverted.out


def _errors() -> IO[str]:
    return sys.stderr if _diverted is None else _diverted.errors


# --------------------------------------------------------------------------- everything else


@contextlib.contextmanager
def quiet(verb: str, words: list[str]) -> Iterator[list[str]]:
    """Around a verb: the ``words`` of its command line without ``--verbose``. The screen is back when it ends.

    An error of ours is for the caller to print. For a bug, every rank that has it says where its log is, and the
    traceback follows.
    """
    global _verb
    rest = [word for word in words if word != VERBOSE]
    if len(rest) < len(words) or os.environ.get(VERBOSE_VARIABLE, "0") not in ("", "0"):
        yield rest
        return
    _complain(False)
    if {"-h", "--help", "--help-megatron"} & set(rest):
        yield rest
        return
    _verb = verb
    try:
        yield rest
    except SystemExit as leaving:  # a library's: what it had to say is in the log
        if leaving.code and (log := restore()) is not None:
            with contextlib.suppress(OSError):
                lines = log.read_text(errors="replace").splitlines()
                print(f"the end of {log}:", *lines[-1:], sep="\n", file=sys.stderr, flush=True)
        raise
    except BaseException as error:
        from megatron_prune.errors import MegatronPruneError

        if (log := restore()) is not None and not isinstance(error, MegatronPruneError):
            print(f"rank {rank()} failed; the rest of its output is in {log}", file=sys.stderr, flush=True)
        raise
    finally:
        restore()
        _verb = None


def divert() -> None:
    """Send what anybody but this module prints to a file of this process. No effect outside ``quiet``, and twice."""
    global _diverted
    if _verb is None or _diverted is not None:
        return
    try:
        log = _new_log(_verb)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return  # a machine without room for a log: the screen has all of it
    _flush()
    kept = [os.fdopen(os.dup(one), "w", buffering=1, errors="replace") for one in (1, 2)]
    for one in (1, 2):
        os.dup2(target, one)
    os.close(target)
    _complain(True)
    _buffer_lines(True)  # or a process that is killed would leave nothing in its log
    _diverted = _Diverted(log, kept[0], kept[1])


def restore() -> Path | None:
    """Give the screen back; the log, if there was one."""
    global _diverted
    if _diverted is None:
        return None
    _flush()
    held, _diverted = _diverted, None
    for one, stream in ((1, held.out), (2, held.errors)):
        with contextlib.suppress(OSError):
            stream.flush()
        os.dup2(stream.fileno(), one)
        with contextlib.suppress(OSError):
            stream.close()
    _buffer_lines(sys.stdout.isatty())
    return held.log


def leave() -> None:
    """In a child process whose output its parent has diverted itself: say everything there."""
    global _verb, _diverted
    _verb = _diverted = None


def _complain(on: bool) -> None:
    """What Megatron and torch say of packages and of a GPU that are missing: in a log, but not on the screen."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.NOTSET if on else logging.ERROR)
    warnings.filterwarnings("default" if on else "ignore", category=UserWarning, module=r"megatron\.")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()


def _buffer_lines(on: bool) -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=on)


def _new_log(verb: str) -> Path:
    """One file per process; those of a job's ranks on a node share the number of the process that started them."""
    job = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
    return _folder() / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{job}-rank{rank()}.log"


def _folder() -> Path:
    """Where logs go: as the environment says; in a Slurm job the working directory, which other nodes see too."""
    named = os.environ.get(LOGS_VARIABLE) or ("megatron-prune-logs" if "SLURM_JOB_ID" in os.environ else None)
    if named is not None:
        folder = Path(named).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"megatron-prune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # made by somebody else, in a directory that all may write to
        return Path(tempfile.mkdtemp(prefix="megatron-prune-"))
    return folder


# --------------------------------------------------------------------------- progress


class Bar:
    """How far a piece of work is, with its rate and the time left: a bar on a terminal, now and then a line elsewhere.

        with Bar(len(windows), "evaluating", "window") as bar:
            for window in windows:
                …
                bar.advance()

    On rank 0 alone, unless ``shown`` says otherwise. ``unit`` "B" counts bytes. A ``total`` of None is not known, and
    neither is the time left.
    """

    def __init__(self, total: int | None, what: str, unit: str, *, shown: bool | None = None):
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self._shown = (rank() == 0 if shown is None else shown) and total != 0
        self._everywhere = bool(shown)
        self._began = self._said = time.monotonic()
        self._share_said = 0.0
        self._tqdm: Any = None

    def __enter__(self) -> Self:
        global _bar
        self._began = self._said = time.monotonic()
        if self._shown and _errors().isatty():
            from tqdm import tqdm

            scaled = {"unit": "B", "unit_scale": True} if self.unit == "B" else {"unit": f" {self.unit}"}
            self._tqdm = _bar = tqdm(
                total=self.total, desc=self.what, file=_errors(), leave=False, dynamic_ncols=True, **scaled
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _bar
        if self._tqdm is not None:
            self._tqdm.close()
            _bar = None

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more are done. A ``note`` is shown with the bar, and always has a line where there is none."""
        self.reach(self.done + count, note)

    def reach(self, done: int, note: str = "") -> None:
        """``done`` are done by now."""
        more, self.done = done - self.done, done
        if self._tqdm is not None:
            self._tqdm.update(more)
            if note:
                self._tqdm.set_postfix_str(note)
        elif self._shown and (note or self._is_due()):
            say(self._line(note), everywhere=self._everywhere)

    def over[T](self, items: Iterable[T], size: int | None = 1) -> Iterator[T]:
        """``items``, each counted as ``size`` when the next is asked for; None: tensors, by their bytes."""
        for item in items:
            yield item
            self.advance(item.nbytes if size is None else size)  # type: ignore[attr-defined]

    def _is_due(self) -> bool:
        now, share = time.monotonic(), 1.0 if self.total is None else self.done / self.total
        if self.done == self.total or now - self._said < SECONDS_BETWEEN_LINES:
            return False
        if not SHARE_BETWEEN_LINES <= share - self._share_said and now - self._said < MOST_SECONDS_BETWEEN_LINES:
            return False
        self._said, self._share_said = now, share
        return True

    def _line(self, note: str) -> str:
        seconds = time.monotonic() - self._began
        if self.unit == "B":
            counted = f"{self.done / 1e9:.2f}" + (f" of {self.total / 1e9:.2f}" if self.total else "") + " GB"
            rate = f"{self.done / 1e6 / max(seconds, 1e-9):.3g} MB/s"
        else:
            counted = f"{self.unit} {self.done:,}" + (f" of {self.total:,}" if self.total else "")
            rate = f"{self.done / max(seconds, 1e-9):.3g}/s"
        words = [f"{self.what}: {counted}"] + ([note] if note else [])
        if seconds >= SECONDS_BETWEEN_LINES and self.done != self.total:
            words.append(rate)
            if self.total and self.done:
                words.append(f"about {clock(seconds / self.done * (self.total - self.done))} left")
        return ", ".join(words)


def clock(seconds: float) -> str:
    """``75`` → ``1:15``, ``3675`` → ``1:01:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress[T](items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """``items``, of which there are ``total``, with a ``Bar``."""
    with Bar(total, what, unit) as bar:
        yield from bar.over(items)
