"""Llama: RMSNorm, gated MLP, RoPE over whole heads, grouped queries."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily
from megatron_prune.errors import CheckpointError


def _arguments(values: Config) -> dict[str, Any]:
    attention, mlp = (bool(values.get(key, False)) for key in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise CheckpointError(
            f"config.json has attention_bias={attention} and mlp_bias={mlp}, but Megatron has one switch for both"
        )
    return {"add_bias_linear": attention}


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    return {"attention_bias": shape.linear_bias, "mlp_bias": shape.linear_bias}


FAMILY = ModelFamily(
    kind="llama",
    architecture="LlamaForCausalLM",
    chosen=frozenset({"add_bias_linear"}),
    arguments=_arguments,
    entries=_entries,
    defaults={"max_position_embeddings": 2048},
    not_divided=False,  # transformers 5 refuses such a Llama
)
