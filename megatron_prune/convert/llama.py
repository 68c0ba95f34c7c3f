"""The mapping between rows of Megatron weights and rows of Hugging Face tensors, for the Llama family.

``segments`` maps one weight, ``rows_of_tensors`` inverts the mapping for a whole model. Weights and masks share it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_prune.checkpoint.layout import ModelShape, WeightLayout

_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "self_attention.linear_qkv.layer_norm_weight": "model.layers.{}.input_layernorm.weight",
    "self_attention.linear_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "model.layers.{}.post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "model.layers.{}.mlp.down_proj.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_QUERY, _KEY, _VALUE = (f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv")
_GATE, _UP = (f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up"))


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a Megatron weight: rows [start, stop) of a Hugging Face tensor (None: padding)."""

    name: str | None
    start: int
    stop: int


def segments(layout: WeightLayout, shape: ModelShape, vocabulary_size: int) -> list[Segment]:
    """The segments of a Megatron weight, from its first row to its last."""
    if layout.axes[0] == "qkv":
        query, key, value = (name.format(layout.layer) for name in (_QUERY, _KEY, _VALUE))
        d, per_group = shape.kv_channels, shape.heads_per_group * shape.kv_channels
        return [
            segment
            for g in range(shape.num_query_groups)
            for segment in (
                Segment(query, g * per_group, (g + 1) * per_group),
                Segment(key, g * d, (g + 1) * d),
                Segment(value, g * d, (g + 1) * d),
            )
        ]
    if layout.axes[0] == "fc1":
        rows = shape.ffn_hidden_size
        return [Segment(name.format(layout.layer), 0, rows) for name in (_GATE, _UP)]
    name = _NAMES[layout.suffix].format(layout.layer)
    if layout.axes[0] == "vocab":
        padding = layout.shape[0] - vocabulary_size
        return [Segment(name, 0, vocabulary_size), *([Segment(None, 0, padding)] if padding else [])]
    return [Segment(name, 0, layout.shape[0])]


def rows_of_tensors(
    layouts: Iterable[WeightLayout], shape: ModelShape, vocabulary_size: int
) -> dict[str, list[tuple[Segment, str, int]]]:
    """The inverse of ``segments``: for every Hugging Face tensor of ``layouts``, its segments in ascending row order,
    each with the Megatron weight that holds it and its first row there."""
    made_of: dict[str, list[tuple[Segment, str, int]]] = defaultdict(list)
    for layout in layouts:
        row = 0
        for segment in segments(layout, shape, vocabulary_size):
            if segment.name is not None:
                made_of[segment.name].append((segment, layout.name, row))
            row += segment.stop - segment.start
    return made_of
