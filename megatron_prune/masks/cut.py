"""Masks of a checkpoint that loses layers or channels: pruned like its weights, if the pattern stays valid.

Removing layers is always possible, removing channels only with unstructured masks or whole groups of M inputs. So rows
can be removed, and heads if M divides their size, but removing scattered hidden or FFN channels breaks N:M groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron_prune.checkpoint.layout import Axis, Kept, WeightLayout, axis_indices
from megatron_prune.errors import MasksError
from megatron_prune.masks.mask_reader import Masks
from megatron_prune.masks.pattern import Pattern

Source = tuple[WeightLayout, str, Kept]  # a weight of the smaller model, its source weight, and what is kept of that


def check_cut(masks: Masks, sources: Iterable[Source]) -> None:
    """Raises MasksError if the cut would split the groups of an N:M mask."""
    for layout, source, kept in sources:
        if source not in masks.entries:
            continue
        pattern = Pattern.parse(masks.entries[source].pattern)
        columns = axis_indices(layout.axes[1], masks.model, kept)
        if columns is not None and not _whole_groups(columns, pattern):
            raise MasksError(
                f"{masks.label}: {source} is pruned {pattern}, but the plan removes {layout.axes[1]} channels from its "
                f"groups of {pattern.m} inputs: prune depth only, or prune the dense parent first and then sparsify it"
            )


def cut_masks(masks: Masks, sources: Iterable[Source]) -> Iterator[tuple[str, Iterator[torch.Tensor], str]]:
    """The masks of the smaller model as (name, blocks of rows, pattern), the input of ``write_single``."""
    for layout, source, kept in sources:
        if source in masks.entries:
            yield layout.name, _blocks(masks, source, layout.axes, kept), masks.entries[source].pattern


def _whole_groups(columns: torch.Tensor, pattern: Pattern) -> bool:
    """True if the kept ``columns`` (ascending) consist of whole groups."""
    if pattern.m is None:
        return True
    if len(columns) % pattern.m:
        return False
    groups = columns.view(-1, pattern.m)
    return bool((groups == groups[:, :1] // pattern.m * pattern.m + torch.arange(pattern.m)).all())


def _blocks(masks: Masks, source: str, axes: Sequence[Axis], kept: Kept) -> Iterator[torch.Tensor]:
    rows, columns = (axis_indices(axis, masks.model, kept) for axis in axes)
    start = 0
    for block in masks.row_blocks(source):
        stop = start + len(block)
        if rows is not None:
            block = block[rows[torch.searchsorted(rows, start) : torch.searchsorted(rows, stop)] - start]
        if columns is not None:
            block = block[:, columns]
        yield block
        start = stop
