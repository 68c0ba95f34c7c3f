"""GPT-NeoX and Pythia: LayerNorm, biases, exact GELU, part of each head rotated.

Pythia and GPT-NeoX-20B add attention and MLP to the same input (``use_parallel_residual``): this package's
``parallel_residual``, which Megatron itself does not have.
"""

from __future__ import annotations

from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import Args, Config, ModelFamily, gelu, gelu_entry
from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import show


def _arguments(values: Config) -> dict[str, Any]:
    parallel = values.get("use_parallel_residual", True)
    if type(parallel) is not bool:
        raise CheckpointError(f"config.json has use_parallel_residual={show(parallel)}, expected true or false")
    return {"parallel_residual": parallel, **gelu(values)}


def _entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    return {
        "hidden_act": gelu_entry(args, original.get("hidden_act", "gelu")),
        "use_parallel_residual": bool(args.get("parallel_residual")),
    }


FAMILY = ModelFamily(
    kind="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fixed={"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True},
    chosen=frozenset({"rotary_percent", "bias_gelu_fusion", "parallel_residual"}),
    arguments=_arguments,
    entries=_entries,
    names={
        "embedding.word_embeddings": "gpt_neox.embed_in",
        "self_attention.linear_qkv.layer_norm": "gpt_neox.layers.{}.input_layernorm",
        "self_attention.linear_proj": "gpt_neox.layers.{}.attention.dense",
        "mlp.linear_fc1.layer_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "mlp.linear_fc2": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "decoder.final_layernorm": "gpt_neox.final_layer_norm",
        "output_layer": "embed_out",
    },
    qkv=("gpt_neox.layers.{}.attention.query_key_value",),
    fc1=("gpt_neox.layers.{}.mlp.dense_h_to_4h",),
    qkv_per_head=True,
    other_names={"lm_head.": "embed_out."},
    keys={
        "rms_norm_eps": "layer_norm_eps", "partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base",
    },
    only={"attention_bias": True},
    defaults={
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25,
        "hidden_act": "gelu",
    },
    grouped=False,
    head_size=False,
    not_divided=False,
)  # fmt: skip
