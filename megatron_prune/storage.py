"""Where checkpoints lie: on a disk of this machine, or in an object store through NVIDIA's Multi-Storage Client.

``path(text)`` is the one way from a command line to a path: a ``pathlib.Path``, or for ``msc://profile/key`` a
``StorePath`` with what this package uses of one. A profile says which store that is (``MSC_CONFIG``). A directory there
is only a prefix of keys, and an object appears whole or not at all: no renaming is needed to replace a file.

``open_bytes`` reads either by position; ``GrowingText`` is a table that gets a row at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
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
_REQUEST_BYTES = 32 << 20  # the most that is asked of a store at once
_BLOCK_BYTES, _BLOCKS_KEPT = 64 << 10, 64  # takes a store as long as a few bytes
_AT_ONCE = 32  # requests: each waits for the network, not for this machine
_SHARE, _AFTER_FAILURE = 50, 60.0  # a growing table's puts take at most a 50th of the time; seconds until the next try


class Status(NamedTuple):
    """What this package asks of ``os.stat_result``."""

    st_size: int
    st_mtime: float


class StorePath(PurePosixPath):
    """``msc://profile/key``. Raises StorageError where the store itself fails, FileNotFoundError as ``Path`` does.

    The client's own ``MultiStoragePath`` does not do: it needs the client and a known profile to be made at all, so
    that a missing one could not be refused by flag; for a key below a file it raises RuntimeError where ``Path`` says
    that there is none; ``as_posix`` downloads the object; and it reads no ranges.
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
        """All objects whose keys begin with this directory's."""
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
        """Raises StorageError where there is no such profile, or its configuration is damaged."""
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
        """The profile's client, and the key in it. What a store's provider raises tells of that provider."""
        try:
            yield importlib.import_module("multistorageclient.shortcuts").resolve_storage_client(str(self))
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, NotADirectoryError):  # a profile on a disk, and a key below a file
                raise FileNotFoundError(str(self)) from error
            raise StorageError(f"{self}: {type(error).__name__}: {error}") from error


def path(where: str | Path) -> Path:
    """A path on a disk, or a ``StorePath``: to those who read and write it the same."""
    return cast(Path, StorePath(where)) if is_stored(where) else Path(where)


def is_stored(where: str | Path) -> bool:
    """True for ``msc://…``."""
    return _STORED.match(str(where)) is not None


def refuse_other_url(flag: str, where: str | Path) -> None:
    """Refuse (UsageError) a URL that is not of the Multi-Storage Client."""
    if _URL.match(str(where)) is not None and not is_stored(where):
        raise UsageError(
            flag, got=where, expected="a directory, or msc://PROFILE/… with --enable-msc",
            why="object stores are read and written through the Multi-Storage Client, as in Megatron; name this one "
            "in a profile of its configuration (MSC_CONFIG)",
        )  # fmt: skip


def refuse_unusable(flag: str, where: str | Path) -> None:
    """Refuse (UsageError) a URL that nothing here reads, and ``msc://`` where its client or its profile is missing."""
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
    """True where an address in an object store can be asked from here, and its store answers."""
    try:
        refuse_unusable("", where)
        path(where).exists()
    except (UsageError, StorageError):
        return False
    return True


def refuse_stored(flag: str, where: str | Path, why: str) -> None:
    """Refuse (UsageError) an address in an object store, and any other URL, for what needs a disk."""
    if _URL.match(str(where)) is not None:
        raise UsageError(flag, got=where, expected="a directory of this machine", why=why)


# -- files ------------------------------------------------------------------------------------------


class LocalBytes:
    """An open file of a disk, read by position; usable from several threads."""

    def __init__(self, where: Path) -> None:
        self._descriptor = os.open(where, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # ``os`` may be gone at the end
        if hasattr(self, "_descriptor"):
            close(self._descriptor)

    def read(self, length: int, start: int) -> bytes:
        """Bytes [start, start + length), fewer where the file ends before."""
        return os.pread(self._descriptor, length, start)

    def read_into(self, view: memoryview, start: int) -> int:
        """Fill ``view`` from byte ``start`` on; how many bytes that were, which may be a part."""
        return os.preadv(self._descriptor, [view[: 1 << 30]], start)


class StoredBytes:
    """``LocalBytes`` of an object. What is small is read in blocks, of which some are kept."""

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
    """A file to be read by position. Raises OSError where there is none."""
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
    """``[function(item) for item in items]``; many at a time where each of them asks a store for something."""
    if not isinstance(where, StorePath):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


# -- directories ------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """Every file below ``folder``, sorted."""
    found = folder.below() if isinstance(folder, StorePath) else (f for f in folder.rglob("*") if f.is_file())
    return sorted(cast(Iterator[Path], found))


def copy_files(source: Path, target: Path, last: str = "") -> None:
    """Copy the files below ``source``, at least one of the two in a store; that of the name ``last`` when all others
    are there."""
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
    """A store's directory of small files on this machine's disk, until this process ends."""
    return Path(_fetched(folder).name)


@functools.cache
def _fetched(folder: Path) -> tempfile.TemporaryDirectory[str]:
    held = tempfile.TemporaryDirectory(prefix="megatron_prune-")  # removes itself when nobody holds it
    copy_files(folder, Path(held.name))
    return held


# -- tables -----------------------------------------------------------------------------------------


class GrowingText:
    """A text file that exists and gets a row at a time, which a kill then leaves behind.

    On a disk rows are appended. A store only takes whole objects: the text is put again, as often as that takes a
    fiftieth of the time, and at ``settle``. Between, a store that fails now and then stops nobody.
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
        """Return when every row so far is where it belongs. Raises StorageError where it cannot be."""
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
