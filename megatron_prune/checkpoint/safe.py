"""Read the index of a checkpoint without executing code from it.

A `torch_dist` checkpoint contains two kinds of pickle: ``.metadata`` (a plain pickle of torch's ``Metadata``), read
here, and records written by ``torch.save`` (read by ``safe_objects.py`` for objects, ``torch_dist.py`` for tensors).
All are read through allow-lists. The few classes that are needed are real; other classes that Megatron writes become
inert ``Opaque`` objects, so that Megatron need not be imported. Any other name is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune import storage
from megatron_prune.checkpoint.pickle_limits import MOST_OPCODES, refuse_absurd
from megatron_prune.checkpoint.safe_objects import Opaque
from megatron_prune.errors import CheckpointError, MegatronPruneError, StorageError
from megatron_prune.untrusted import read_bytes, reason, show

_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(dcp, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    # Where older torch versions define the properties.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): dcp.TensorProperties,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): dcp._MEM_FORMAT_ENCODING,
    ("collections", "OrderedDict"): dict,
}
# Save plans that Megatron caches in the metadata; this package does not use them.
PLANNING = {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
} | {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),  # in plans of --ckpt-assume-constant-structure
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
}


_MOST_BYTES = 1 << 30  # of an index
_BYTES_PER_OPCODE = 16  # of a checkpoint's files: a shard has 1,200 bytes at least, and about 45 opcodes in the index
_MOST_AXES = 8


class AsksForCode(CheckpointError):
    """A malicious rather than damaged index: readers must not fall back to an older checkpoint."""


class _Code(pickle.UnpicklingError):
    pass


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, payload: bytes, planning: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(payload))
        self._planning = planning

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return _METADATA_CLASSES[module, name]
        if (module, name) in PLANNING:
            return self._planning.get((module, name), Opaque)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise _Code(f"it asks for {module}.{name}, which no checkpoint index needs")


def load_metadata(directory: Path) -> dcp.Metadata:
    """The index ``.metadata`` of a `torch_dist` directory, with every byte range validated.

    Raises CheckpointError if it is missing or broken, asks for code, or names a file outside ``directory``.
    """
    path = directory / ".metadata"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: expected the index of a torch_dist checkpoint, got no such file; copy the checkpoint again"
        )
    try:
        payload = read_bytes(path, _MOST_BYTES)
    except StorageError:
        raise
    except (OSError, MegatronPruneError) as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    metadata = read_metadata(payload, str(path), directory=directory)
    if not isinstance(metadata, dcp.Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is refused: expected the index of a checkpoint, got another object")
    try:
        for key, entry in metadata.state_dict_metadata.items():
            _check(isinstance(key, str), "a key is {}", key)
            if isinstance(entry, dcp.TensorStorageMetadata):
                _check(isinstance(entry.properties.dtype, torch.dtype), "{} has no dtype", key)
                _check(isinstance(entry.chunks, list), "{} has no shards", key)
                _check_sizes(entry.size, key)
                for chunk in entry.chunks:
                    _check_sizes(chunk.offsets, key)
                    _check_sizes(chunk.sizes, key)
                    sides = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
                    _check(
                        all(offset + size <= extent for offset, size, extent in sides),
                        "{} has a shard outside of it",
                        key,
                    )
        for index, info in metadata.storage_data.items():
            _check(isinstance(index, dcp.MetadataIndex) and isinstance(index.fqn, str), "a record has no name")
            if index.offset is not None:
                _check_sizes(index.offset, index.fqn)
            _check_sizes((info.offset, info.length), index.fqn)
            name = info.relative_path
            _check(
                isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name,
                "{} names the file {}, which is not inside the checkpoint",
                index.fqn,
                name,
            )
            _check(not getattr(info, "transform_descriptors", None), "{} is stored compressed", index.fqn)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    return metadata


def _most_opcodes(payload: bytes, directory: Path | None) -> int:
    """A large index is one of large files: without them it is made to cost time."""
    if len(payload) <= MOST_OPCODES or directory is None:
        return MOST_OPCODES
    return MOST_OPCODES + storage.folder_bytes(directory) // _BYTES_PER_OPCODE


def read_metadata(
    payload: bytes, origin: str, planning: Mapping[tuple[str, str], Any] | None = None, *, directory: Path | None = None
) -> Any:
    """Unpickle an index through the allow-list. Classes of save plans come from ``planning``, else are ``Opaque``.

    How large it may be depends on the files of the checkpoint in ``directory``: every reader gets the same limit.
    Raises CheckpointError if it is broken or asks for code. Nothing else is validated.
    """
    try:
        refuse_absurd(payload, _most_opcodes(payload, directory))
        return _MetadataUnpickler(payload, planning or {}).load()
    except _Code as error:
        raise AsksForCode(f"{origin} is refused: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{origin} is refused: {reason(error)}") from error


def _check(holds: bool, problem: str, *values: Any) -> None:
    """Raise ValueError with the values in ``problem``; their text is made only then, and is short."""
    if not holds:
        raise ValueError(problem.format(*(value if isinstance(value, str) else show(value) for value in values)))


def _check_sizes(values: Any, key: str) -> None:
    _check(isinstance(values, (tuple, list)) and len(values) <= _MOST_AXES, "{} has sizes {}", key, values)
    _check(all(isinstance(v, int) and 0 <= v < 1 << 62 for v in values), "{} has sizes {}", key, values)
