"""Write a long file past the page cache.

Through the cache, every byte is copied into a page that must be found first (slow where a hypervisor hands out
memory on demand), the disk starts late, and the closing fsync waits for gigabytes. ``DirectFile`` gathers what it
is given in one aligned buffer and hands that to the disk with O_DIRECT: half the processor time, no memory, nothing
left to sync. A file system that has no O_DIRECT gets the same writes without it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy

BUFFER_BYTES = 8 << 20  # a multiple of every device's block


class DirectFile:
    """A new file that grows at its end; nothing may be read from it before ``close``. Not for several threads."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._handle = os.open(path, flags, 0o644)
        self._buffer = numpy.frombuffer(mmap.mmap(-1, BUFFER_BYTES), numpy.uint8)  # aligned to a page
        self._filled = 0
        self._set_direct(True)

    def write(self, segment: bytes | memoryview) -> None:
        """Append ``segment``; it may change afterwards."""
        data = numpy.frombuffer(segment, numpy.uint8)  # copies without holding the interpreter lock
        while len(data):
            part = min(len(data), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + part] = data[:part]
            self._filled += part
            data = data[part:]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def close(self) -> None:
        """Write the rest and close. Raises OSError where that fails; the file is closed all the same."""
        try:
            self._set_direct(False)  # the rest is no whole number of blocks
            self._flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without the rest."""
        os.close(self._handle)

    def _flush(self) -> None:
        left = self._buffer[: self._filled]
        while len(left):
            try:
                left = left[os.write(self._handle, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)  # this file system found out late
        self._filled = 0

    def _set_direct(self, direct: bool) -> None:
        self._direct = False
        if hasattr(os, "O_DIRECT"):
            flags = fcntl.fcntl(self._handle, fcntl.F_GETFL) & ~os.O_DIRECT
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
                self._direct = direct
