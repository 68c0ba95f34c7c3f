"""The mapping between rows of Megatron weights and rows of Hugging Face tensors.

``segments`` maps one weight, ``rows_of_tensors`` inverts the mapping for a whole model. Weights and masks share it.
Rows are outputs: of a matrix that a family stores as [in, out] (``ModelFamily.transposed``), they are the columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_prune.checkpoint.layout import ModelShape, WeightLayout
from megatron_prune.convert.families.model_family import ModelFamily


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a Megatron weight: rows [start, stop) of a Hugging Face tensor (None: padding)."""

    name: str | None
    start: int
    stop: int


def segments(layout: WeightLayout, shape: ModelShape, vocabulary_size: int, family: ModelFamily) -> list[Segment]:
    """The segments of a Megatron weight, from its first row to its last."""
    shape = shape.of_layer(layout.layer)
    rows, kind = layout.shape[0], layout.suffix.rsplit(".", 1)[-1]
    if layout.axes[0] == "qkv":
        names = [f"{name.format(layout.layer)}.{kind}" for name in family.qkv]
        if family.qkv_per_head:
            return [Segment(names[0], 0, rows)]
        d, per_group = shape.kv_channels, shape.heads_per_group * shape.kv_channels
        query, key, value = names if len(names) == 3 else names * 3
        keys = values = 0
        if len(names) == 1:  # fused: queries, then keys, then values
            keys = shape.num_attention_heads * d
            values = keys + shape.num_query_groups * d
        return [
            segment
            for g in range(shape.num_query_groups)
            for segment in (
                Segment(query, g * per_group, (g + 1) * per_group),
                Segment(key, keys + g * d, keys + (g + 1) * d),
                Segment(value, values + g * d, values + (g + 1) * d),
            )
        ]
    if layout.axes[0] == "fc1":
        each = rows // len(family.fc1)
        return [Segment(f"{name.format(layout.layer)}.{kind}", 0, each) for name in family.fc1]
    name = family.tensor(layout.suffix, layout.layer)
    if layout.axes[0] == "vocab":
        padding = rows - vocabulary_size
        return [Segment(name, 0, vocabulary_size), *([Segment(None, 0, padding)] if padding else [])]
    return [Segment(name, 0, rows)]


def rows_of_weight(
    layout: WeightLayout, shape: ModelShape, vocabulary_size: int, family: ModelFamily
) -> dict[str, int]:
    """The Hugging Face tensors that a Megatron weight is made of, with the rows that it takes of each: where the last
    of its ``segments`` ends, without making them. There is one per head, and a configuration can claim millions."""
    kind = layout.suffix.rsplit(".", 1)[-1]
    if layout.axes[0] == "qkv":
        names = [f"{name.format(layout.layer)}.{kind}" for name in family.qkv]
        shape = shape.of_layer(layout.layer)
        groups = shape.num_query_groups * shape.kv_channels
        separate = [shape.num_attention_heads * shape.kv_channels, groups, groups]
        return dict(zip(names, separate if len(names) == 3 else [layout.shape[0]], strict=True))
    if layout.axes[0] == "fc1":
        each = layout.shape[0] // len(family.fc1)
        return {f"{name.format(layout.layer)}.{kind}": each for name in family.fc1}
    rows = vocabulary_size if layout.axes[0] == "vocab" else layout.shape[0]
    return {family.tensor(layout.suffix, layout.layer): rows}


def rows_of_tensors(
    layouts: Iterable[WeightLayout], shape: ModelShape, vocabulary_size: int, family: ModelFamily
) -> dict[str, list[tuple[Segment, str, int]]]:
    """The inverse of ``segments``: for every Hugging Face tensor of ``layouts``, its segments in ascending row order,
    each with the Megatron weight that holds it and its first row there."""
    made_of: dict[str, list[tuple[Segment, str, int]]] = defaultdict(list)
    for layout in layouts:
        row = 0
        for segment in segments(layout, shape, vocabulary_size, family):
            if segment.name is not None:
                made_of[segment.name].append((segment, layout.name, row))
            row += segment.stop - segment.start
    return {name: sorted(parts, key=lambda part: part[0].start) for name, parts in made_of.items()}


def is_transposed(layout: WeightLayout, family: ModelFamily) -> bool:
    """True if the family stores this matrix as [in, out]."""
    return family.transposed and layout.is_linear
