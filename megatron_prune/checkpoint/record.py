"""Records of a `torch_dist` checkpoint: what ``torch.save`` writes, around the numbers instead of through them.

``torch.save`` puts an archive out in one go, on one thread, copying as it goes. ``tensor_record`` builds the
same archive (a ZIP without compression: a pickle that rebuilds the tensor, two small entries, the numbers) as
segments of which the numbers are the tensor's own memory, so that hashing and writing share the cores. The
numbers are aligned in the file. ``RecordFiles`` appends records to numbered files and hashes them on the way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import mmap
import os
import pickle
import struct
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch

FILE_BYTES = 4 << 30  # a file is full when it has grown to this
ALIGNMENT = 64
_UNDER_WAY = 3  # records that are being hashed and written
_STORAGES = {dtype: getattr(torch, name) for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
_FOLDER = "archive/"

Segment = bytes | memoryview


def tensor_record(tensor: torch.Tensor, start: int) -> list[Segment]:
    """The record of a contiguous CPU tensor (less than 2 GiB) that begins at byte ``start`` of its file."""
    segments = _Segments()
    with zipfile.ZipFile(segments, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, content in (("data.pkl", _pickled(tensor)), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(_FOLDER + name), content)
        entry = zipfile.ZipInfo(_FOLDER + "data/0")
        begin = start + segments.tell() + zipfile.sizeFileHeader + len(entry.filename) + 4  # type: ignore[attr-defined]
        padding = -begin % ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch pads
        archive.writestr(entry, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return segments.parts


def object_record(value: Any, start: int = 0) -> list[Segment]:
    """The record of anything else, from ``torch.save`` itself."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return [stream.getvalue()]


class _Segments:
    """A stream that keeps what is written to it as it is: nothing is copied."""

    def __init__(self) -> None:
        self.parts: list[Segment] = []
        self._size = 0

    def write(self, segment: Segment) -> int:
        self.parts.append(segment)
        self._size += len(segment)
        return len(segment)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass


class _Rebuilt:
    """Pickles as ``torch.save`` pickles a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        size, stride = tuple(self._tensor.shape), self._tensor.stride()
        return torch._utils._rebuild_tensor_v2, (_Storage(self._tensor), 0, size, stride, False, OrderedDict())


class _Storage:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.identity = ("storage", _STORAGES[tensor.dtype], "0", "cpu", tensor.numel())


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, _Storage) else None


def _pickled(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    _TensorPickler(stream, protocol=2).dump(_Rebuilt(tensor))
    return stream.getvalue()


class RecordFiles:
    """Files ``__0_0.distcp``, ``__0_1.distcp``, … of a directory (or with another prefix), filled one after the other.

    Hashing and writing go on in threads of their own while the caller makes the next record: what it gave must not
    change until ``close``. Not for several callers at once. ``hashes`` has the SHA-256 of every file that is closed.
    """

    def __init__(self, directory: Path, prefix: str = "__0") -> None:
        self._directory, self._prefix = directory, prefix
        self._file: DirectFile | None = None
        self._size = 0
        self._count = 0
        self._hashing = ThreadPoolExecutor(1, "checkpoint-hash")
        self._disk = ThreadPoolExecutor(1, "checkpoint-disk")
        self._under_way: deque[tuple[Future[None], ...]] = deque()
        self.hashes: dict[str, str] = {}

    def append(self, make: Callable[[Any, int], list[Segment]], value: Any) -> tuple[str, int, int]:
        """Write the record ``make(value, start)``; its file, start and length.

        The disk may be some records behind: an error in writing one is raised by a later call, or by ``close``.
        """
        if self._file is not None and self._size >= FILE_BYTES:
            self.close()
        if self._file is None:
            self._name = f"{self._prefix}_{self._count}.distcp"
            self._file = DirectFile(self._directory / self._name)
            self._size, self._digest = 0, hashlib.sha256()
            self._count += 1
        start = self._size
        segments = make(value, start)
        self._wait(_UNDER_WAY - 1)
        self._under_way.append(
            (
                self._hashing.submit(self._hash, self._digest, segments),
                self._disk.submit(self._write, self._file, segments),
            )
        )
        self._size += sum(map(len, segments))
        return self._name, start, self._size - start

    @staticmethod
    def _hash(digest: hashlib._Hash, segments: list[Segment]) -> None:
        for segment in segments:
            digest.update(segment)

    @staticmethod
    def _write(file: DirectFile, segments: list[Segment]) -> None:
        for segment in segments:
            file.write(segment)

    def _wait(self, left: int) -> None:
        """Until at most ``left`` records are under way."""
        while len(self._under_way) > left:
            for future in self._under_way.popleft():
                future.result()

    def close(self) -> None:
        """Finish the file that is being written."""
        self._wait(0)
        file, self._file = self._file, None
        if file is not None:
            file.close()
            self.hashes[self._name] = self._digest.hexdigest()

    def shutdown(self) -> None:
        """End the threads, whatever happened before; a file that was not closed stays unfinished."""
        for pool in (self._hashing, self._disk):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._file is not None:
            self._file.abandon()
            self._file = None


# Write a long file past the page cache.
#
# Through the cache, every byte is copied into a page that must be found first (slow where a hypervisor hands out
# memory on demand), the disk starts late, and the closing fsync waits for gigabytes. ``DirectFile`` gathers what it
# is given in one aligned buffer and hands that to the disk with O_DIRECT: half the processor time, no memory, nothing
# left to sync. A file system that has no O_DIRECT gets the same writes without it.


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
