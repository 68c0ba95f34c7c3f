"""Run a function in a forked process whose time and memory are limited: a hang or a bomb is a failure, not a wait."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import MegatronPruneError

CPU_SECONDS = 2.0
MEMORY_BYTES = 300 << 20
HANG_SECONDS = 120  # without using the processor, such as waiting for a pipe
ADDRESSES = 4 << 30  # more than MEMORY_BYTES: allocators reserve addresses that they never use


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (-N: signal N), output, processor seconds, and memory above its start."""

    code: int
    output: str
    seconds: float
    memory: int


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _limit() -> None:
    """Limits of the calling process: what it has now, and CPU_SECONDS and ADDRESSES more."""
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(command: Callable[[], int]) -> Ended:
    """Run ``command() -> exit code`` in a fork."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            os.write(write, struct.pack("<Q", resident()))  # less than the parent's: mapped files are not copied
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                _limit()
                resource.setrlimit(resource.RLIMIT_CPU, (20, 30))
                signal.alarm(HANG_SECONDS)
                logging.root.handlers.clear()  # Megatron, which this process may have imported, sets one up
                code = command()
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        (began,) = struct.unpack("<Q", os.read(read, 8))
        os.close(read)
        os.close(write)
        output.seek(0)
        said = output.read().decode(errors="backslashreplace")
        seconds = usage.ru_utime + usage.ru_stime
        return Ended(os.waitstatus_to_exitcode(status), said, seconds, max(0, (usage.ru_maxrss << 10) - began))


READ, REFUSED, BUG = b"a", b"r", b"b"


class Reader:
    """A reader in a process of its own, which reads one input after another: ``reader(payload)``.

    ``read`` returns whether the input was accepted. AssertionError for any exception that is no refusal, for a refusal
    that is no short line, and for a process that used up its time or memory.
    """

    def __init__(self, reader: Callable[[bytes], Any], file: str = "") -> None:
        self._reader, self.file = reader, file
        self._child = 0

    def read(self, payload: bytes) -> bool:
        if not self._child:
            self._start()
        os.write(self._to, struct.pack("<Q", len(payload)))
        sent = 0
        while sent < len(payload):
            sent += os.write(self._to, payload[sent : sent + (1 << 16)])
        answer = os.read(self._from, 1)
        if not answer:
            _, status = os.waitpid(self._child, 0)
            self._child = 0
            raise AssertionError(f"the reader was ended by {os.waitstatus_to_exitcode(status)}: too slow, or crashed")
        (length,) = struct.unpack("<Q", _exactly(self._from, 8))
        text = _exactly(self._from, length).decode()
        assert answer != BUG, text
        if answer == REFUSED:
            assert text.strip() and len(text) < 2000, text
        return answer == READ

    def close(self) -> None:
        if self._child:
            os.close(self._to)
            os.waitpid(self._child, 0)
            os.close(self._from)
            self._child = 0

    def _start(self) -> None:
        (child_from, self._to), (self._from, child_to) = os.pipe(), os.pipe()
        self._child = os.fork()
        if self._child:
            os.close(child_from)
            os.close(child_to)
            return
        try:
            faulthandler.disable()
            os.close(self._to)
            os.close(self._from)
            _limit()
            while True:
                (length,) = struct.unpack("<Q", _exactly(child_from, 8))
                payload = _exactly(child_from, length)
                signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)  # its signal ends the process
                kind, text = _answer(self._reader, payload)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                os.write(child_to, kind + struct.pack("<Q", len(text)) + text)
        finally:
            os._exit(0)


def _answer(reader: Callable[[bytes], Any], payload: bytes) -> tuple[bytes, bytes]:
    try:
        reader(payload)
    except MegatronPruneError as error:
        return REFUSED, str(error).encode(errors="backslashreplace")[:4000]
    except BaseException:
        return BUG, traceback.format_exc().encode(errors="backslashreplace")[-4000:]
    return READ, b""


def _exactly(descriptor: int, length: int) -> bytes:
    content = b""
    while len(content) < length:
        piece = os.read(descriptor, length - len(content))
        if not piece:
            os._exit(0)
        content += piece
    return content
