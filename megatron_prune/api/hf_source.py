"""The Hugging Face directory that ``prune --hf`` begins with, read without its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune import artifacts, verbs
from megatron_prune.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_prune.checkpoint.layout import ModelShape

PRECISION = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}


@dataclass(frozen=True)
class HFSource:
    """The Hugging Face directory to prune."""

    folder: Path
    shape: ModelShape
    args: dict[str, Any]  # Megatron's
    kind: str  # of its family
    positions: int
    dtype: str
    nbytes: int
    identity: str

    @classmethod
    def read(cls, asked: verbs.PruneHFSettings) -> HFSource:
        """Read the model without its weights. CheckpointError if there is none or its family is not supported."""
        from megatron_prune.checkpoint.layout import ModelShape
        from megatron_prune.convert import huggingface, safetensors_io
        from megatron_prune.convert.config import args_from_config, family_of

        folder = huggingface.local_directory(asked.hf)
        config = artifacts.read_json(folder / "config.json")
        args = args_from_config(config, tensor_model_parallel_size=asked.tensor_model_parallel_size)
        family = family_of(config)
        tensors = safetensors_io.Tensors(folder, family.other_names)
        embeddings = family.tensor("embedding.word_embeddings.weight", None)
        dtype = str(tensors.dtype(embeddings)).removeprefix("torch.")
        if (asked.dtype or dtype) not in PRECISION:
            raise CheckpointError(
                f"{folder} holds {dtype} weights, expected {', '.join(PRECISION)}: convert them with --dtype"
            )
        return cls(
            folder,
            ModelShape.from_args(args),
            args,
            family.kind,
            args["max_position_embeddings"],
            dtype,
            sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            _identity(folder),
        )


def _identity(folder: Path) -> str:
    """A hash that identifies a model's files: all of config and tokenizer; of weights the header and 64 samples."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as handle:
                for place in range(64):
                    handle.seek(place * size // 64)
                    digest.update(handle.read(4096))
        elif path.name in ("config.json", "tokenizer.json", "tokenizer.model"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
