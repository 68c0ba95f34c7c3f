"""The sizes of one layer, and how a checkpoint stores those of all layers if they differ.

Megatron builds layers of different shape from ``--heterogeneous-layers-config-path`` and keeps that file's JSON in
``heterogeneous_layers_config_encoded_json``: the ``block_configs`` of the published Llama-Nemotron models. Per layer
these give the FFN size, the number of query groups, or say that attention or MLP is left out (``no_op``). They cannot
say that layers have different numbers of heads: for that, ``attention`` has one more entry here,
``num_attention_heads``, which unmodified Megatron ignores, and then refuses the weights for their shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import show

PATH, ENCODED = "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"
# Megatron reads a file only if its content is not stored, but wants its name.
FILE = "heterogeneous_layers.json"
_MOST_HEADS, _MOST_FFN, _MOST_CHARACTERS = 1 << 14, 1 << 24, 16 << 20
# What Megatron's check of arguments demands of models whose layers differ.
_ONLY = {"swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_percent": 1.0,
         "use_rope_scaling": True}  # fmt: skip
IN_WORDS = {
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
    "ffn_hidden_size": "FFN channels",
}
_NEMOTRON_MULTIPLE = 256  # of an FFN size that is given as `ffn_mult`


@dataclass(frozen=True)
class LayerShape:
    """The sizes in which layers may differ, global. No heads and groups: no attention. No FFN channels: no MLP."""

    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int

    def __post_init__(self) -> None:
        for name, most in (
            ("num_attention_heads", _MOST_HEADS), ("num_query_groups", _MOST_HEADS), ("ffn_hidden_size", _MOST_FFN)
        ):  # fmt: skip
            size = getattr(self, name)
            if type(size) is not int or not 0 <= size <= most:
                raise CheckpointError(f"{name} of a layer: expected at least 0 and at most {most}, got {show(size)}")
        heads, groups = self.num_attention_heads, self.num_query_groups
        if bool(heads) != bool(groups) or (groups and heads % groups):
            raise CheckpointError(
                f"num_attention_heads of a layer: expected a multiple of its {groups} query groups, got {heads}"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads of each group; 0 without attention."""
        return self.num_attention_heads // self.num_query_groups if self.num_query_groups else 0

    def unshared(self, ranks: int) -> dict[str, int]:
        """Its sizes that so many tensor-parallel ranks cannot divide among them, by name. Several ranks may share a
        query group."""
        sizes = {"num_attention_heads": self.num_attention_heads, "ffn_hidden_size": self.ffn_hidden_size}
        if not self.num_query_groups or ranks % self.num_query_groups:
            sizes["num_query_groups"] = self.num_query_groups
        return {name: size for name, size in sizes.items() if size % ranks}

    def has(self, suffix: str) -> bool:
        """True unless what has this name inside a layer belongs to a part that the layer lacks."""
        return bool(self.num_attention_heads if suffix.startswith("self_attention.") else self.ffn_hidden_size)


def encode(layers: Sequence[LayerShape], whole: Mapping[str, Any]) -> str:
    """The JSON for Megatron: ``whole`` are the entries about the whole model, of which ``num_attention_heads`` counts
    for the layers that do not say it."""
    heads = whole["num_attention_heads"]
    return json.dumps({**whole, "block_configs": [_block(layer, heads) for layer in layers]})


def canonical(args: Mapping[str, Any]) -> dict[str, Any]:
    """What ``args`` say of layers that differ, as two arguments that are the same for every model of that shape, with
    the entries that Megatron compares to its other arguments; nothing if layers do not differ."""
    if not args.get(ENCODED):
        return {}
    heads, hidden, count = (args[name] for name in ("num_attention_heads", "hidden_size", "num_layers"))
    scaling = {"factor": args.get("rope_scaling_factor") or 8.0} if args.get("use_rope_scaling") else None
    whole = {
        "hidden_act": "silu",
        "num_hidden_layers": count,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "rope_theta": args.get("rotary_base", 10_000),
        "rope_scaling": scaling,
    }
    layers = decode(args[ENCODED], heads=heads, hidden=hidden, count=count)
    return {PATH: FILE, ENCODED: encode(layers, whole)}


def unreadable(args: Mapping[str, Any]) -> str | None:
    """Why unmodified Megatron cannot build a model whose layers differ; None if it can, or if they do not."""
    if not args.get(ENCODED):
        return None
    blocks = json.loads(args[ENCODED])["block_configs"]
    if any("num_attention_heads" in block["attention"] for block in blocks):
        return "layers with different numbers of heads"
    per_group = {block["attention"].get("n_heads_in_group") for block in blocks} - {None}
    if len(per_group) > 1:
        return "layers with different numbers of heads per query group"
    for name, only in _ONLY.items():
        if args.get(name) != only:
            return f"layers that differ in a model with {name}={show(args.get(name))} (it takes {only} alone)"
    return None


def _block(layer: LayerShape, heads: int) -> dict[str, Any]:
    given: dict[str, int | None] = {"n_heads_in_group": None, "num_query_groups": None}
    if layer.num_attention_heads:
        given = {"n_heads_in_group": layer.heads_per_group, "num_query_groups": layer.num_query_groups}
    own = {} if layer.num_attention_heads in (0, heads) else {"num_attention_heads": layer.num_attention_heads}
    return {
        "attention": {**given, **own, "no_op": not layer.num_attention_heads, "replace_with_linear": False},
        "ffn": {
            "ffn_mult": None,
            "ffn_hidden_size": layer.ffn_hidden_size or None,
            "no_op": not layer.ffn_hidden_size,
            "replace_with_linear": False,
        },
    }


def decode(encoded: Any, *, heads: int, hidden: int, count: int) -> tuple[LayerShape, ...]:
    """The shapes of ``count`` layers from the JSON in stored arguments, Megatron's or this package's.

    ``heads`` are those of layers that do not say it, ``hidden`` is the hidden size, to which ``ffn_mult`` refers.
    CheckpointError for what is not such JSON, and for layers that this package does not support.
    """
    if not isinstance(encoded, str) or len(encoded) > _MOST_CHARACTERS:
        raise CheckpointError(f"{ENCODED}: expected JSON, got {show(encoded)}")
    try:
        blocks = json.loads(encoded)["block_configs"]
        if not isinstance(blocks, list) or len(blocks) != count:
            raise ValueError(f"expected {count} layers, got {len(blocks)}")
        return tuple(_layer(block, number, heads, hidden) for number, block in enumerate(blocks))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{ENCODED}: expected a list of layers in block_configs, got other JSON: {error}"
        ) from error


def _layer(block: Any, number: int, heads: int, hidden: int) -> LayerShape:
    attention, mlp = block["attention"], block.get("ffn") or block["mlp"]
    for part, name in ((attention, "attention"), (mlp, "the MLP")):
        if part.get("replace_with_linear"):
            raise CheckpointError(
                f"{ENCODED}: layer {number}: expected {name} or nothing in its place, got a linear layer in its place, "
                "which is not supported"
            )
        if any(part.get(name) for name in ("sparsify", "window_length", "num_sink_tokens")):
            raise CheckpointError(f"{ENCODED}: layer {number}: expected {name} over all tokens, got a window or sinks")
    own, groups, ffn = 0, 0, 0
    if not attention.get("no_op"):
        own = attention.get("num_attention_heads", heads)
        groups = attention.get("num_query_groups")
        if groups is None:
            groups, rest = divmod(own, attention["n_heads_in_group"])
            if rest:
                raise ValueError(f"layer {number} has {own} heads in groups of {attention['n_heads_in_group']}")
    if not mlp.get("no_op"):
        ffn = mlp.get("ffn_hidden_size") or mlp.get("intermediate_size")
        if ffn is None:
            ffn = -(-int(2 * mlp["ffn_mult"] * hidden / 3) // _NEMOTRON_MULTIPLE) * _NEMOTRON_MULTIPLE
    return LayerShape(own, groups, ffn)
