"""Find the latest complete iteration of a save directory, and repair the tracker file that names it.

Megatron rewrites ``latest_checkpointed_iteration.txt`` in place (on a disk). A process killed during that write leaves
it empty, and Megatron then exits with code 0 when loading. ``repair_tracker`` makes it name the newest complete
iteration; readers find that iteration without writing anything.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from megatron_prune import storage
from megatron_prune.artifacts import read_json, write_bytes
from megatron_prune.errors import CheckpointError, MegatronPruneError, StorageError, UsageError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_TRACKER_BYTES = 20  # more digits than any iteration has
_ITERATION = re.compile(r"iter_(\d{7,19})")


@dataclass(frozen=True)
class FoundIteration:
    """A checkpoint directory, the root that holds its tracker, and what its name says."""

    root: Path
    directory: Path
    iteration: int | None  # None: read it from the stored state
    release: bool


def iteration_directory(root: str | Path, iteration: int) -> Path:
    """``root/iter_0000100``"""
    return storage.path(root) / f"iter_{iteration:07d}"


def root_of(path: str | Path) -> Path:
    """The directory with the tracker of a checkpoint: ROOT, also for ROOT/iter_… and ROOT/release."""
    path = storage.path(path)
    return path.parent if _ITERATION.fullmatch(path.name) or path.name == "release" else path


def is_complete(directory: str | Path) -> bool:
    """True for a directory whose save finished and whose files are all long enough.

    In `torch_dist` format Megatron writes ``metadata.json`` last, and the index says which bytes of which file must
    exist. In the legacy format every rank's file must exist and not be truncated.

    Raises CheckpointError if the index asks for code, StorageError if a store fails.
    """
    from megatron_prune.checkpoint import index, legacy, safe

    directory = storage.path(directory)
    try:
        if legacy.is_legacy(directory):
            legacy.LegacySource(directory)
            return True
        if _backend(directory) is None:
            return False
        needed: dict[str, int] = defaultdict(int)
        for info in (safe.load_metadata(directory).storage_data or {}).values():
            needed[info.relative_path] = max(needed[info.relative_path], info.offset + info.length)
        index.check_files(directory, needed)
    except (StorageError, safe.AsksForCode):
        raise  # unknown because the store failed; or complete but malicious
    except (MegatronPruneError, OSError, TypeError):
        return False
    return True


def find_iteration(root: str | Path) -> FoundIteration | None:
    """The checkpoint to load from ``root``: the tracked one, or the newest complete one if the tracker is missing,
    empty or broken. None if there is no checkpoint.

    Raises CheckpointError if the tracker names a directory that does not exist.
    """
    root = storage.path(root)
    tracked = _tracked(root)
    if tracked is not None:
        if not tracked.directory.is_dir():
            raise CheckpointError(
                f"{root / TRACKER_FILE}: expected the name of a save, got {tracked.directory.name}, which does not "
                "exist; restore it"
            )
        return tracked
    return _newest_complete(root)


def is_sound(root: str | Path) -> bool:
    """True if Megatron can read the tracker, or there is none."""
    root = storage.path(root)
    return _tracked(root) is not None or not (root / TRACKER_FILE).exists()


def repair_tracker(root: str | Path) -> Path | None:
    """Make the tracker name a complete checkpoint, preferably the one it names now; returns its directory.

    If the tracker is missing, empty or broken, or names an incomplete directory, it is rewritten to the newest
    complete iteration. An empty tracker without any checkpoint is removed, so that Megatron starts from the
    beginning. Returns None if ``root`` holds no checkpoint. Safe to call from several processes at once.

    Raises CheckpointError if the tracker names an iteration and no complete one is left.
    """
    from megatron_prune.checkpoint.legacy import is_legacy

    root = storage.path(root)
    tracked = _tracked(root)
    if tracked is not None and is_complete(tracked.directory):
        return tracked.directory
    newest = _newest_complete(root)
    if newest is not None:
        write_bytes(root / TRACKER_FILE, ("release" if newest.release else str(newest.iteration)).encode())
        return newest.directory
    if tracked is not None:
        known = (tracked.directory / "metadata.json").is_file() or is_legacy(tracked.directory)
        if known or not tracked.directory.is_dir():
            raise CheckpointError(
                f"{root / TRACKER_FILE} names {tracked.directory.name}, which is missing or truncated, and "
                f"{root} holds no other complete checkpoint: restore it, or delete the tracker to start again"
            )
        return tracked.directory  # a format that only Megatron can check
    (root / TRACKER_FILE).unlink(missing_ok=True)
    return None


def resolve(path: Path) -> FoundIteration:
    """The checkpoint that a path names: a root with a tracker, or one of its directories. Raises CheckpointError."""
    from megatron_prune.checkpoint.legacy import is_legacy

    path = path.absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected the directory of a Megatron checkpoint, got none there")
    if (path / ".metadata").is_file() or (path / "metadata.json").is_file() or is_legacy(path):
        match = _ITERATION.fullmatch(path.name)
        found = FoundIteration(path.parent, path, int(match[1]) if match else None, path.name == "release")
    else:
        tracked = find_iteration(path)
        if tracked is None:
            refuse_foreign(path)
            raise CheckpointError(
                f"{path} holds no complete checkpoint: expected {TRACKER_FILE} next to iter_… or "
                "release directories that Megatron saved"
            )
        found = tracked
    refuse_foreign(found.directory)
    if is_legacy(found.directory):
        return found
    if not (found.directory / "metadata.json").is_file():
        raise CheckpointError(
            f"{found.directory} has no metadata.json: its save was not finished, or its format is not supported "
            "(expected torch_dist or torch)"
        )
    if (backend := _backend(found.directory)) != "torch_dist":
        raise CheckpointError(f"{found.directory}: expected the format torch_dist, got {backend}")
    return found


def _backend(directory: Path) -> str | None:
    """The format named in ``metadata.json``; None if it names none."""
    found = read_json(directory / "metadata.json")
    return str(found["sharded_backend"]) if isinstance(found, dict) and "sharded_backend" in found else None


def _tracked(root: Path) -> FoundIteration | None:
    """The checkpoint that the tracker names; None if the tracker is missing, empty or broken."""
    if not (root / TRACKER_FILE).is_file():
        return None
    text = storage.open_bytes(root / TRACKER_FILE).read(_TRACKER_BYTES, 0).decode(errors="replace").strip()
    if text == "release":
        return FoundIteration(root, root / "release", 0, True)
    if text.isascii() and text.isdigit() and len(text) < _TRACKER_BYTES:
        return FoundIteration(root, iteration_directory(root, int(text)), int(text), False)
    return None


def _newest_complete(root: Path) -> FoundIteration | None:
    iterations = sorted(
        (int(match[1]), folder)
        for folder in (root.iterdir() if root.is_dir() else ())
        if (match := _ITERATION.fullmatch(folder.name))
    )
    for iteration, folder in reversed(iterations):
        if is_complete(folder):
            return FoundIteration(root, folder, iteration, False)
    return FoundIteration(root, root / "release", 0, True) if is_complete(root / "release") else None


# Directories that are not Megatron checkpoints, or not supported. They are recognized by the files that other programs
# write (Megatron-Bridge, NeMo, ModelOpt, Hugging Face), so that the error can say what to do.


_WHY_NOT_STORED = (
    "a new checkpoint is written to a temporary directory, which is renamed when it is complete, and object stores "
    "cannot rename directories: write it to a disk, then copy it with the store's own tool, the tracker last"
)


def refuse_remote(flag: str, path: str | Path) -> None:
    """Raise UsageError, naming ``flag``, if a new checkpoint would be written to an object store."""
    storage.refuse_stored(flag, path, _WHY_NOT_STORED)


def refuse_inside_checkpoint(flag: str, path: str | Path) -> None:
    """Raise UsageError, naming ``flag``, for an output that would be a save of another checkpoint, or inside one."""
    where = Path(path).absolute()
    own_name = _ITERATION.fullmatch(where.name) is not None or where.name == "release"
    inside = any((folder / ".metadata").is_file() for folder in where.resolve().parents)
    if inside or own_name and is_megatron(where.resolve().parent):
        raise UsageError(
            flag, got=path, expected="a new directory outside checkpoints",
            why="no verb writes into a checkpoint that it could have read",
        )  # fmt: skip


def refuse_foreign(directory: Path) -> None:
    """Raise CheckpointError for a directory that a program other than Megatron wrote."""
    if (directory / "modelopt_state").exists():
        raise CheckpointError(
            f"{directory} contains ModelOpt's state (modelopt_state), which would be lost (quantizers, other layers): "
            "export the model to Hugging Face with ModelOpt, then import that with megatron-prune convert"
        )
    for name in ("run_config.yaml", "train_state.pt", "latest_train_state.pt"):
        if (directory / name).is_file():
            raise CheckpointError(
                f"{directory} is a Megatron-Bridge checkpoint ({name}), which stores no Megatron args: export it to "
                "Hugging Face with Megatron-Bridge, then import that with megatron-prune convert"
            )
    for name in ("model_weights", "weights"):
        if (directory / name).is_dir():
            raise CheckpointError(
                f"{directory} is a NeMo checkpoint ({name}), which stores no Megatron args: export it to Hugging Face "
                "with NeMo, then import that with megatron-prune convert"
            )
    if (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is a Hugging Face model (config.json), expected a Megatron checkpoint: import it with "
            f"`megatron-prune convert import --hf {directory} --save CKPT`"
        )


def is_megatron(directory: Path) -> bool:
    """True for a directory that looks like a Megatron checkpoint, complete or not."""
    names = (TRACKER_FILE, ".metadata", "metadata.json", "release", "mp_rank_00")
    return any((directory / name).exists() for name in names) or any(directory.glob("iter_*"))
