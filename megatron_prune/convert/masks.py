"""``masks.safetensors``: the masks of a Hugging Face model, next to its weights and under their names.

One tensor per weight (q, k, v, gate and up separate), uint8 [out, ceil(in / 8)]: bit k of byte j of a row is input
8·j + k, 1 means kept; also for a family that stores its weights as [in, out]. The header's metadata has ``patterns``
and ``shapes`` (JSON, by name), ``version`` and ``hash``: the hash of the Megatron checkpoint's masks, which an import
verifies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.layout import ModelShape, WeightLayout, weights
from megatron_prune.convert import safetensors_io
from megatron_prune.convert.families.model_family import ModelFamily
from megatron_prune.convert.tensors import rows_of_tensors, rows_of_weight, segments
from megatron_prune.errors import MasksError, MegatronPruneError
from megatron_prune.masks.mask_reader import BLOCK_BYTES, Masks
from megatron_prune.masks.mask_writer import write_single
from megatron_prune.masks.pattern import bytes_of, pack, unpack
from megatron_prune.untrusted import parse_json, show

HUGGINGFACE_MASKS = "masks.safetensors"
VERSION = "1"


def export_masks(masks: Masks, family: ModelFamily, path: Path) -> None:
    """Stream ``masks`` to the file ``path``."""
    masked = [layout for layout in weights(masks.model) if layout.name in masks.entries]
    made_of = rows_of_tensors(masked, masks.model, 0, family)  # no linear depends on the vocabulary
    shapes = {name: (parts[-1][0].stop, masks.entries[parts[0][1]].shape[1]) for name, parts in made_of.items()}

    def blocks(name: str) -> Iterator[torch.Tensor]:
        step = max(1, BLOCK_BYTES // shapes[name][1])
        for segment, weight, first in made_of[name]:
            last = first + segment.stop - segment.start
            for start in range(first, last, step):
                yield pack(masks.read(weight, slice(start, min(start + step, last))))

    safetensors_io.write_file(
        path,
        {name: (torch.uint8, (out, bytes_of(inputs))) for name, (out, inputs) in shapes.items()},
        blocks,
        {
            "version": VERSION,
            "hash": masks.hash,
            "patterns": json.dumps({name: masks.entries[parts[0][1]].pattern for name, parts in made_of.items()}),
            "shapes": json.dumps(shapes),
        },
    )


def import_masks(path: Path, shape: ModelShape, family: ModelFamily, folder: Path) -> Masks:
    """Stream the masks in the file ``path`` to ``folder``, for a model of this shape.

    Raises MasksError, naming what does not fit, for a file that is damaged or not for this model.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            patterns = _by_name(metadata, "patterns")
            shapes = _by_name(metadata, "shapes")
            stored = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            masks = write_single(folder, shape, _fused(path, shape, family, stored, patterns, shapes))
    except (safetensors.SafetensorError, OSError) as error:
        raise MasksError(f"{path} is truncated or damaged ({error}): copy it again") from error
    if metadata.get("hash", masks.hash) != masks.hash:
        raise MasksError(
            f"{path} is damaged: expected masks with the hash {metadata['hash']} of its header, got {masks.hash}"
        )
    return masks


def _by_name(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found = parse_json(metadata[key].encode(), f"{key} in the header of {HUGGINGFACE_MASKS}")
        return {str(name): value for name, value in found.items()}
    except (KeyError, AttributeError, MegatronPruneError) as error:
        raise MasksError(
            f"{HUGGINGFACE_MASKS}: expected {key} in its header, got none that is readable ({error})"
        ) from error


def _fused(
    path: Path,
    shape: ModelShape,
    family: ModelFamily,
    stored: dict[str, Any],
    patterns: dict[str, Any],
    shapes: dict[str, Any],
) -> Iterator[tuple[str, Iterator[torch.Tensor], str]]:
    """Masks of Megatron's weights: (name, blocks of rows, pattern)."""
    left = set(stored)
    for layout in weights(shape):
        if not layout.is_linear:
            continue
        rows = rows_of_weight(layout, shape, 0, family)
        names = [name for name in rows if name in stored]
        if not names:
            continue
        if len(names) != len(rows) or len({str(patterns.get(name)) for name in names}) != 1 or names[0] not in patterns:
            raise MasksError(
                f"{path}: {', '.join(rows)}, one matrix in Megatron: expected masks of one pattern for all, or for "
                "none, got others"
            )
        for name, out in rows.items():
            expected = [out, layout.shape[1]]
            packed = [out, bytes_of(layout.shape[1])]
            if shapes.get(name) != expected:
                raise MasksError(
                    f"{path}: {name}: expected shape {expected} in the header, got {show(shapes.get(name))}"
                )
            if stored[name].get_dtype() != "U8" or list(stored[name].get_shape()) != packed:
                found = f"{stored[name].get_dtype()} {list(stored[name].get_shape())}"
                raise MasksError(f"{path}: {name}: expected U8 {packed}, got {found}")
        left -= set(names)
        yield layout.name, _blocks(layout, shape, family, stored), str(patterns[names[0]])
    if left:
        raise MasksError(f"{path}: expected masks of this model's linear weights, got one of {sorted(left)[0]}")


def _blocks(
    layout: WeightLayout, shape: ModelShape, family: ModelFamily, stored: dict[str, Any]
) -> Iterator[torch.Tensor]:
    inputs = layout.shape[1]
    step = max(1, BLOCK_BYTES // inputs)
    for segment in segments(layout, shape, 0, family):
        for start in range(segment.start, segment.stop, step):
            yield unpack(stored[str(segment.name)][start : min(start + step, segment.stop)], 0, inputs)
