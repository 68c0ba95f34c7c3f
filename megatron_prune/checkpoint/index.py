"""Where each logical weight of a `torch_dist` checkpoint is stored: which records, and which rectangles of them.

``stored_tensors`` turns validated metadata into ``StoredTensor``s by stored key. ``locate`` finds the
``Box``es that make up one logical weight, for stacked and per-layer keys and for fused and separate
gate and up. It checks shape, type, and that the shards cover the weight exactly once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_prune.checkpoint.layout import ModelShape, WeightLayout, stacked_name
from megatron_prune.errors import CheckpointError

_MOST_RECTANGLES = 50_000  # of one kind of weight: layers times shards of a layer
# Prefixes of what Megatron stores besides the weights; every other key must be in the layout table.
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state", "common_state", "opt_param_scheduler")


@dataclass(frozen=True)
class Piece:
    """A rectangle of a stored tensor: its position in the global tensor, and its record in a file."""

    key: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its stored key. A stacked tensor holds all layers along its first axis."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @cached_property
    def by_layer(self) -> dict[int, list[Piece]]:
        """The pieces of a stacked tensor that hold each layer."""
        layers: dict[int, list[Piece]] = defaultdict(list)
        if (count := sum(piece.sizes[0] for piece in self.pieces)) > _MOST_RECTANGLES + 4 * len(self.pieces):
            raise CheckpointError(f"{self.key} is stored as {len(self.pieces):,} shards, {count:,} of single layers")
        for piece in self.pieces:
            for layer in range(piece.offsets[0], piece.offsets[0] + piece.sizes[0]):
                layers[layer].append(piece)
        return layers


@dataclass(frozen=True)
class Box:
    """A rectangle of a logical weight, and the piece that holds it.

    ``skip`` elements of the piece, from the layers before this one, precede the rectangle.
    """

    piece: Piece
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    skip: int


def stored_tensors(metadata: Metadata, directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, including optimizer state, by stored key."""
    records: dict[str, dict[tuple[int, ...], Any]] = defaultdict(dict)
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            records[index.fqn][tuple(index.offset)] = info
    stored = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        dtype = entry.properties.dtype
        pieces = []
        places = {tuple(chunk.offsets) for chunk in entry.chunks}
        if is_weight(key) and len(places) < len(entry.chunks):
            raise CheckpointError(f"{directory}: a shard of {key} is missing or duplicated")
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            info = records[key].get(offsets)
            if info is None:
                raise CheckpointError(
                    f"{directory}: expected a record for the shard of {key} at {list(offsets)}, got none; copy the "
                    "checkpoint again"
                )
            pieces.append(Piece(key, dtype, offsets, sizes, info.relative_path, info.offset, info.length))
        stored[key] = StoredTensor(key, tuple(entry.size), dtype, tuple(pieces))
    return stored


def is_weight(key: str) -> bool:
    """False for keys of what Megatron stores besides the weights (optimizer, random states)."""
    return not key.startswith(_NOT_WEIGHTS)


def locate(
    layout: WeightLayout, shape: ModelShape, stored: Mapping[str, StoredTensor], directory: Path
) -> tuple[Box, ...]:
    """The boxes of one logical weight. Raises CheckpointError if the weight is missing, its shape contradicts the
    stored args, or one of its shards is missing or duplicated."""
    keys, layer = _keys(layout, shape, stored, directory)
    rows = layout.shape[0] // len(keys)
    boxes: list[Box] = []
    for number, key in enumerate(keys):
        tensor = stored[key]
        expected = (*(() if layer is None else (shape.num_layers,)), rows, *layout.shape[1:])
        if tensor.shape != expected:
            raise CheckpointError(
                f"{directory}: {key}: expected shape {list(expected)} from the stored args, got {list(tensor.shape)}"
            )
        if tensor.dtype != stored[keys[0]].dtype:
            raise CheckpointError(
                f"{directory}: {' and '.join(keys)}: expected one type, got {tensor.dtype} and {stored[keys[0]].dtype}"
            )
        for piece in tensor.pieces if layer is None else tensor.by_layer.get(layer, ()):
            offsets, sizes, skip = piece.offsets, piece.sizes, 0
            if layer is not None:
                skip = (layer - offsets[0]) * math.prod(sizes[1:])
                offsets, sizes = offsets[1:], sizes[1:]
            boxes.append(Box(piece, (offsets[0] + number * rows, *offsets[1:]), sizes, skip))
    if not covers(boxes, layout.shape):
        raise CheckpointError(
            f"{directory}: the shards of {layout.name}: expected {list(layout.shape)} covered exactly once, got one "
            "shard too few or too many; copy the checkpoint again"
        )
    return tuple(boxes)


def _keys(
    layout: WeightLayout, shape: ModelShape, stored: Mapping[str, StoredTensor], directory: Path
) -> tuple[tuple[str, ...], int | None]:
    """The stored keys that hold the weight, in row order, and its layer if those keys stack layers."""
    names: list[tuple[str, int | None]] = [(layout.name, None)]
    if layout.layer is not None:
        names.append((stacked_name(layout.suffix), layout.layer))
    spellings: list[Callable[[str], tuple[str, ...]]] = [lambda name: (name,)]
    if layout.axes[0] == "fc1" and shape.gated:
        # Megatron's `singleton_local_shards` stores gate and up under separate keys.
        spellings.append(lambda name: (f"{name}_w", f"{name}_v"))
    for spell in spellings:
        for name, layer in names:
            if all(key in stored for key in spell(name)):
                return spell(name), layer
    raise CheckpointError(
        f"{directory}: expected {layout.name}, which its stored args (num_layers={shape.num_layers}, "
        f"tied={shape.tied}) require, got a checkpoint without it"
    )


def refuse_unknown(stored: Mapping[str, StoredTensor], known: set[str], directory: Path) -> None:
    """Raises CheckpointError for a weight that is not in the layout table, which would be silently dropped."""
    unknown = sorted(key for key in stored if is_weight(key) and key not in known)
    if unknown:
        raise CheckpointError(
            f"{directory}: expected the weights of a dense GPT, got others too: {', '.join(unknown[:3])}"
            f"{', …' if len(unknown) > 3 else ''}"
        )


def covers(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """True if the boxes cover a tensor of ``shape``, each element exactly once, in linear time.

    The number of boxes that hold an element, as a function of its position, is determined by its mixed differences:
    +1 and -1, alternating, at the corners of every box. They must be those of the whole tensor.
    """
    corners: dict[tuple[int, ...], int] = defaultdict(int)
    for offsets, sizes, sign in (*((box.offsets, box.sizes, 1) for box in boxes), ((0,) * len(shape), shape, -1)):
        if 0 in sizes:
            continue
        for corner in product(*(((o, 1), (o + s, -1)) for o, s in zip(offsets, sizes, strict=True))):
            corners[tuple(place for place, _ in corner)] += sign * math.prod(step for _, step in corner)
    return not any(corners.values())


def check_files(directory: Path, needed: Mapping[str, int]) -> None:
    """Raises CheckpointError if a file of ``directory`` is missing or shorter than ``needed`` says, in bytes."""
    for name, size in needed.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, so the checkpoint is incomplete: copy it again")
        if path.stat().st_size < size:
            raise CheckpointError(
                f"{path} is truncated: expected {size} bytes, got {path.stat().st_size}; copy the checkpoint again"
            )
