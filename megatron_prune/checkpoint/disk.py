"""Disks that are too small: refused before the work, explained when they fill up during it."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_prune import storage
from megatron_prune.errors import CheckpointError


def check_space(target: Path, needed: int) -> None:
    """Refuse to start on something of ``needed`` bytes that ``target``'s file system cannot hold."""
    if storage.is_stored(target):
        return
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(f"{parent} has {free / 1e9:.2f} GB free, {target.name} needs {needed / 1e9:.2f} GB")


@contextlib.contextmanager
def explain_full_disk(target: Path, kept: str = "nothing was kept") -> Iterator[None]:
    """Turn a disk that filled up, wherever in the block it shows, into an error that says so, and what is left."""
    try:
        yield
    except BaseException as error:
        if not _is_full_disk(error) or storage.is_stored(target):
            raise
        free = shutil.disk_usage(target.absolute().parent).free
        raise CheckpointError(
            f"no space left while writing {target} ({free / 1e9:.2f} GB free): {kept}; "
            "free some space or choose another output"
        ) from error


@contextlib.contextmanager
def explain_failed_save(save: Path | None) -> Iterator[None]:
    """Say so where a save of Megatron's failed because the disk is full: what Megatron raises does not tell."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, OSError) as error:
        if save is None or storage.is_stored(save) or not save.is_dir():
            raise
        usage = shutil.disk_usage(save)
        if usage.free > max(16 << 20, usage.total // 1000) and not _is_full_disk(error):
            raise
        raise CheckpointError(
            f"no space left while saving to {save} ({usage.free / 1e9:.2f} GB free): the saves before it are whole; "
            "free some space and start the same command again"
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
