"""What is no Megatron checkpoint on a disk of this machine: recognised, so that its refusal says what to do.

* Other programs' directories, by the files that they write: Megatron-Bridge (``run_config.yaml``,
  ``train_state.pt``), NeMo (``model_weights``, ``weights``), ModelOpt's state beside Megatron's weights
  (``modelopt_state``), Hugging Face models. What is only *shaped* like one of them is refused by the reader.
* Object stores: Megatron reads and writes ``msc://profile/path`` through NVIDIA's Multi-Storage Client under
  ``--enable-msc``. This package keeps accounts, masks and trackers by renaming files, which object stores cannot do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.errors import CheckpointError, UsageError

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}[^/]", re.IGNORECASE)  # Path() makes one slash of two
_CHECKPOINT_FLAGS = ("--load", "--save", "--pretrained-checkpoint", "--shape-from", "--masks")
_WHY = (
    "trackers, accounts and masks are kept whole by renaming files, which object stores cannot do; mount the store, or "
    "copy the checkpoint here and back with the store's own tool"
)


def is_remote(path: str | Path) -> bool:
    """True for ``msc://…``, ``s3://…`` and other URLs."""
    return _URL.match(str(path)) is not None


def refuse_remote(flag: str, path: str | Path) -> None:
    """Refuse (UsageError) an address in an object store, naming the flag that gave it."""
    if is_remote(path):
        raise UsageError(
            flag,
            given=path,
            allowed="a directory of this machine, or a file system that it mounts",
            why=_WHY,
        )


def refuse_object_stores(argv: Sequence[str]) -> None:
    """Refuse (UsageError) a command line of Megatron's flags that names a checkpoint in an object store, or asks for
    Megatron's support for them."""
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in _CHECKPOINT_FLAGS:
            refuse_remote(flag, value or (argv[position + 1] if position + 1 < len(argv) else ""))
        if flag == "--enable-msc":
            raise UsageError(flag, given="on", allowed="off", why=_WHY)


def refuse_foreign(directory: Path) -> None:
    """Refuse (CheckpointError) a directory that another program than Megatron wrote."""
    if (directory / "modelopt_state").exists():
        raise CheckpointError(
            f"{directory} carries ModelOpt's state (modelopt_state): what it says about the weights (quantizers, other "
            "layers) would be lost; export the model with ModelOpt to Hugging Face, then import that"
        )
    for name in ("run_config.yaml", "train_state.pt", "latest_train_state.pt"):
        if (directory / name).is_file():
            raise CheckpointError(
                f"{directory} is a Megatron-Bridge checkpoint ({name}), which stores no Megatron args: export it to "
                "Hugging Face with Megatron-Bridge, then import that with tools/convert_checkpoint.py"
            )
    for name in ("model_weights", "weights"):
        if (directory / name).is_dir():
            raise CheckpointError(
                f"{directory} is a NeMo checkpoint ({name}), which stores no Megatron args: export it to Hugging Face "
                "with NeMo, then import that with tools/convert_checkpoint.py"
            )
    if (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} is a Hugging Face model (config.json): import it first with tools/convert_checkpoint.py"
        )
