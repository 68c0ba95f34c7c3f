"""One writer per place: ``claim(lock)`` holds a lock file while a process writes next to it or around it.

The file says who holds it: user, machine, process and since when. The lock itself is the kernel's (``flock``), which
ends with its process, however that ends, so that a file left behind by a killed process is recognized. On a file system
without such locks the file alone decides: a process of this machine that has ended is recognized; one of another
machine is not, and the message says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_prune.errors import MegatronPruneError
from megatron_prune.storage import is_stored
from megatron_prune.untrusted import explain, show_text

_MOST_BYTES = 4096
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class ClaimedError(MegatronPruneError):
    """Another process is writing to the same place."""


@contextlib.contextmanager
def claim(lock: Path, place: Path) -> Iterator[None]:
    """Hold the file ``lock`` while the block writes to ``place``, and remove it afterwards.

    Raises ClaimedError, naming the process, if another one holds it; MegatronPruneError if it cannot be made.
    """
    try:
        descriptor = _take(lock, place)
    except OSError as error:
        raise MegatronPruneError(explain(error, lock, "written")) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)  # while it is held: another process would take the new file
        os.close(descriptor)


def writing(place: Path, what: str, rank: int) -> contextlib.AbstractContextManager[None]:
    """Claim the directory ``place`` for a job that writes to it for long; ``what`` names the kind of job. Only the
    first rank does, and not in an object store, where there are no locks."""
    if rank or is_stored(place):
        return contextlib.nullcontext()
    place = place.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = os.access(place.parent, os.W_OK)
    return claim(place.with_name(f".{place.name}.{what}.lock") if beside else place / f".{what}.lock", place)


def _take(lock: Path, place: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
        try:
            held = os.pread(descriptor, _MOST_BYTES, 0)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ClaimedError(refusal(place, lock, held, sure=True)) from error
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                if held and not _has_ended(held):
                    raise ClaimedError(refusal(place, lock, held, sure=False)) from error
            with contextlib.suppress(FileNotFoundError):
                if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:  # else its last holder has removed it
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, owner(), 0)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def owner() -> bytes:
    """What a lock file says of the process that holds it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for this user
        user = str(os.getuid())
    told = {
        "user": user, "host": socket.gethostname(), "process": os.getpid(), "start": _start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }  # fmt: skip
    return json.dumps(told).encode()


def _start(process: int) -> str | None:
    """When a process of this machine started, in the kernel's clock; None if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(held: bytes) -> dict[str, str]:
    try:
        found = json.loads(held)
    except ValueError:
        found = None
    return {key: show_text(str(value)) for key, value in found.items()} if isinstance(found, dict) else {}


def _has_ended(held: bytes) -> bool:
    found = _read(held)
    number = found.get("process", "")
    return (
        found.get("host") == socket.gethostname()
        and number.isdecimal()
        and str(_start(int(number))) != found.get("start")
    )


def refusal(place: Path, lock: Path, held: bytes, *, sure: bool) -> str:
    """Who writes to ``place``, by the content ``held`` of its lock file, and what to do."""
    found = _read(held)
    who = (
        f"process {found['process']} of {found['user']} on {found['host']}, since {found['since']}"
        if {"process", "user", "host", "since"} <= found.keys()
        else "another process"
    )
    remedy = "wait for it, stop it, or choose another place"
    if not sure:
        remedy += f"; if it is no longer there, remove {lock}"
    return f"{place} is being written by {who}: {remedy}"
