"""The masks that a checkpoint was pruned or trained with, by its account or ``pruning.json``.

Loaded without them, a sparse model would become dense in silence: so they are required, unless a flag allows otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prune import screen
from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.errors import CheckpointError, MasksError
from megatron_prune.masks.mask_reader import MASKS, find_masks, open_masks

FLAG = "--allow-missing-masks"
MISSING = "missing_masks"  # in accounts, scores and pruning.json: the masks that were not there
_ACCOUNT = "account.json"  # of training/account.py


def require_masks(checkpoint: Checkpoint, *, allow_missing: bool = False) -> Path | None:
    """The folder of the checkpoint's masks; None for a dense model, and with ``allow_missing`` if they are missing.

    Raises MasksError if its account or ``pruning.json`` names masks which are not there, or others than those there.
    """
    folder = find_masks(checkpoint.root)
    recorded, exact = _recorded(checkpoint)
    if folder is not None:
        if exact and recorded is not None and (found := open_masks(folder).hash) != recorded:
            raise MasksError(
                f"{folder}: expected the masks {recorded} that {checkpoint.root} was made with, got {found}, which are "
                "of another pruning: restore the original masks"
            )
        return folder
    if recorded is not None and not allow_missing:
        raise MasksError(
            f"{checkpoint.root}: expected the masks {recorded} that it was made with in {MASKS}, got none: restore "
            f"them from a copy, or add {FLAG}, and its zeros are weights like others"
        )
    if recorded is not None:
        screen.say(f"{checkpoint.root}: its masks are missing; its zeros are taken for weights")
    return folder


def missing_masks(checkpoint: Checkpoint) -> str | None:
    """The hash of the masks that the checkpoint was made with, if they are not next to it."""
    return None if find_masks(checkpoint.root) is not None else _recorded(checkpoint)[0]


def _recorded(checkpoint: Checkpoint) -> tuple[str | None, bool]:
    """The hash of the masks behind a checkpoint, and whether its own are the same: a cut of layers or channels changes
    them and records no hash."""
    path = checkpoint.root / _ACCOUNT
    if path.exists():
        account = read_json(path)
        if not isinstance(account, dict):
            raise CheckpointError(f"{path}: expected an account, got something else; restore the file")
        return _hash(account.get("masks"), path), True
    if not checkpoint.pruning:
        return None, False
    last = checkpoint.pruning[-1]
    before = last.get("lineage")
    stages = [*(before if isinstance(before, list) else []), last]
    for stage in reversed([stage for stage in stages if isinstance(stage, dict)]):
        if stage.get("masks") is not None:
            return _hash(stage["masks"], checkpoint.directory), stage is last
        if stage.get("kind") == "trained" or MISSING in stage:
            break
    return None, False


def _hash(found: Any, path: Path) -> str | None:
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{path}: expected the hash of masks, got something else; restore the file")
    return found
