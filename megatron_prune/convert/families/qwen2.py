"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values, and a window in some layers."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily, count, window_entries, windows


def read_windows(values: Config) -> dict[str, Any]:
    """Windows of Qwen models: none without ``use_sliding_window``; by default in layers from ``max_window_layers``."""
    if not values.get("use_sliding_window", False):
        return {"window_size": None, "window_attn_skip_freq": None}
    first = count(values, "max_window_layers", 28, least=0)
    types = [f"{'sliding' if layer >= first else 'full'}_attention" for layer in range(values["num_hidden_layers"])]
    return windows({**values, "layer_types": values.get("layer_types") or types})


def written_windows(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    """The inverse of ``read_windows``."""
    used = args.get("window_size") is not None
    everywhere = [f"{'sliding' if used else 'full'}_attention"] * shape.num_layers
    return {"layer_types": everywhere, **window_entries(args, shape, original), "use_sliding_window": used}


FAMILY = ModelFamily(
    kind="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={"add_qkv_bias": True},
    chosen=frozenset({"window_size", "window_attn_skip_freq"}),
    arguments=read_windows,
    entries=written_windows,
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
)
