"""What is no checkpoint of Megatron's, or cannot become one: recognised, so that its refusal says what to do.

Other programs' directories are known by the files that they write: Megatron-Bridge (``run_config.yaml``,
``train_state.pt``), NeMo (``model_weights``, ``weights``), ModelOpt's state beside Megatron's weights
(``modelopt_state``), Hugging Face models. What is only *shaped* like one of them is refused by the reader.
"""

from __future__ import annotations

from pathlib import Path

from megatron_prune import storage
from megatron_prune.errors import CheckpointError

_WHY_NOT_STORED = (
    "a new checkpoint is written into a directory of another name, which is renamed when all of it is there, and "
    "object stores rename no directories: write it to a disk, then copy it with the store's own tool, its tracker last"
)


def refuse_remote(flag: str, path: str | Path) -> None:
    """Refuse (UsageError) an address in an object store where a new checkpoint goes, naming the flag that gave it."""
    storage.refuse_stored(flag, path, _WHY_NOT_STORED)


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
