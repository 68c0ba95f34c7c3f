"""StarCoder2: LayerNorm, biases, an MLP without gate (GELU by tanh), RoPE, grouped queries, a window."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import (
    DECODER_NAMES,
    Args,
    Config,
    ModelFamily,
    gelu,
    gelu_entry,
    window_entries,
    window_in_all_layers,
)


def _arguments(values: Config) -> dict[str, Any]:
    return {**window_in_all_layers(values), **gelu(values)}


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    activation = gelu_entry(args, original.get("hidden_act", "gelu_pytorch_tanh"))
    return {**window_entries(args, shape, original), "hidden_act": activation}


FAMILY = ModelFamily(
    kind="starcoder2",
    architecture="Starcoder2ForCausalLM",
    fixed={"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True},
    chosen=frozenset({"window_size", "bias_gelu_fusion"}),
    arguments=_arguments,
    entries=_entries,
    names=DECODER_NAMES | {"mlp.linear_fc2": "model.layers.{}.mlp.c_proj"},
    fc1=("model.layers.{}.mlp.c_fc",),
    keys={"rms_norm_eps": "norm_epsilon"},
    only={"use_bias": True},
    defaults={
        "max_position_embeddings": 4096, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "initializer_range": 0.018042, "sliding_window": None, "hidden_act": "gelu_pytorch_tanh",
    },
)  # fmt: skip
