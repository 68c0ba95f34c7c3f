"""Mistral: a Llama with an attention window and without biases."""

from __future__ import annotations

from megatron_prune.convert.families.model_family import ModelFamily, window_entries, window_in_all_layers

FAMILY = ModelFamily(
    kind="mistral",
    architecture="MistralForCausalLM",
    chosen=frozenset({"window_size"}),
    arguments=window_in_all_layers,
    entries=window_entries,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
