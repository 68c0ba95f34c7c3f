"""Phi-3 and Phi-4: a Llama with fused projections, a window, and in some models a part of each head rotated."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily, window_entries, windows


def _arguments(values: Config) -> dict[str, Any]:
    return {**windows(values), "window_attn_skip_freq": None}


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    return window_entries(args, original)


FAMILY = ModelFamily(
    kind="phi3",
    architecture="Phi3ForCausalLM",
    chosen=frozenset({"window_size", "rotary_percent"}),
    arguments=_arguments,
    entries=_entries,
    qkv=("model.layers.{}.self_attn.qkv_proj",),
    fc1=("model.layers.{}.mlp.gate_up_proj",),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
