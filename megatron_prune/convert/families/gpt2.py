"""GPT-2: LayerNorm, biases, an MLP without gate (GELU by tanh), learned positions; matrices stored [in, out]."""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily, gelu, gelu_entry


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    activation = gelu_entry(args, original.get("activation_function", "gelu_new"))
    return {"hidden_act": activation, "n_ctx": shape.positions}


FAMILY = ModelFamily(
    kind="gpt2",
    architecture="GPT2LMHeadModel",
    fixed={
        "normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
    },
    chosen=frozenset({"bias_gelu_fusion"}),
    arguments=gelu,
    entries=_entries,
    names={
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "self_attention.linear_qkv.layer_norm": "transformer.h.{}.ln_1",
        "self_attention.linear_proj": "transformer.h.{}.attn.c_proj",
        "mlp.linear_fc1.layer_norm": "transformer.h.{}.ln_2",
        "mlp.linear_fc2": "transformer.h.{}.mlp.c_proj",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
    },
    qkv=("transformer.h.{}.attn.c_attn",),
    fc1=("transformer.h.{}.mlp.c_fc",),
    transposed=True,
    other_names={"h.": "transformer.h.", "wte.": "transformer.wte.", "wpe.": "transformer.wpe.",
                 "ln_f.": "transformer.ln_f."},
    keys={
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    only={
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "reorder_and_upcast_attn": False,
    },
    defaults={
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 1024,
        "vocab_size": 50257, "intermediate_size": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "hidden_act": "gelu_new",
    },
    grouped=False,
    head_size=False,
    not_divided=False,
)  # fmt: skip
