"""A verb's output on the screen, and the log file for everything else.

``say``, ``console`` and ``Bar`` show on rank 0 what a verb read, its progress, what it found and where it wrote.
Megatron prints its arguments, and libraries warn about missing packages. The engine calls ``divert`` before it imports
Megatron; from then on that output goes to a log file whose name is printed. The file descriptors themselves are
redirected, which covers C code and child processes.

Output is diverted only inside ``quiet``, which wraps a verb of the command line. With ``--verbose`` or
``MEGATRON_PRUNE_VERBOSE=1`` (set for a study's jobs, whose output is a log file already), everything stays on the
screen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

VERBOSE = "--verbose"
VERBOSE_VARIABLE = "MEGATRON_PRUNE_VERBOSE"
LOGS_VARIABLE = "MEGATRON_PRUNE_LOGS"  # a folder for log files
SECONDS_BETWEEN_LINES = 5.0  # progress without a terminal
SHARE_BETWEEN_LINES = 0.1
MOST_SECONDS_BETWEEN_LINES = 300.0


@dataclass
class _Diverted:
    """The screen's descriptors while standard output and error go to ``log``."""

    log: Path
    out: IO[str]
    errors: IO[str]
    named: bool = False


# Control characters, marks that change the direction of text, line ends of other scripts, and halves of characters.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")


def printable(text: str, *, lines: bool = True) -> str:
    """``text`` with its control characters escaped; a name can otherwise move the cursor, or hide what follows it.

    Without ``lines``, line breaks are escaped too."""
    text = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if lines else text.replace("\n", "\\n")


class Printable:
    """A text stream that escapes control characters, except for the colours of a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if _CONTROLS.search(text):
            parts = _STYLE.split(text) if self._stream.isatty() else [text]
            text = "".join(part if number % 2 else printable(part) for number, part in enumerate(parts))
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaping() -> Iterator[None]:
    """Escape control characters in all that Python prints on standard output in the block, in warnings, and in what
    libraries log. Standard error itself stays as it is: their progress bars move the cursor."""
    kept = sys.stdout, warnings.formatwarning, logging.getLogRecordFactory()

    def escaped(*what: Any, **named: Any) -> str:
        return printable(kept[1](*what, **named))

    sys.stdout, warnings.formatwarning = Printable(kept[0]), escaped
    logging.setLogRecordFactory(_PrintableRecord)
    try:
        yield
    finally:
        sys.stdout, warnings.formatwarning, factory = kept
        logging.setLogRecordFactory(factory)


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody handles, escaped: its message may hold a name from a file."""
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


_verb: str | None = None  # inside `quiet`
_diverted: _Diverted | None = None
_bar: Any = None  # tqdm's bar while it is shown


def rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0  # engine/network.py refuses others


def say(text: str, *, everywhere: bool = False) -> None:
    """Print a line on the screen, on rank 0 or (``everywhere``) on any rank."""
    if rank() == 0 or everywhere:
        if _bar is not None:
            _bar.write(text, file=_out())
        else:
            print(text, file=_out(), flush=True)


def console(**settings: Any) -> Any:
    """A rich console on the screen."""
    from rich.console import Console

    return Console(file=_out(), **settings)


def is_diverted() -> bool:
    return _diverted is not None


def _out() -> IO[str]:
    """The screen's standard output. Before the first line, rank 0 prints the log file's name."""
    if _diverted is None:
        return sys.stdout
    if rank() == 0 and not _diverted.named:
        _diverted.named = True
        print(f"log: {_diverted.log} ({VERBOSE} shows it here)", file=_diverted.out, flush=True)
    return cast(IO[str], Printable(_diverted.out))


def _errors() -> IO[str]:
    return sys.stderr if _diverted is None else _diverted.errors


# --------------------------------------------------------------------------- diverting other output


@contextlib.contextmanager
def quiet(verb: str, words: list[str]) -> Iterator[list[str]]:
    """Wrap a verb; yields the ``words`` of its command line without ``--verbose``. The screen is restored at the end.

    The caller prints our own errors. For a bug, each affected rank prints where its log is, then the traceback.
    """
    global _verb
    rest = [word for word in words if word != VERBOSE]
    if len(rest) < len(words) or os.environ.get(VERBOSE_VARIABLE, "0") not in ("", "0"):
        yield rest
        return
    show_missing(False)
    if {"-h", "--help", "--help-megatron"} & set(rest):
        yield rest
        return
    _verb = verb
    try:
        yield rest
    except SystemExit as leaving:  # from a library, whose message is in the log
        if leaving.code and (log := restore()) is not None:
            with contextlib.suppress(OSError):
                lines = log.read_text(errors="replace").splitlines()
                print(f"the end of {log}:", *map(printable, lines[-1:]), sep="\n", file=sys.stderr, flush=True)
        raise
    except BaseException as error:
        from megatron_prune.errors import MegatronPruneError

        if (log := restore()) is not None and not isinstance(error, MegatronPruneError | KeyboardInterrupt | OSError):
            print(f"rank {rank()} failed; the rest of its output is in {log}", file=sys.stderr, flush=True)
        raise
    finally:
        restore()
        _verb = None


def divert() -> None:
    """Send all output except this module's to a log file of this process. No effect outside ``quiet`` or twice."""
    global _diverted
    if _verb is None or _diverted is not None:
        return
    try:
        log = _new_log(_verb)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError:
        return  # no space for a log: keep everything on the screen
    _flush()
    kept = [os.fdopen(os.dup(one), "w", buffering=1, errors="replace") for one in (1, 2)]
    for one in (1, 2):
        os.dup2(target, one)
    os.close(target)
    show_missing(True)
    _buffer_lines(True)  # otherwise the log of a killed process would be empty
    _diverted = _Diverted(log, kept[0], kept[1])


def restore() -> Path | None:
    """Restore the screen and return the log, if there was one."""
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
    """In a child process whose parent already diverts its output: print everything there."""
    global _verb, _diverted
    _verb = _diverted = None


def show_missing(on: bool) -> None:
    """Show warnings of Megatron and torch about missing packages and GPUs: in a log, not on the screen."""
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
    """One file per process; a job's ranks on a node share the number of their parent process."""
    job = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
    return _folder() / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{job}-rank{rank()}.log"


def _folder() -> Path:
    """The folder for logs: from the environment, or in a Slurm job the working directory, which other nodes see too."""
    named = os.environ.get(LOGS_VARIABLE) or ("megatron-prune-logs" if "SLURM_JOB_ID" in os.environ else None)
    if named is not None:
        folder = Path(named).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()) / f"megatron-prune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or stat.S_ISLNK(found.st_mode):  # another user's, in a shared directory
        return Path(tempfile.mkdtemp(prefix="megatron-prune-"))
    return folder


# --------------------------------------------------------------------------- progress


class Bar:
    """Progress with rate and time left: a bar on a terminal, otherwise a line every few seconds.

        with Bar(len(windows), "evaluating", "window") as bar:
            for window in windows:
                …
                bar.advance()

    Only on rank 0, unless ``shown`` says otherwise. ``unit`` "B" counts bytes. With ``total`` None the time left is not
    shown.
    """

    def __init__(self, total: int | None, what: str, unit: str, *, shown: bool | None = None):
        self.total, self.what, self.unit = total, printable(what, lines=False), unit
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
        """``count`` more are done. A ``note`` is shown with the bar; without a terminal it always prints a line."""
        self.reach(self.done + count, note)

    def reach(self, done: int, note: str = "") -> None:
        """``done`` are done in total."""
        more, self.done = done - self.done, done
        if self._tqdm is not None:
            self._tqdm.update(more)
            if note:
                self._tqdm.set_postfix_str(note)
        elif self._shown and (note or self._is_due()):
            say(self._line(note), everywhere=self._everywhere)

    def over[T](self, items: Iterable[T], size: int | None = 1) -> Iterator[T]:
        """Yield ``items``, each counted as ``size`` when the next is requested; None: tensors, by their bytes."""
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
    """Yield ``items`` (``total`` of them) with a ``Bar``."""
    with Bar(total, what, unit) as bar:
        yield from bar.over(items)
