"""Mistral: a Llama with an attention window and without biases."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily, window_entries, windows


def _arguments(values: Config) -> dict[str, Any]:
    return {**windows(values), "window_attn_skip_freq": None}


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    return window_entries(args, original)


FAMILY = ModelFamily(
    kind="mistral",
    architecture="MistralForCausalLM",
    chosen=frozenset({"window_size"}),
    arguments=_arguments,
    entries=_entries,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
