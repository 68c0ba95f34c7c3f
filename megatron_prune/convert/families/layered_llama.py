"""Llamas whose layers differ: in the form of the published Llama-Nemotron models, or with a modeling file of our own.

``nemotron-nas`` (Llama-Nemotron, DeciLM) can say that layers have other FFN sizes, in multiples of 256, another number
of query groups for the same heads, or no attention or MLP. Layers with other numbers of heads, or other FFN sizes, are
beyond it: ``layered-llama`` has these too. transformers knows neither, so both are exported with
``modeling_layered_llama.py``, which it loads with ``trust_remote_code``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.layer_shapes import ENCODED, LayerShape, decode
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families import llama
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily

MODELING = Path(__file__).parents[1] / "modeling_layered_llama.py"


def _arguments(values: Config) -> dict[str, Any]:
    return llama.FAMILY.arguments(values) | {ENCODED: json.dumps({"block_configs": values.get("block_configs")})}


def _entries(block: Callable[[LayerShape, int, int], dict[str, Any]], config: str, model: str) -> Any:
    def entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
        heads, hidden = shape.num_attention_heads, shape.hidden_size
        return {
            **llama.FAMILY.entries(args, shape, original),
            "block_configs": [block(layer, heads, hidden) for layer in shape.by_layer()],
            "auto_map": {"AutoConfig": f"{MODELING.stem}.{config}", "AutoModelForCausalLM": f"{MODELING.stem}.{model}"},
        }

    return entries


def _own_block(layer: LayerShape, heads: int, hidden: int) -> dict[str, Any]:
    block: dict[str, Any] = {"attention": {"no_op": True}, "ffn": {"no_op": True}}
    if layer.num_attention_heads:
        block["attention"] = {"no_op": False, "n_heads_in_group": layer.heads_per_group}
        if layer.num_attention_heads != heads:
            block["attention"]["num_attention_heads"] = layer.num_attention_heads
    if layer.ffn_hidden_size:
        block["ffn"] = {"no_op": False, "intermediate_size": layer.ffn_hidden_size}
    return block


def _published_block(layer: LayerShape, heads: int, hidden: int) -> dict[str, Any]:
    return {
        "attention": {
            "n_heads_in_group": layer.heads_per_group or None,
            "no_op": not layer.num_attention_heads,
            "replace_with_linear": False,
        },
        "ffn": {
            "ffn_mult": 3 * layer.ffn_hidden_size / (2 * hidden) if layer.ffn_hidden_size else None,
            "no_op": not layer.ffn_hidden_size,
            "replace_with_linear": False,
        },
    }


def _unpublished(shape: ModelShape) -> str | None:
    """Why the published form cannot say these layers; None if it can."""
    heads, hidden, layers = shape.num_attention_heads, shape.hidden_size, shape.by_layer()
    encoded = json.dumps({"block_configs": [_published_block(layer, heads, hidden) for layer in layers]})
    if decode(encoded, heads=heads, hidden=hidden, count=len(layers)) != layers:
        return "its layers have different numbers of heads, or FFN sizes that are no multiples of 256"
    return None


def _family(kind: str, model: str, config: str, block: Any, unsaid: Any) -> ModelFamily:
    return ModelFamily(
        kind=kind,
        architecture=model,
        chosen=llama.FAMILY.chosen,
        arguments=_arguments,
        entries=_entries(block, config, model),
        defaults={**llama.FAMILY.defaults, "intermediate_size": 1},  # block_configs say it
        unsaid=unsaid,
    )


PUBLISHED = _family("nemotron-nas", "DeciLMForCausalLM", "NemotronNasConfig", _published_block, _unpublished)
FAMILY = _family("layered-llama", "LayeredLlamaForCausalLM", "LayeredLlamaConfig", _own_block, lambda shape: None)
