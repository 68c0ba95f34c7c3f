"""Phi-3 and Phi-4: a Llama with fused projections, a window, and in some models a part of each head rotated."""

from __future__ import annotations

from megatron_prune.convert.families.model_family import ModelFamily, window_entries, window_in_all_layers

FAMILY = ModelFamily(
    kind="phi3",
    architecture="Phi3ForCausalLM",
    chosen=frozenset({"window_size", "rotary_percent"}),
    arguments=window_in_all_layers,
    entries=window_entries,
    qkv=("model.layers.{}.self_attn.qkv_proj",),
    fc1=("model.layers.{}.mlp.gate_up_proj",),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
