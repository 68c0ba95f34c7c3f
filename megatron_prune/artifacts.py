"""Atomic output (directories, JSON, bytes), hashes, provenance, and disk-space checks.

Every stage writes its output through this module. A directory is renamed to its final name once
everything in it is on disk. A killed stage leaves at most a ``.<name>.partial-…`` directory, which
the next run of the same stage removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_prune import screen, storage
from megatron_prune.claims import claim
from megatron_prune.errors import CheckpointError, MegatronPruneError, StorageError, UsageError, error_chain
from megatron_prune.untrusted import explain, refuse_link_outside
from megatron_prune.untrusted import read_json as read_json

PARTIAL = ".partial-"


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON: readers see either the old file or the new one."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON, with each list of integers on one line because plans hold long ones."""
    text = json.dumps(value, indent=2, allow_nan=False)
    text = re.sub(r"\[\n[\s\d,-]+\]", lambda match: " ".join(match[0].split()), text)
    return (text + "\n").encode()


def with_nulls(value: Any) -> Any:
    """``value`` with lists for tuples and None for floats that are not finite, so that JSON can represent it."""
    if isinstance(value, dict):
        return {key: with_nulls(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(path: str | Path, payload: bytes) -> None:
    """Write a file atomically: temporary file in the same directory, fsync, rename. In an object store: one put."""
    path = storage.path(path)
    if storage.is_stored(path):
        path.write_bytes(payload)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{PARTIAL}")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(payload)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a scratch directory next to ``path`` and rename it to ``path`` when the block succeeds.

    Raises MegatronPruneError if ``path`` exists and is not empty, unless ``replace`` is set. Leftovers of
    killed runs for the same ``path`` are removed first. Raises ClaimedError if another process is writing to ``path``.
    """
    path = Path(path).absolute()
    if path.exists() and not replace and (not path.is_dir() or any(path.iterdir())):
        raise MegatronPruneError(f"{path} already exists, expected a free path: remove it or choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    with claim(path.with_name(f".{path.name}.lock"), path):
        for left_over in _left_overs(path):
            shutil.rmtree(left_over, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{PARTIAL}"))
        share_directory(scratch)
        try:
            yield scratch
            for folder, _, files in os.walk(scratch):
                for name in files:
                    _sync(Path(folder) / name)
                _sync(Path(folder))
            if path.exists():
                retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{PARTIAL}"))
                os.rename(path, retired / "old")
                os.rename(scratch, path)
                shutil.rmtree(retired)
            else:
                os.rename(scratch, path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _left_overs(path: Path) -> list[Path]:
    """Scratch directories of killed runs for ``path``, and for no other path."""
    name = re.compile(re.escape(f".{path.name}{PARTIAL}") + "[a-z0-9_]{8}")  # the ending is ``tempfile``'s
    return [found for found in path.parent.iterdir() if name.fullmatch(found.name)]


def share_directory(path: Path) -> None:
    """Give a directory of ``tempfile``, which only its owner may read, the permissions of any new one."""
    os.chmod(path, 0o777 & ~_UMASK | os.stat(path).st_mode & stat.S_ISGID)


_UMASK = os.umask(0)
os.umask(_UMASK)


_OF_A_CHECKPOINT = (
    "latest_checkpointed_iteration.txt", "metadata.json", ".metadata", "common.pt", "pruning.json", "integrity.json",
    "account.json", "losses.csv",
)  # fmt: skip


def refuse_unwritable(
    flag: str, path: str | Path, *, kind: Literal["file", "directory"] = "file", appended: bool = False
) -> None:
    """Raise UsageError, naming ``flag``, if ``path`` could not be written, or ``appended`` to. For a verb that works
    for hours before it writes."""
    where = storage.path(path)
    if storage.is_stored(where):
        return
    # ``--save`` names a run, whose account is written there.
    if flag != "--save" and kind == "file" and where.name in _OF_A_CHECKPOINT and where.exists():
        raise UsageError(flag, got=path, expected="a new file", why="this one is part of a checkpoint")
    try:
        if where.exists() and where.is_dir() != (kind == "directory"):
            number = errno.EISDIR if kind == "file" else errno.ENOTDIR
            raise OSError(number, os.strerror(number))
        folder = next(parent for parent in where.absolute().parents if os.path.lexists(parent))
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=PARTIAL)
        os.close(descriptor)
        os.unlink(temporary)
        if appended and where.exists():
            os.close(os.open(where, os.O_WRONLY | os.O_APPEND))
    except OSError as error:
        raise UsageError(
            flag, got=path, expected=f"a {kind} that can be written", why=explain(error, path, "written")
        ) from error


TRIES, BETWEEN_TRIES = 4, 10.0  # of writing results, and seconds: a network file system may come back


def write_results(path: str | Path, payload: bytes) -> None:
    """``write_bytes`` for results that took long: if it fails, it is tried again, and in the end they are written to
    the folder for temporary files. Raises MegatronPruneError, which says where they are."""
    failed = failure(lambda: write_bytes(path, payload))
    if failed is None:
        return
    why = explain(failed, path, "written")
    try:
        folder = Path(tempfile.mkdtemp(prefix="megatron-prune-"))
        (folder / Path(path).name).write_bytes(payload)
    except OSError as error:
        lost = explain(error, tempfile.gettempdir(), "written")
        raise MegatronPruneError(f"{why}; the results are lost: {lost}") from error
    raise MegatronPruneError(f"{why}; the results are in {folder / Path(path).name}") from failed


def failure(write: Callable[[], None]) -> OSError | StorageError | None:
    """Call ``write``, ``TRIES`` times if the disk or the store refuses; what it refused the last time, if it did."""
    for number in range(TRIES):
        try:
            write()
            return None
        except (OSError, StorageError) as error:
            failed = error
            if number < TRIES - 1:
                time.sleep(BETWEEN_TRIES)
    return failed


def copy_directory(source: Path, target: Path, *, last: str = "") -> None:
    """Copy the directory ``source`` to ``target``, which must not exist. On a disk the copy is atomic. In an object
    store a kill can leave an incomplete copy; the file named ``last`` is written after all others."""
    if not storage.is_stored(source):
        for folder, folders, files in os.walk(source):
            for name in (*folders, *files):
                refuse_link_outside(Path(folder, name), source)
    if storage.is_stored(target):
        storage.copy_files(source, target, last)
        return
    with atomic_directory(target) as scratch:
        if storage.is_stored(source):
            storage.copy_files(source, scratch)
        else:
            shutil.copytree(source, scratch, dirs_exist_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content, read in chunks."""
    with storage.path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no whitespace)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, for provenance."""
    found = {"python": platform.python_version()}
    for package in ("megatron-prune", "megatron-core", "torch", "transformer-engine", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device() -> dict[str, str]:
    """The device that this process computes on: kind (``cuda`` or ``cpu``), name, and instruction set."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return {"kind": "cuda", "name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    names = (line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name"))
    name = next(names, platform.machine())
    return {"kind": "cpu", "name": name, "capability": torch.backends.cpu.get_cpu_capability()}


WORKERS_PER_CORE, FEWEST_WORKERS = 4, 8  # workers also wait for disks; a few are always allowed


def bound_workers(flag: str, workers: int, least: int = 1) -> int:
    """``workers``, or as many as this machine gives to this process, a rank of several; what is lowered is printed. No
    output depends on their number. UsageError below ``least``."""
    if workers < least:
        raise UsageError(flag, got=workers, expected=f"at least {least} process")
    cores = len(os.sched_getaffinity(0))
    most = max(FEWEST_WORKERS, WORKERS_PER_CORE * cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if workers > most:
        screen.say(f"{flag} {workers}: this machine gives {cores} cores; {most} are started")
    return min(workers, most)


def end_with_parent(parent: int) -> None:
    """In a worker: have the kernel kill it when ``parent`` ends (Linux); otherwise it would wait for work forever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it had already ended
        os._exit(1)


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


# Disk space.


def check_space(target: Path, needed: int) -> None:
    """Raise CheckpointError if the file system of ``target`` has fewer than ``needed`` bytes free."""
    if storage.is_stored(target):
        return
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{parent}: expected {needed / 1e9:.2f} GB free, which {target.name} needs, got {free / 1e9:.2f} GB; free "
            "some space or choose another output"
        )


@contextlib.contextmanager
def explain_full_disk(target: Path, kept: str = "nothing was kept") -> Iterator[None]:
    """Turn any error in the block that a full disk caused, or the limit on the size of files, into a CheckpointError;
    ``kept`` says what is left."""
    try:
        yield
    except BaseException as error:
        refusal = disk_refusal(error)
        if refusal is None or storage.is_stored(target):
            raise
        what, remedy = describe_refusal(refusal, "writing", target)
        raise CheckpointError(f"{what}: {kept}; {remedy} or choose another output") from error


@contextlib.contextmanager
def explain_failed_save(save: Path | None) -> Iterator[None]:
    """Raise CheckpointError if Megatron's save failed because the disk is full or a file is too large; Megatron's own
    error does not say."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, OSError) as error:
        if save is None or storage.is_stored(save) or not save.is_dir():
            raise
        usage, refusal = shutil.disk_usage(save), _refusal_of_save(error, save)
        if usage.free > max(16 << 20, usage.total // 1000) and refusal is None:
            raise
        what, remedy = describe_refusal(refusal, "saving to", save)
        raise CheckpointError(f"{what}: earlier saves are complete; {remedy} and run the same command again") from error


def disk_refusal(error: BaseException) -> OSError | None:
    """The error in the chain of ``error`` with which the system refused to store more: a full disk, a quota, or the
    limit on the size of files; None if there is none."""
    refusals = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    chain = (one for one in error_chain(error) if isinstance(one, OSError) and one.errno in refusals)
    return next(chain, None)


def _refusal_of_save(error: BaseException, save: Path) -> OSError | None:
    """The same for a save of Megatron, whose writers lose the system's error: a file in ``save`` that ends at the limit
    says it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and any(p.is_file() and p.stat().st_size >= limit for p in save.rglob("*")):
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return disk_refusal(error)


def describe_refusal(refusal: OSError | None, verb: str, path: Path) -> tuple[str, str]:
    """What stopped ``verb`` (``writing``) to ``path``, and the remedy."""
    if refusal is not None and refusal.errno == errno.EFBIG:
        return f"the limit on the size of files was reached while {verb} {path}", "raise it (ulimit -f unlimited)"
    free = shutil.disk_usage(path if path.is_dir() else path.absolute().parent).free
    return f"no space left while {verb} {path} ({free / 1e9:.2f} GB free)", "free some space"
