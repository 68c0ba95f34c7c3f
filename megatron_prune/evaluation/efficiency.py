"""What a model costs to run: FLOPs, memory of weights and of cached keys and values, from its shape and masks.

These numbers are theoretical and exact. ``speed.py`` measures times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.masks.verify import masks_of

SEQUENCE = 2048  # tokens of the forward pass whose FLOPs are shown
PACKED = "2:4"
# Of four weights two values stay; each has an index of two bits (NVIDIA's sparse tensor cores, 16-bit types and
# smaller), so a packed weight takes half a value and one bit.
INDEX_BYTES = 1 / 8


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a forward pass over ``SEQUENCE`` tokens, and bytes. ``flops_kept``: without the weights that masks
    remove. ``weight_bytes_packed``: if weights under 2:4 masks were packed; None without any. ``cache_bytes``: keys
    and values of one token."""

    parameters: int
    flops: int
    flops_kept: int
    weight_bytes: int
    weight_bytes_packed: int | None
    cache_bytes: int


def cost(shape: ModelShape, itemsize: int, *, removed: int = 0, packable: int = 0) -> ModelCost:
    """Of a model whose weights and cache have ``itemsize`` bytes per value; ``removed`` weights of the linears are zero
    by masks, and ``packable`` weights are in masks of the pattern 2:4."""
    parameters = shape.parameters()
    saved = packable * itemsize / 2 - packable * INDEX_BYTES
    return ModelCost(
        parameters=parameters,
        flops=shape.forward_flops(SEQUENCE),
        flops_kept=shape.forward_flops(SEQUENCE, removed),
        weight_bytes=parameters * itemsize,
        weight_bytes_packed=round(parameters * itemsize - saved) if packable else None,
        cache_bytes=2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * itemsize,
    )


def of_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """The cost of a checkpoint and the number of its non-zero weights, which reads all of them. MasksError if its masks
    do not fit it."""
    shape, masks = checkpoint.shape, masks_of(checkpoint)
    entries = masks.entries if masks is not None else {}
    packable = sum(e.shape[0] * e.shape[1] for e in entries.values() if e.pattern == PACKED)
    dtype = checkpoint.spec("embedding.word_embeddings.weight").dtype
    found = cost(shape, dtype.itemsize, removed=masks.removed if masks else 0, packable=packable)
    stored = sum(checkpoint.spec(name).nbytes for name in checkpoint.names)  # norms may have another type
    zeros = sum(int((block == 0).sum()) for name in checkpoint.names for block in checkpoint.row_blocks(name))
    packed = found.weight_bytes_packed
    return {
        "parameters": found.parameters,
        "parameters_nonzero": found.parameters - zeros,
        "dtype": str(dtype).removeprefix("torch."),
        "pattern": next(iter({entry.pattern for entry in entries.values()}), None) if entries else None,
        "flops": found.flops,
        "flops_kept": found.flops_kept,
        "weight_bytes": stored,
        "weight_bytes_packed": None if packed is None else packed + stored - found.weight_bytes,
        "cache_bytes": found.cache_bytes,
    }
