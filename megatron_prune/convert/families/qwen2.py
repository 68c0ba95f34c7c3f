"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values, and a window in some layers."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily, window_entries, windows


def read_windows(values: Config) -> dict[str, Any]:
    """Windows of Qwen models: none without ``use_sliding_window``; by default in layers from ``max_window_layers``."""
    if not values.get("use_sliding_window", False):
        return {"window_size": None, "window_attn_skip_freq": None}
    first = values.get("max_window_layers", 28)
    types = [f"{'sliding' if layer >= first else 'full'}_attention" for layer in range(values["num_hidden_layers"])]
    return windows({**values, "layer_types": values.get("layer_types") or types})


def written_windows(args: Args, original: Config) -> dict[str, Any]:
    """The inverse of ``read_windows``."""
    used = args.get("window_size") is not None
    entries = {**window_entries(args, original), "use_sliding_window": used}
    if used:
        entries.setdefault("layer_types", ["sliding_attention"] * args["num_layers"])
    else:
        entries["layer_types"] = ["full_attention"] * args["num_layers"]
    return entries


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    return written_windows(args, original)


FAMILY = ModelFamily(
    kind="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={"add_qkv_bias": True},
    chosen=frozenset({"window_size", "window_attn_skip_freq"}),
    arguments=read_windows,
    entries=_entries,
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
)
