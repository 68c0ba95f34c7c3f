"""Convert a saved optimizer state offline so that it loads at any TP, PP and DP.

By default Megatron's distributed optimizer saves each rank's flat buckets (``dp_reshardable``), one set per tensor-
and pipeline-parallel rank. Such a state loads at another DP size, but not at another TP or PP. The form that does
(``fully_reshardable``) has one tensor per weight; to save it, Megatron gathers 12 bytes per parameter from all
data-parallel ranks in host memory.

``reshard`` converts the first form to the second in the files of one save, without a GPU or process group. It reads
each rank's share of each weight from the buckets by byte range (``engine/optimizer_layout.py`` makes Megatron store
their positions), writes it as a rectangle of the weight's state, and finally replaces the index atomically. Until then
the save is unchanged, so a killed conversion can be repeated. Weights are not rewritten.

Memory is bounded by a few records. Disk use grows by 12 bytes per parameter while this save is kept.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune import screen
from megatron_prune.artifacts import check_space, explain_full_disk, read_json, sha256_file, write_bytes, write_json
from megatron_prune.checkpoint import index, safe, safe_objects, torch_dist, tracker
from megatron_prune.checkpoint.index import Box, Piece, StoredTensor
from megatron_prune.checkpoint.parallel import RECORD_BYTES
from megatron_prune.checkpoint.reader import INTEGRITY_FILE
from megatron_prune.checkpoint.record import RecordFiles, object_record, tensor_record
from megatron_prune.checkpoint.torch_dist import StoredFiles
from megatron_prune.checkpoint.tracker import refuse_remote
from megatron_prune.errors import CheckpointError

BUCKETS, WHOLE = "dp_reshardable", "fully_reshardable"  # Megatron's names for the two forms
LAYOUT_OBJECT = "param_layout"  # stored per set of buckets by engine/optimizer_layout.py
COMMAND = "megatron-prune reshard-optimizer"
_FILES = "__resharded"
_SET = re.compile(r"optimizer\.distributed\.dp_group_idx_\d+")
_COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class Share:
    """A rank's share of a weight: a rectangle of the weight ``key``, and its first element's index in a bucket."""

    key: str
    shape: tuple[int, ...]  # of the whole weight, with layers stacked as Megatron stacks them
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


def reshard(path: str | Path) -> Path | None:
    """Convert the newest save in ``path`` (or the save ``path`` itself) and return its directory.

    Returns None if the save already loads at any layout. Raises CheckpointError if it has no optimizer state of this
    form, was saved without the layout of its buckets, or the disk is full; the save is then unchanged.
    """
    refuse_remote("SAVE", path)
    directory = tracker.resolve(Path(path)).directory
    save = _Save(directory)
    if save.form == WHOLE:
        return None
    if save.form != BUCKETS:
        raise CheckpointError(
            f"{directory}: expected an optimizer state in the form {BUCKETS}, got {save.form or 'another'}"
        )
    with explain_full_disk(directory, "the save is as it was"):
        save.reshard()
    return directory


class _Save:
    """One ``iter_…`` directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metadata = safe.load_metadata(directory)
        self._stored = index.stored_tensors(self._metadata, directory)
        self._files = StoredFiles(directory)
        self._objects = {i.fqn: info for i, info in self._metadata.storage_data.items() if i.offset is None}
        torch_dist.vet_objects(self._metadata, self._files, directory)
        if _COMMON not in self._objects:
            raise CheckpointError(
                f"{directory}: expected the common state in its index, got a save of an older Megatron; resume from "
                "it and save again"
            )
        content = safe_objects.load_common(self._bytes(_COMMON), str(directory)).get("content_metadata") or {}
        self.form = content.get("distrib_optim_sharding_type")

    def reshard(self) -> None:
        sets = sorted({found[0] for key in self._stored if (found := _SET.match(key))})
        shares = {bucket: of for name in sets for bucket, of in self._layout(name).items()}
        self._check_buckets(shares)
        old = [key for key in self._stored if _SET.match(key)]
        check_space(self._directory / _FILES, sum(_nbytes(self._stored[key]) for key in old))
        self._remove_left_over()
        files = RecordFiles(self._directory, _FILES)
        try:
            entries, storage = self._write_states(files, shares)
            common = files.append(object_record, [self._new_common(sets[0])])
            files.close()
        finally:
            files.shutdown()
        for name in files.hashes:
            _sync(self._directory / name)
        kept: dict[str, Any] = {k: v for k, v in self._metadata.state_dict_metadata.items() if not _SET.match(k)}
        places = {i: info for i, info in self._metadata.storage_data.items() if not _SET.match(i.fqn)}
        places |= storage | {dcp.MetadataIndex(_COMMON): _StorageInfo(*common)}
        made = dcp.Metadata(
            state_dict_metadata=kept | entries, storage_data=places, storage_meta=dcp.StorageMeta(), version="1.0.0"
        )
        self._replace_index(pickle.dumps(made), files.hashes)

    # -- layout of the buckets ------------------------------------------------------------------

    def _layout(self, name: str) -> dict[str, list[Share]]:
        """The shares in each bucket of one model-parallel rank, as its optimizer stored them."""
        key = f"{name}.{LAYOUT_OBJECT}/shard_0_1"
        if key not in self._objects:
            raise CheckpointError(
                f"{self._directory} does not say where each weight is in its optimizer state: only saves of "
                "`megatron-prune pretrain` do. Resume at the layout at which it was saved, and save again"
            )
        try:
            (text,) = torch.load(io.BytesIO(self._bytes(key)), map_location="cpu", weights_only=True)
            buckets = json.loads(text)["buckets"]
            return {
                bucket: [
                    Share(s["key"], tuple(s["shape"]), tuple(s["offsets"]), tuple(s["sizes"]), s["start"]) for s in of
                ]
                for bucket, of in buckets.items()
            }
        except Exception as error:  # a damaged record can raise anything
            raise CheckpointError(f"{self._directory}: {key} is damaged ({error!r}): copy the save again") from error

    def _check_buckets(self, shares: Mapping[str, list[Share]]) -> None:
        """Raises CheckpointError unless every bucket has a layout and every weight's state is covered exactly once."""
        unknown = [key for key in self._stored if _SET.match(key) and key.rsplit(".", 1)[0] not in shares]
        if unknown:
            raise CheckpointError(
                f"{self._directory}: expected a stored layout for {unknown[0]}, got none; copy the save again"
            )
        rectangles: dict[str, list[Box]] = defaultdict(list)
        shapes: dict[str, tuple[int, ...]] = {}
        for bucket, of in shares.items():
            for share in of:
                piece = Piece(share.key, torch.float32, share.offsets, share.sizes, bucket, share.start, 0)
                rectangles[share.key].append(Box(piece, share.offsets, share.sizes, 0))
                if shapes.setdefault(share.key, share.shape) != share.shape:
                    raise CheckpointError(
                        f"{self._directory}: {share.key}: expected one shape, got {share.shape} and {shapes[share.key]}"
                    )
        for key, boxes in rectangles.items():
            if not index.covers(boxes, shapes[key]):
                raise CheckpointError(
                    f"{self._directory}: the optimizer state of {key}: expected it exactly once, got parts too few or "
                    "too many"
                )

    # -- writing --------------------------------------------------------------------------------

    def _write_states(
        self, files: RecordFiles, shares: Mapping[str, list[Share]]
    ) -> tuple[dict[str, dcp.TensorStorageMetadata], dict[dcp.MetadataIndex, _StorageInfo]]:
        entries: dict[str, dcp.TensorStorageMetadata] = {}
        storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
        work = [(*one, share) for bucket, of in shares.items() for one in self._states(bucket) for share in of]
        size = sum(torch.Size(share.sizes).numel() * flat.dtype.itemsize for _, flat, share in work)
        with screen.Bar(size, f"resharding {self._directory}", "B") as bar:
            for state, flat, share in work:
                key = f"optimizer.state.{state}.{share.key}"
                entry = entries.setdefault(
                    key,
                    dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=flat.dtype), torch.Size(share.shape), []),
                )
                for offsets, block in self._blocks(flat, share):
                    entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), block.shape))
                    place = dcp.MetadataIndex(key, torch.Size(offsets))
                    storage[place] = _StorageInfo(*files.append(tensor_record, block))
                    bar.advance(block.nbytes)
        return entries, storage

    def _states(self, bucket: str) -> Iterator[tuple[str, StoredTensor]]:
        """Master weights and moments of a bucket, 1-D each, by name."""
        for key, tensor in self._stored.items():
            if key.rsplit(".", 1)[0] == bucket:
                yield key.rsplit(".", 1)[1], tensor

    def _blocks(self, flat: StoredTensor, share: Share) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """A share in records of bounded size: (offsets in the whole weight, block)."""
        stacked = len(share.sizes) > 1 and share.sizes[0] == 1  # [1, rows, …]: one of the stacked layers
        axis = 1 if stacked else 0
        row = torch.Size(share.sizes[axis + 1 :]).numel()
        most = max(1, RECORD_BYTES // max(1, row * flat.dtype.itemsize))
        for first in range(0, share.sizes[axis], most):
            rows = min(most, share.sizes[axis] - first)
            sizes = (*share.sizes[:axis], rows, *share.sizes[axis + 1 :])
            offsets = (*share.offsets[:axis], share.offsets[axis] + first, *share.offsets[axis + 1 :])
            yield offsets, self._read(flat, share.start + first * row, rows * row).view(sizes)

    def _read(self, flat: StoredTensor, start: int, length: int) -> torch.Tensor:
        """Elements [start, start + length) of a bucket, which is sharded over the data-parallel ranks."""
        out = torch.empty(length, dtype=flat.dtype)
        filled = 0
        for piece in flat.pieces:
            first, last = max(start, piece.offsets[0]), min(start + length, piece.offsets[0] + piece.sizes[0])
            if first < last:
                box = Box(piece, (first,), (last - first,), first - piece.offsets[0])
                self._files.fill(out[first - start : last - start], box, 0)
                filled += last - first
        if filled != length:
            raise CheckpointError(
                f"{self._directory}: {flat.key}: expected {length} elements from {start} on, got {filled}; copy the "
                "save again"
            )
        return out

    def _new_common(self, name: str) -> dict[str, Any]:
        """The common state in the new form, including the step, learning rates and loss scale of the buckets."""
        with warnings.catch_warnings(action="ignore"):  # about libraries that machines without GPUs lack
            from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()  # Megatron's classes in the args, which were vetted above
        (common,) = torch.load(io.BytesIO(self._bytes(_COMMON)), map_location="cpu", weights_only=True)
        optimizer = {"param_state_sharding_type": WHOLE}
        for key in self._objects:
            field = key.removeprefix(f"{name}.").rsplit("/", 1)[0]
            if key.startswith(f"{name}.") and field in ("optimizer", "grad_scaler"):
                (optimizer[field],) = torch.load(io.BytesIO(self._bytes(key)), map_location="cpu", weights_only=True)
        content = common["content_metadata"] | {
            "distrib_optim_sharding_type": WHOLE,
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        made: dict[str, Any] = common | {"optimizer": optimizer, "content_metadata": content}
        return made

    def _replace_index(self, payload: bytes, hashes: Mapping[str, str]) -> None:
        """The commit: before it the save has the old form, after it the new one."""
        integrity = self._directory / INTEGRITY_FILE
        if integrity.is_file():  # of --verify-integrity: removed first, so that it never disagrees with the index
            known = read_json(integrity)
            integrity.unlink()
            write_bytes(self._directory / ".metadata", payload)
            files = {**known["files"], **hashes, ".metadata": sha256_file(self._directory / ".metadata")}
            write_json(integrity, {**known, "files": dict(sorted(files.items()))})
        else:
            write_bytes(self._directory / ".metadata", payload)

    def _remove_left_over(self) -> None:
        """Remove the files of a killed attempt, which no index names."""
        for path in self._directory.glob(f"{_FILES}_*.distcp"):
            path.unlink()

    def _bytes(self, key: str) -> bytes:
        info = self._objects[key]
        return self._files.read_bytes(info.relative_path, info.offset, info.length)


def _nbytes(tensor: StoredTensor) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _sync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
