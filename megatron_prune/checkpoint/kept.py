"""What a cut keeps of a block, and the indices of a weight's axes that remain (``layout.py`` describes the axes)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import Axis, ModelShape


@dataclass(frozen=True)
class Kept:
    """What is kept in one block, as ascending source indices; None keeps everything.

    ``heads`` are query heads. A group is kept if any of its heads is; all kept groups keep the
    same number of heads. No heads: without attention. No FFN channels: without an MLP.
    """

    hidden: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    ffn: tuple[int, ...] | None = None

    def groups(self, shape: ModelShape) -> tuple[int, ...]:
        """Query groups that are kept, ascending; ``shape`` is that of the block (``of_layer``)."""
        if self.heads is None:
            return tuple(range(shape.num_query_groups))
        return tuple(sorted({h // shape.heads_per_group for h in self.heads}))

    def shrink(self, layer: LayerShape) -> LayerShape:
        """What is left of a block of the shape ``layer``."""
        if self.heads is None or not layer.num_attention_heads:
            heads, groups = layer.num_attention_heads, layer.num_query_groups
        else:
            heads, groups = len(self.heads), len({h // layer.heads_per_group for h in self.heads})
        return LayerShape(heads, groups, layer.ffn_hidden_size if self.ffn is None else len(self.ffn))


def axis_indices(axis: Axis, shape: ModelShape, kept: Kept) -> torch.Tensor | None:
    """Indices of ``axis`` that remain under ``kept``, int64; None if all of them do. ``shape`` is that of the block
    (``of_layer``)."""
    d = shape.kv_channels
    if axis == "hidden" and kept.hidden is not None:
        return torch.tensor(kept.hidden, dtype=torch.int64)
    if axis == "ffn" and kept.ffn is not None:
        return torch.tensor(kept.ffn, dtype=torch.int64)
    if axis == "fc1" and kept.ffn is not None:
        channels = torch.tensor(kept.ffn, dtype=torch.int64)  # [F']
        return torch.cat([channels, channels + shape.ffn_hidden_size]) if shape.gated else channels
    if axis == "heads" and kept.heads is not None:
        rows = torch.tensor(kept.heads, dtype=torch.int64)[:, None] * d + torch.arange(d)  # [H', d]
        return rows.flatten()
    if axis == "qkv" and kept.heads is not None:
        slots = []  # a group's block holds heads_per_group + 2 slots of d rows
        for group in kept.groups(shape):
            first = group * (shape.heads_per_group + 2)
            inside = [h % shape.heads_per_group for h in kept.heads if h // shape.heads_per_group == group]
            slots += [first + j for j in inside]
            slots += [first + shape.heads_per_group, first + shape.heads_per_group + 1]  # key, value
        rows = torch.tensor(slots, dtype=torch.int64)[:, None] * d + torch.arange(d)  # [H' + 2G', d]
        return rows.flatten()
    return None


def removed_indices(axis: Axis, shape: ModelShape, layer: int, kept: Kept) -> torch.Tensor:
    """Indices of ``axis``, of attention or MLP of a ``layer`` of the model ``shape``, that do not remain under
    ``kept``, ascending, int64. None of a part that the layer lacks."""
    gone = torch.ones(shape.extents(axis)[layer], dtype=torch.bool)
    if not len(gone) or (remain := axis_indices(axis, shape.of_layer(layer), kept)) is None:
        return torch.zeros(0, dtype=torch.int64)
    gone[remain] = False
    return gone.nonzero().flatten()
