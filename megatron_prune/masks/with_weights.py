"""Masks together with their weights: checked against them, and cut like them.

The check is one streaming pass: no non-zero weight where the mask removes, patterns, counts, hash. Memory is bounded by
a few blocks of rows. Errors name the first offending tensor in the order of the forward pass, and the position in it.

A checkpoint that loses layers or channels keeps masks, if their patterns stay valid. Removing layers is always
possible, removing channels only with unstructured masks or whole groups of M inputs. So rows can be removed, and heads
if M divides their size, but removing scattered hidden or FFN channels breaks N:M groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy
import torch

from megatron_prune.checkpoint.kept import Kept, axis_indices
from megatron_prune.checkpoint.layout import Axis, WeightLayout
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.errors import MasksError
from megatron_prune.masks.mask_reader import Masks, open_masks
from megatron_prune.masks.pattern import Pattern, pack
from megatron_prune.masks.required import require_masks


def masks_of(checkpoint: Checkpoint, *, allow_missing: bool = False) -> Masks | None:
    """The masks next to a checkpoint, if any, with their own bits checked. ``guarded`` (while the weights are streamed)
    or ``verify`` checks them against the weights. MasksError as from ``require_masks``."""
    folder = require_masks(checkpoint, allow_missing=allow_missing)
    if folder is None:
        return None
    masks = open_masks(folder)
    masks.check_model(checkpoint.shape, str(checkpoint.root))
    for name in masks.entries:
        check_bits(masks, name)
    return masks


def verify(masks: Masks, checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Raises MasksError unless ``masks`` fit ``checkpoint``: shapes, exact patterns, counts, hashes, and zero weights
    wherever they remove. ``names``: of these weights alone, those without a mask among them."""
    masks.check_model(checkpoint.shape, str(checkpoint.root))
    chosen = set(masks.entries) if names is None else set(names)
    for name in masks.entries:
        if name not in chosen:
            continue
        check_bits(masks, name)
        for _ in guarded(masks, name, checkpoint.row_blocks(name)):
            pass


def guarded(masks: Masks, name: str, blocks: Iterable[torch.Tensor], start: int = 0) -> Iterator[torch.Tensor]:
    """Yield the consecutive ``blocks`` [rows, in] of the weight ``name``, from row ``start``. Raises MasksError at the
    first that is not zero where the mask removes. Weights without a mask are not checked."""
    for block in blocks:
        if name in masks.entries and len(block):
            kept = masks.read(name, slice(start, start + len(block)))
            alive = _not_zero(block) > kept.numpy()
            if alive.any():
                row, column = (int(i) for i in numpy.argwhere(alive)[0])
                raise MasksError(
                    f"{masks.label} do not fit these weights: {name}[{start + row}, {column}] is "
                    f"{float(block[row, column]):g}, but the mask removes it (as {int(alive.sum())} of "
                    f"{block.numel()} weights here)"
                )
        start += len(block)
        yield block


def _not_zero(block: torch.Tensor) -> numpy.ndarray:
    """Where floating-point numbers are not ±0 (NaN is not zero). Compares bits, which is fast for bfloat16 too."""
    raw = block.view({2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[block.itemsize]).numpy()
    some: numpy.ndarray = raw + raw != 0  # doubling drops the sign bit
    return some


def check_bits(masks: Masks, name: str) -> None:
    """Raises MasksError if the bits of a mask do not match its count or digest in ``masks.json``."""
    entry = masks.entries[name]
    removed, digest = measure(masks, name)
    if removed != entry.removed:
        raise MasksError(f"{masks.label}: {name}: expected {entry.removed} removed weights by its entry, got {removed}")
    if digest != entry.digest:
        raise MasksError(f"{masks.label}: {name} is damaged: its bits do not match its hash; restore the masks")


def measure(masks: Masks, name: str) -> tuple[int, str]:
    """Read all bits of a mask; returns the number of weights it removes and the digest of its packed rows.

    Raises MasksError at the first group that breaks its pattern."""
    entry = masks.entries[name]
    pattern = Pattern.parse(entry.pattern)
    removed, start, digest = 0, 0, hashlib.sha256()
    for kept in masks.row_blocks(name):
        broken = pattern.broken(kept)
        if broken is not None:
            row, group = broken
            inside = kept[row].view(-1, pattern.m or 1)[group].int().tolist()
            raise MasksError(
                f"{masks.label}: {name} breaks {pattern}: row {start + row}, inputs {group * len(inside)} to "
                f"{(group + 1) * len(inside) - 1} are {inside}"
            )
        removed += kept.numel() - int(numpy.count_nonzero(kept.numpy()))
        digest.update(pack(kept).numpy())
        start += len(kept)
    return removed, digest.hexdigest()


Source = tuple[WeightLayout, str, Kept]  # a weight of the smaller model, its source weight, and what is kept of that


def check_cut(masks: Masks, sources: Iterable[Source]) -> None:
    """Raises MasksError if the cut would split the groups of an N:M mask."""
    for layout, source, kept in sources:
        if source not in masks.entries:
            continue
        pattern = Pattern.parse(masks.entries[source].pattern)
        columns = axis_indices(layout.axes[1], masks.shape_of(source), kept)
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
    rows, columns = (axis_indices(axis, masks.shape_of(source), kept) for axis in axes)
    start = 0
    for block in masks.row_blocks(source):
        stop = start + len(block)
        if rows is not None:
            block = block[rows[torch.searchsorted(rows, start) : torch.searchsorted(rows, stop)] - start]
        if columns is not None:
            block = block[:, columns]
        yield block
        start = stop
