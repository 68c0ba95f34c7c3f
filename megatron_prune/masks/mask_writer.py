"""Write masks from one process, weight by weight; ``finish`` completes the folder for any writer."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune.artifacts import atomic_directory, explain_full_disk, write_json
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.record import RecordFiles, object_record, tensor_record
from megatron_prune.errors import MasksError
from megatron_prune.masks.mask_reader import (
    MASKS_FILE,
    Entry,
    Masks,
    as_masks_error,
    check_shape,
    entries_json,
    open_masks,
)
from megatron_prune.masks.pattern import Pattern, bytes_of, pack
from megatron_prune.masks.with_weights import measure

_RECORD_BYTES = 16 << 20  # of packed rows


def write_single(
    folder: str | Path,
    shape: ModelShape,
    masks: Iterable[tuple[str, torch.Tensor | Iterable[torch.Tensor], str | Pattern]],
) -> Masks:
    """Write ``folder`` from one process, atomically, and open it.

    ``shape`` is the model's; ``masks`` yields (logical name, bool [out, in] or consecutive blocks of its rows,
    pattern), in any order. Memory is bounded by the blocks that ``masks`` yields.

    Raises MasksError for a name, shape, type or pattern that does not fit; CheckpointError if the disk fills up.
    """
    folder = Path(folder).absolute()
    linears = {w.name: w.shape for w in weights(shape) if w.is_linear}
    entries: dict[str, Entry] = {}
    with explain_full_disk(folder), atomic_directory(folder) as scratch:
        records = _Records(scratch)
        try:
            for name, kept, pattern in masks:
                if name not in linears or name in entries:
                    raise MasksError(
                        f"{folder}: expected linear weights, each once, got {name}{' twice' if name in entries else ''}"
                    )
                out, inputs = linears[name]
                entries[name] = unmeasured((out, inputs), pattern, packed=True)
                records.add(name, (out, inputs), [kept] if isinstance(kept, torch.Tensor) else kept)
            records.finish()
        finally:
            records.files.shutdown()
        finish(scratch, folder, shape, entries)
    return open_masks(folder)


def unmeasured(shape: tuple[int, int], pattern: str | Pattern, *, packed: bool) -> Entry:
    """An entry whose bits are not counted and hashed yet."""
    return Entry(shape, str(pattern), 0, "", packed)


def finish(scratch: Path, folder: Path, model: ModelShape, entries: Mapping[str, Entry]) -> None:
    """Read back the masks in ``scratch`` (later renamed to ``folder``), count and hash them, write ``masks.json``.

    Raises MasksError for a mask that does not fit ``model`` or breaks its pattern."""
    with as_masks_error():
        for name, entry in entries.items():
            check_shape(folder, model, name, entry)
        masks = Masks(scratch, model, entries, label=folder)
        measured = {}
        for name, entry in masks.entries.items():
            removed, digest = measure(masks, name)
            measured[name] = replace(entry, removed=removed, digest=digest)
        write_json(scratch / MASKS_FILE, entries_json(Masks(scratch, model, measured, label=folder)))


class _Records:
    """Writes packed masks as records and index of a `torch_dist` folder."""

    def __init__(self, scratch: Path) -> None:
        self.files = RecordFiles(scratch)
        self._scratch = scratch
        self._entries: dict[str, Any] = {}
        self._storage: dict[dcp.MetadataIndex, _StorageInfo] = {}

    def add(self, name: str, shape: tuple[int, int], blocks: Iterable[torch.Tensor]) -> None:
        chunks: list[dcp.ChunkStorageMetadata] = []
        row = 0
        for part in _gathered(name, shape, blocks):
            offsets = torch.Size((row, 0))
            self._storage[dcp.MetadataIndex(name, offsets)] = _StorageInfo(*self.files.append(tensor_record, part))
            chunks.append(dcp.ChunkStorageMetadata(offsets, part.shape))
            row += len(part)
        if row != shape[0]:
            raise MasksError(f"the mask of {name}: expected {shape[0]} rows, got {row}")
        size = torch.Size((shape[0], bytes_of(shape[1])))
        self._entries[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=torch.uint8), size, chunks)

    def finish(self) -> None:
        """Write the index, and an empty common state, which Megatron's loader expects."""
        common = dcp.MetadataIndex("common_state/shard_0_1")
        self._storage[common] = _StorageInfo(*self.files.append(object_record, [{}]))
        self._entries[common.fqn] = dcp.BytesStorageMetadata()
        self.files.close()
        metadata = dcp.Metadata(self._entries, storage_data=self._storage, storage_meta=dcp.StorageMeta())
        (self._scratch / ".metadata").write_bytes(pickle.dumps(metadata))
        write_json(self._scratch / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})


def _gathered(name: str, shape: tuple[int, int], blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """``blocks`` of rows, packed and joined to parts of about ``_RECORD_BYTES``."""
    most = max(1, _RECORD_BYTES // bytes_of(shape[1]))
    held: list[torch.Tensor] = []
    for block in blocks:
        if block.dtype != torch.bool or block.shape[1:] != shape[1:]:
            raise MasksError(f"the mask of {name}: expected bool {list(shape)}, got {block.dtype} {list(block.shape)}")
        for part in torch.split(pack(block), most):
            if held and sum(map(len, held)) + len(part) > most:
                yield torch.cat(held)
                held = []
            held.append(part)
    if held:
        yield torch.cat(held)
