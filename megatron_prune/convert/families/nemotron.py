"""Nemotron and Minitron: LayerNorm with gains around zero, squared ReLU without gate, half of each head rotated."""

from __future__ import annotations

from megatron_prune.convert.families.model_family import ModelFamily

FAMILY = ModelFamily(
    kind="nemotron",
    architecture="NemotronForCausalLM",
    fixed={
        "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "swiglu": False, "squared_relu": True,
        "bias_gelu_fusion": False,  # Megatron would look for a fused kernel of the other activation
    },
    chosen=frozenset({"rotary_percent"}),
    fc1=("model.layers.{}.mlp.up_proj",),
    keys={"rms_norm_eps": "norm_eps"},
    only={"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    defaults={
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
        "initializer_range": 0.0134,
    },
)  # fmt: skip
