"""Qwen3: a Llama with norms on queries and keys, a head size of its own, and a window in some layers."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily
from megatron_prune.convert.families.qwen2 import read_windows, written_windows


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    return written_windows(args, original)


FAMILY = ModelFamily(
    kind="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={"qk_layernorm": True},
    chosen=frozenset({"window_size", "window_attn_skip_freq"}),
    arguments=read_windows,
    entries=_entries,
    only={"attention_bias": False},
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
)
