"""Paths on a local disk or in an object store (through NVIDIA's Multi-Storage Client).

``path(text)`` turns a command-line argument into a ``pathlib.Path``, or for ``msc://profile/key`` into a ``StorePath``,
which implements the part of ``Path`` that this package uses. The profile (in ``MSC_CONFIG``) names the store. A
directory in a store is only a key prefix, and a put is atomic, so replacing a file needs no rename.

``open_bytes`` reads either kind by position; ``GrowingText`` is a table that grows row by row.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import importlib.util
import io
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TextIO, cast

from megatron_prune.errors import StorageError, UsageError

SCHEME = "msc://"
EXTRA = "pip install 'megatron-prune[msc]' (and multi-storage-client's own extra for the store: boto3, …)"
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}[^/]", re.IGNORECASE)  # a Path makes one slash of two
_STORED = re.compile("^msc:/{1,2}")
_REQUEST_BYTES = 32 << 20  # largest single request to a store
_BLOCK_BYTES, _BLOCKS_KEPT = 64 << 10, 64  # a store returns a block as fast as a few bytes
_AT_ONCE = 32  # concurrent requests: latency is the network's, not this machine's
_SHARE, _AFTER_FAILURE = 50, 60.0  # a growing table's puts take at most 1/50 of the time; seconds before a retry


class Status(NamedTuple):
    """The fields of ``os.stat_result`` that this package uses."""

    st_size: int
    st_mtime: float


class StorePath(PurePosixPath):
    """``msc://profile/key``. Raises StorageError if the store fails, and FileNotFoundError as ``Path`` does.

    The client's own ``MultiStoragePath`` is not suitable. Constructing it needs the client and a known profile, so an
    error could not name the flag; for a key below a file it raises RuntimeError where ``Path`` reports a missing file;
    ``as_posix`` downloads the object; and it cannot read byte ranges.
    """

    def __str__(self) -> str:
        return _STORED.sub(SCHEME, super().__str__(), count=1)

    def absolute(self) -> StorePath:
        return self

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        found = self._info()
        return found is not None and found.type == "file"

    def is_dir(self) -> bool:
        found = self._info()
        return found is not None and found.type == "directory"

    def stat(self) -> Status:
        found = self._info()
        if found is None:
            raise FileNotFoundError(str(self))
        return Status(found.content_length, found.last_modified.timestamp())

    def iterdir(self) -> Iterator[StorePath]:
        with self._client() as (client, key):
            found = list(client.list(path=f"{key}/" if key else "", include_directories=True))
        names = {PurePosixPath(item.key).name for item in found if item.key.strip("/") != key.strip("/")}
        yield from (self / name for name in sorted(names))

    def below(self) -> Iterator[StorePath]:
        """All objects under this key prefix."""
        with self._client() as (client, key):
            found = list(client.list(path=f"{key}/" if key else ""))
        yield from (self / PurePosixPath(item.key).relative_to(key) for item in found)

    def open(self, mode: str = "rb") -> IO[bytes]:
        assert mode == "rb"
        handle = StoredBytes(self)
        return io.BufferedReader(Window(handle, 0, handle.size), _REQUEST_BYTES)

    def read_bytes(self) -> bytes:
        with self._client() as (client, key):
            return bytes(memoryview(client.read(key)))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, payload: bytes) -> None:
        with self._client() as (client, key):
            client.write(key, payload)

    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok and not self.exists():
            return
        with self._client() as (client, key):
            client.delete(key)

    def check(self) -> None:
        """Raises StorageError if the profile does not exist or its configuration is invalid."""
        with self._client():
            pass

    def read_range(self, start: int, length: int) -> bytes:
        asked = importlib.import_module("multistorageclient.types").Range(start, length)
        with self._client() as (client, key):
            return bytes(memoryview(client.read(key, byte_range=asked)))

    def download(self, target: Path) -> None:
        with self._client() as (client, key):
            client.download_file(key, str(target))

    def upload(self, source: Path) -> None:
        with self._client() as (client, key):
            client.upload_file(key, str(source))

    def _info(self) -> Any:
        with contextlib.suppress(FileNotFoundError), self._client() as (client, key):
            return client.info(key)
        return None

    @contextlib.contextmanager
    def _client(self) -> Iterator[tuple[Any, str]]:
        """Yield the profile's client and the key in it. Any provider-specific exception becomes StorageError."""
        try:
            yield importlib.import_module("multistorageclient.shortcuts").resolve_storage_client(str(self))
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, NotADirectoryError):  # a profile on a disk, and a key below a file
                raise FileNotFoundError(str(self)) from error
            raise StorageError(
                f"{self}: the object store refused ({type(error).__name__}: {error}): check the profile in MSC_CONFIG "
                "and its rights"
            ) from error


def path(where: str | Path) -> Path:
    """A ``pathlib.Path``, or a ``StorePath`` for ``msc://…``; callers treat both alike."""
    return cast(Path, StorePath(where)) if is_stored(where) else Path(where)


def is_stored(where: str | Path) -> bool:
    """True for ``msc://…``."""
    return _STORED.match(str(where)) is not None


def refuse_other_url(flag: str, where: str | Path) -> None:
    """Raise UsageError for a URL that the Multi-Storage Client does not handle."""
    if _URL.match(str(where)) is not None and not is_stored(where):
        raise UsageError(
            flag, got=where, expected="a directory, or msc://PROFILE/… with --enable-msc",
            why="object stores are read and written through the Multi-Storage Client, as in Megatron; name this one "
            "in a profile of its configuration (MSC_CONFIG)",
        )  # fmt: skip


def refuse_unusable(flag: str, where: str | Path) -> None:
    """Raise UsageError for an unsupported URL, and for ``msc://`` if the client or the profile is missing."""
    refuse_other_url(flag, where)
    if not is_stored(where):
        return
    if importlib.util.find_spec("multistorageclient") is None:
        raise UsageError(
            flag, got=where, expected="a directory where the Multi-Storage Client is not installed", do=EXTRA
        )
    try:
        StorePath(where).check()
    except StorageError as error:
        raise UsageError(flag, got=where, expected="a profile of MSC_CONFIG", why=str(error.__cause__)) from error


def is_reachable(where: str | Path) -> bool:
    """True if this machine can query the store at this address and the store answers."""
    try:
        refuse_unusable("", where)
        path(where).exists()
    except (UsageError, StorageError):
        return False
    return True


def refuse_stored(flag: str, where: str | Path, why: str) -> None:
    """Raise UsageError for any URL, where a local directory is needed."""
    if _URL.match(str(where)) is not None:
        raise UsageError(flag, got=where, expected="a directory of this machine", why=why)


# -- files ------------------------------------------------------------------------------------------


class LocalBytes:
    """An open local file, read by position. Thread-safe."""

    def __init__(self, where: Path) -> None:
        self._descriptor = os.open(where, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(where))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # ``os`` may be gone at interpreter shutdown
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def read(self, length: int, start: int) -> bytes:
        """Bytes [start, start + length), or fewer at the end of the file."""
        return os.pread(self._descriptor, length, start)

    def read_into(self, view: memoryview, start: int) -> int:
        """Read into ``view`` from byte ``start``; returns the number of bytes read, which may be less than asked."""
        return os.preadv(self._descriptor, [view[: 1 << 30]], start)


class StoredBytes:
    """``LocalBytes`` for an object in a store. Small reads fetch whole blocks, some of which are cached."""

    def __init__(self, where: StorePath) -> None:
        self._where, self.size = where, where.stat().st_size
        self._blocks: dict[int, bytes] = {}

    def read(self, length: int, start: int) -> bytes:
        length = min(length, self.size - start)
        if length > _BLOCK_BYTES:
            return self._where.read_range(start, length)
        if length <= 0:
            return b""
        first, last = start // _BLOCK_BYTES, (start + length - 1) // _BLOCK_BYTES
        found = b"".join(self._block(number) for number in range(first, last + 1))
        return found[start - first * _BLOCK_BYTES :][:length]

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            begin = number * _BLOCK_BYTES
            block = self._where.read_range(begin, min(_BLOCK_BYTES, self.size - begin))
            if len(self._blocks) >= _BLOCKS_KEPT:
                self._blocks.clear()
            self._blocks[number] = block
        return block

    def read_into(self, view: memoryview, start: int) -> int:
        found = self.read(min(len(view), _REQUEST_BYTES), start)
        view[: len(found)] = found
        return len(found)


def open_bytes(where: Path) -> LocalBytes | StoredBytes:
    """Open a file for reading by position. Raises OSError if it does not exist."""
    return StoredBytes(where) if isinstance(where, StorePath) else LocalBytes(where)


class Window(io.RawIOBase):
    """Bytes [start, start + length) of an open file as a seekable stream, read by position."""

    def __init__(self, handle: LocalBytes | StoredBytes, start: int, length: int) -> None:
        self._handle, self._start, self._length, self._position = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = max(0, min(len(view), self._length - self._position))
        got = self._handle.read_into(view[:count], self._start + self._position) if count else 0
        self._position += got
        return got


def each[T, R](function: Callable[[T], R], items: list[T], where: Path) -> list[R]:
    """``[function(item) for item in items]``, concurrently if ``where`` is in a store."""
    if not isinstance(where, StorePath):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


# -- directories ------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """Every file below ``folder``, sorted."""
    found = folder.below() if isinstance(folder, StorePath) else (f for f in folder.rglob("*") if f.is_file())
    return sorted(cast(Iterator[Path], found))


def folder_bytes(folder: Path) -> int:
    """The size of all files directly in ``folder``: of a store, by one listing."""
    if isinstance(folder, StorePath):
        with folder._client() as (client, key):
            return sum(item.content_length for item in client.list(path=f"{key}/"))
    with os.scandir(folder) as found:
        return sum(entry.stat().st_size for entry in found if entry.is_file())


def copy_files(source: Path, target: Path, last: str = "") -> None:
    """Copy the files below ``source``, at least one side in a store; files named ``last`` are copied last."""
    for file in sorted(files(source), key=lambda file: file.name == last):
        to = target / file.relative_to(source).as_posix()
        if isinstance(file, StorePath) and isinstance(to, StorePath):
            with tempfile.TemporaryDirectory() as folder:
                file.download(Path(folder, "file"))
                to.upload(Path(folder, "file"))
        elif isinstance(file, StorePath):
            to.parent.mkdir(parents=True, exist_ok=True)
            file.download(to)
        else:
            cast(Any, to).upload(file)


def fetched(folder: Path) -> Path:
    """A local copy of a store's directory of small files, kept until this process ends."""
    return Path(_fetched(folder).name)


@functools.cache
def _fetched(folder: Path) -> tempfile.TemporaryDirectory[str]:
    held = tempfile.TemporaryDirectory(prefix="megatron_prune-")  # deleted when the cache drops it
    copy_files(folder, Path(held.name))
    return held


# -- tables -----------------------------------------------------------------------------------------


class GrowingText:
    """An existing text file that grows row by row; rows written so far survive a kill.

    On a disk rows are appended. A store takes only whole objects, so the text is uploaded again at intervals that
    limit uploads to a fiftieth of the time, and at ``settle``. Between uploads, occasional store failures are ignored.
    """

    def __init__(self, where: Path, text: str) -> None:
        self._where, self._text = where, text
        self._file: TextIO | None = None if isinstance(where, StorePath) else open(where, "a", newline="")
        self._put_next, self._is_put = 0.0, True

    def write(self, row: str) -> None:
        if self._file is not None:
            self._file.write(row)
            self._file.flush()
            return
        self._text, self._is_put = self._text + row, False
        if time.monotonic() >= self._put_next:
            try:
                self.settle()
            except StorageError:
                self._put_next = time.monotonic() + _AFTER_FAILURE

    def settle(self) -> None:
        """Return once every row so far is stored. Raises StorageError if the upload fails."""
        if self._is_put:
            return
        began = time.monotonic()
        self._where.write_bytes(self._text.encode())
        ended = time.monotonic()
        self._put_next, self._is_put = ended + _SHARE * (ended - began), True

    def close(self) -> None:
        self.settle()
        if self._file is not None:
            self._file.close()
