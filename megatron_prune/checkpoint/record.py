"""Records of a `torch_dist` checkpoint, in the format of ``torch.save`` but written without copying the tensor.

``torch.save`` writes an archive on one thread and copies the data. ``tensor_record`` builds the same archive (an
uncompressed ZIP: a pickle that rebuilds the tensor, two small entries, the data) as segments; the data segment is
the tensor's own memory, so hashing and writing run in parallel. The data are aligned in the file. ``RecordFiles``
appends records to numbered files and hashes them.
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

FILE_BYTES = 4 << 30  # size at which a new file begins
ALIGNMENT = 64
_UNDER_WAY = 3  # records being hashed and written at once
_STORAGES = {dtype: getattr(torch, name) for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
_FOLDER = "archive/"

Segment = bytes | memoryview


def tensor_record(tensor: torch.Tensor, start: int) -> list[Segment]:
    """The record of a contiguous CPU tensor (less than 2 GiB) that starts at byte ``start`` of its file."""
    segments = _Segments()
    with zipfile.ZipFile(segments, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, content in (("data.pkl", _pickled(tensor)), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(_FOLDER + name), content)
        entry = zipfile.ZipInfo(_FOLDER + "data/0")
        begin = start + segments.tell() + zipfile.sizeFileHeader + len(entry.filename) + 4  # type: ignore[attr-defined]
        padding = -begin % ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # torch's own padding
        archive.writestr(entry, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return segments.parts


def object_record(value: Any, start: int = 0) -> list[Segment]:
    """The record of any other object, made by ``torch.save``."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return [stream.getvalue()]


class _Segments:
    """A stream that keeps the segments written to it without copying them."""

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
    """Pickles like a tensor in ``torch.save``."""

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
    """Files ``__0_0.distcp``, ``__0_1.distcp``, … of a directory (or with another prefix), filled one by one.

    Hashing and writing run in background threads while the caller makes the next record, so values must not change
    until ``close``. Not thread-safe. ``hashes`` holds the SHA-256 of every closed file.
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
        """Write the record ``make(value, start)``; returns its file, start and length.

        Writing is asynchronous: a write error is raised by a later call, or by ``close``.
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
        """Wait until at most ``left`` records are in progress."""
        while len(self._under_way) > left:
            for future in self._under_way.popleft():
                future.result()

    def close(self) -> None:
        """Finish the current file. Raises any pending write error."""
        self._wait(0)
        file, self._file = self._file, None
        if file is not None:
            file.close()
            self.hashes[self._name] = self._digest.hexdigest()

    def shutdown(self) -> None:
        """Stop the threads, also after an error; a file that is still open stays unfinished."""
        for pool in (self._hashing, self._disk):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._file is not None:
            self._file.abandon()
            self._file = None


# Large files written past the page cache. Through the cache, every byte is copied into a new page (slow where a
# hypervisor allocates memory on demand), the disk starts late, and fsync waits for gigabytes. ``DirectFile`` writes
# from one aligned buffer with O_DIRECT: half the CPU time, no page cache, nothing left to sync. A file system without
# O_DIRECT gets the same writes without it.


BUFFER_BYTES = 8 << 20  # a multiple of any device's block size


class DirectFile:
    """A new append-only file, not readable before ``close``. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._handle = os.open(path, flags, 0o666)
        self._buffer = numpy.frombuffer(mmap.mmap(-1, BUFFER_BYTES), numpy.uint8)  # page-aligned
        self._filled = 0
        self._set_direct(True)

    def write(self, segment: bytes | memoryview) -> None:
        """Append ``segment``, which may change afterwards."""
        data = numpy.frombuffer(segment, numpy.uint8)  # NumPy copies without the GIL
        while len(data):
            part = min(len(data), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + part] = data[:part]
            self._filled += part
            data = data[part:]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def close(self) -> None:
        """Write the remaining bytes and close. Raises OSError if writing fails; the file is closed in any case."""
        try:
            self._set_direct(False)  # the remainder is not a whole number of blocks
            self._flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without writing the remaining bytes."""
        os.close(self._handle)

    def _flush(self) -> None:
        left = self._buffer[: self._filled]
        while len(left):
            try:
                left = left[os.write(self._handle, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set_direct(False)  # some file systems refuse O_DIRECT only when writing
        self._filled = 0

    def _set_direct(self, direct: bool) -> None:
        self._direct = False
        if hasattr(os, "O_DIRECT"):
            flags = fcntl.fcntl(self._handle, fcntl.F_GETFL) & ~os.O_DIRECT
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
                self._direct = direct
