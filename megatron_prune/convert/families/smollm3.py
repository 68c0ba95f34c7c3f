"""SmolLM3: a Llama in which every fourth layer has no position embedding."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.model_arguments import by_layer
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily, count
from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import show


def _arguments(values: Config) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    every = count(values, "no_rope_layer_interval", 4, least=1)
    rotated = values.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) != layers or any(one not in (0, 1) for one in rotated):
        raise CheckpointError(f"config.json has no_rope_layers={show(rotated)}, expected {layers} zeros and ones")
    return {"no_rope_freq": None if all(rotated) else [1 - one for one in rotated]}  # Megatron's 1: no RoPE


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    skipped = by_layer("no_rope_freq", args.get("no_rope_freq"), shape.num_layers)
    return {
        "no_rope_layers": [1] * shape.num_layers if skipped is None else [1 - one for one in skipped],
        "layer_types": ["full_attention"] * shape.num_layers,
    }


FAMILY = ModelFamily(
    kind="smollm3",
    architecture="SmolLM3ForCausalLM",
    chosen=frozenset({"no_rope_freq"}),
    arguments=_arguments,
    entries=_entries,
    only={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
    },  # fmt: skip
)
