"""Qwen3: a Llama with norms on queries and keys, a head size of its own, and a window in some layers."""

from __future__ import annotations

from megatron_prune.convert.families.model_family import ModelFamily
from megatron_prune.convert.families.qwen2 import read_windows, written_windows

FAMILY = ModelFamily(
    kind="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={"qk_layernorm": True},
    chosen=frozenset({"window_size", "window_attn_skip_freq"}),
    arguments=read_windows,
    entries=written_windows,
    only={"attention_bias": False},
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
)
