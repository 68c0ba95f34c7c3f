"""The front door: files that somebody else may have written.

A checkpoint, a model, a corpus, a plan or a ledger can come from anywhere. Every reader of such a file goes through
here, so that reading costs no more time and memory than a file of its size can need:

* ``read_bytes``: a regular file (no pipe, no device) of a limited size;
* ``read_json``: also limits on depth and on the memory of the values; numbers are finite and fit 64 bits;
* ``check``: the types of the values, by a pydantic schema;
* ``show``: a value in an error message, never longer than a line, whatever the value is.

Pickles have their own door (``checkpoint/pickle_limits.py``), and so have corpora (``data/indexed.py``).
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_prune import storage
from megatron_prune.errors import MegatronPruneError, error_chain

MOST_JSON_BYTES = 32 << 20  # the plan of a model of 80 layers and 28,672 channels has 14 MB
MOST_JSON_MEMORY = 256 << 20  # payload, text and values
DEEPEST = 100
_DIGITS = 19  # of a number of 64 bits
# Upper bounds of what CPython needs per value: a list or dictionary, an entry of a dictionary, an entry of a list.
_BYTES_OF = {b"[": 64, b"{": 72, b":": 100, b",": 60}
_LONG_NUMBER = re.compile(rb"\d{%d}|\d[eE]\+?\d{3}" % _DIGITS)
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}  # fmt: skip


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises FileNotFoundError, and MegatronPruneError for anything else that is not such a file or cannot be read.
    """
    where = storage.path(path)
    if isinstance(where, storage.StorePath):
        return _read_stored(where, most)
    try:
        descriptor = os.open(
            where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        )  # opening a pipe would wait for a writer
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise MegatronPruneError(f"{path}: expected a regular file, got {_KINDS[stat.S_IFMT(found.st_mode)]}")
            refuse_large(path, found.st_size, most)
            with os.fdopen(os.dup(descriptor), "rb") as handle:
                content = handle.read(most + 1)  # it may grow meanwhile, and files in /proc have no size
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise MegatronPruneError(explain(error, path, "read")) from error
    refuse_large(path, len(content), most)
    return content


def _read_stored(where: storage.StorePath, most: int) -> bytes:
    refuse_large(str(where), where.stat().st_size, most)
    return where.read_bytes()


def refuse_large(path: str | Path, size: int, most: int) -> None:
    """Raise MegatronPruneError for a file of more than ``most`` bytes."""
    if size > most:
        raise MegatronPruneError(f"{path}: expected at most {most:,} bytes, got {size:,}")


def refuse_irregular(path: str | Path, most: int) -> None:
    """Raise MegatronPruneError for a file that a library should not be given: a pipe, a device, more than ``most``
    bytes. A file that does not exist is not refused."""
    where = storage.path(path)
    try:
        found = where.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise MegatronPruneError(explain(error, path, "read")) from error
    mode = getattr(found, "st_mode", stat.S_IFREG)
    if not stat.S_ISREG(mode):
        raise MegatronPruneError(f"{path}: expected a regular file, got {_KINDS[stat.S_IFMT(mode)]}")
    refuse_large(path, found.st_size, most)


def refuse_link_outside(path: Path, folder: Path) -> None:
    """Raise MegatronPruneError if ``path`` in ``folder`` is a link to a file outside of it, which must not be copied:
    the folder may be a stranger's. The Hugging Face Hub's cache links to its own files, which is allowed."""
    within = folder.resolve()
    within = within.parent.parent if within.parent.name == "snapshots" else within
    if not path.resolve().is_relative_to(within):
        raise MegatronPruneError(
            f"{path} is a link to {path.resolve()}, outside of {folder}: put the file itself there, or remove the link"
        )


_REMEDIES = {
    errno.EACCES: "check the permissions of the file and of its folders",
    errno.EPERM: "check the permissions of the file and of its folders",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some of your quota or choose another place",
    errno.EIO: "the disk or the network file system failed: try again, and look at the system's log",
    errno.ESTALE: "the network file system lost the file: try again",
    errno.ENOENT: "it may have been moved or deleted meanwhile: check the path",
    errno.EEXIST: "something else has this name: choose another place",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "it is a directory: name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a link where none is followed, or its links lead in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: end other work",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOMEM: "free some memory, or raise the limit (ulimit -v)",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or start fewer",
}
# What libraries say of the same in errors of their own.
_SAID = {
    "Too many open files": errno.EMFILE, "File too large": errno.EFBIG, "failed to map segment": errno.ENOMEM,
    "annot allocate memory": errno.ENOMEM, "can't allocate memory": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
}  # fmt: skip
_OF_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)


def explain_machine(error: BaseException) -> str | None:
    """One line if the machine had no more memory, descriptors, processes or room for files, whatever a library made of
    it; else None."""
    for one in error_chain(error):
        number = one.errno if isinstance(one, OSError) else None
        if isinstance(one, MemoryError):
            number = errno.ENOMEM
        elif isinstance(one, ImportError | RuntimeError):
            number = next((value for text, value in _SAID.items() if text in str(one)), None)
        if number in _OF_MACHINE:
            return f"the machine has refused: {os.strerror(number)}; {_REMEDIES[number]}"
    return None


def is_explained(error: OSError) -> bool:
    """True for an error of a file or a disk; others, such as of a socket, are not the user's."""
    return error.filename is not None or error.errno in _REMEDIES


def explain(error: Exception, path: str | Path, tried: str) -> str:
    """One line on an OSError: the path, what was tried (``read``, ``written``), the reason and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    remedy = _REMEDIES.get(number or 0, "")
    return f"{path} could not be {tried}: {reason}" + (f"; {remedy}" if remedy else "")


# -- JSON -------------------------------------------------------------------------------------------


def read_json(path: str | Path, most: int = MOST_JSON_BYTES) -> Any:
    """Read JSON. Raises MegatronPruneError, with the path, if the file is missing, invalid, or beyond the limits."""
    try:
        payload = read_bytes(path, most)
    except FileNotFoundError as error:
        raise MegatronPruneError(f"{path} does not exist") from error
    return parse_json(payload, str(path))


def parse_json(payload: bytes, origin: str, most_memory: int = MOST_JSON_MEMORY) -> Any:
    """The value of a JSON text, within the limits of this module. Raises MegatronPruneError, naming ``origin``."""
    width = 1 if payload.isascii() else 4
    needed = len(payload) * (1 + 2 * width) + sum(payload.count(sign) * size for sign, size in _BYTES_OF.items())
    if needed > most_memory:
        raise MegatronPruneError(
            f"{origin}: expected JSON whose values need at most {most_memory >> 20} MB of memory, "
            f"got one that may need {needed >> 20} MB"
        )
    hooks: dict[str, Callable[[str], Any]] = {"parse_constant": _refuse_constant}
    if _LONG_NUMBER.search(payload):
        hooks |= {"parse_int": _parse_int, "parse_float": _parse_float}
    try:
        value = json.loads(payload.decode("utf-8-sig"), **hooks)  # type: ignore[arg-type]
        if _HALF_A_PAIR.search(payload):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be encoded or printed
    except (ValueError, RecursionError) as error:  # ValueError includes UnicodeDecodeError
        raise MegatronPruneError(f"{origin} is not valid JSON: {error}") from error
    if _depth(value) > DEEPEST:
        raise MegatronPruneError(f"{origin} is not valid JSON: it is nested more than {DEEPEST} levels deep")
    return value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a finite number")


def _parse_int(text: str) -> int:
    if len(text) > _DIGITS + 1:
        raise ValueError(f"a number of {len(text)} digits, expected at most {_DIGITS}")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            break
        level = [
            part
            for whole in level
            if isinstance(whole, (list, dict))
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, (list, dict))
        ]
    return depth


# -- types ------------------------------------------------------------------------------------------


@functools.cache
def _adapter(schema: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(schema)


def check[T](schema: type[T], value: Any, origin: str, kind: type[MegatronPruneError] = MegatronPruneError) -> T:
    """``value`` if its types are those of ``schema`` (a TypedDict, ``list[int]``, …), strictly; keys that the schema
    does not name are left out of the check, and kept. Raises ``kind``, naming ``origin`` and the first wrong key."""
    import pydantic

    try:
        _adapter(schema).validate_python(value, strict=True)  # type: ignore[arg-type]  # a type is hashable
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(show_text(str(part)) for part in first["loc"])
        message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        got = "nothing" if first["type"] == "missing" else show(first["input"])
        expected = "this key" if first["type"] == "missing" else message
        if first["type"] in ("too_long", "too_short"):
            most = first["ctx"].get("max_length")
            expected = f"at least {first['ctx']['min_length']} values" if most is None else f"at most {most} values"
        raise kind(f"{origin} is damaged: {place + ': ' if place else ''}expected {expected}, got {got}") from error
    return value  # type: ignore[no-any-return]


class Keys(dict[str, Any]):
    """The content of a file: a key that it lacks is an error of type ``kind``, in one line with the file's name."""

    def __init__(self, content: Mapping[str, Any], origin: str, kind: type[MegatronPruneError]) -> None:
        super().__init__(content)
        self._origin, self._kind = origin, kind

    def __missing__(self, key: str) -> Any:
        raise self._kind(f"{self._origin} is damaged: {show_text(key)}: expected this key, got nothing")


# -- messages ---------------------------------------------------------------------------------------

_LONGEST = 60


def show(value: Any) -> str:
    """A short form of any value: text, numbers and flat collections as they are, anything else by its type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _LONGEST else f"{value[:_LONGEST]!r}…"
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 64 else f"a number of {value.bit_length():,} bits"
    if value is None or isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)) and len(value) <= 8:
        parts = [show(part) if isinstance(part, (str, int, float)) else _name(part) for part in value]
        return f"[{', '.join(parts)}]"
    return _name(value)


def _name(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with {len(value):,} keys"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"a list of {len(value):,} values"
    return "null" if value is None else f"a {type(value).__name__}"


def show_text(text: str, longest: int = _LONGEST) -> str:
    """A name, or another program's message, in an error message: shortened."""
    return text if len(text) <= longest else f"{text[:longest]}…"


def reason(error: BaseException) -> str:
    """What a library says about a damaged file: its first lines, and never much of the file."""
    return show_text(" ".join(str(error).split()) or type(error).__name__, 200)
