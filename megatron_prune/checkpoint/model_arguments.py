"""Stored arguments that change what a model computes but that are not restored when Megatron builds it again.

``--use-checkpoint-args`` restores some of a model's arguments; this package restores more (``FORGOTTEN``). A
checkpoint trained with any other, such as ``--window-size``, would silently run as a different model.
``megatron_arguments.json`` holds every argument of Megatron's model and transformer configuration with its parser
default. The lists below name those that are restored and those that do not affect the function. All others must have
their default, or be given on the command line with their stored value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.layer_shapes import ENCODED, PATH
from megatron_prune.errors import CheckpointError

# Stored arguments that describe the model but that `--use-checkpoint-args` does not restore,
# with the flags that set them.
FORGOTTEN = {
    "use_rope_scaling": ("--use-rope-scaling",),
    "rope_scaling_factor": ("--rope-scaling-factor",),
    "layernorm_epsilon": ("--norm-epsilon", "--layernorm-epsilon"),
    "init_method_std": ("--init-method-std",),
    "embedding_init_method_std": ("--embedding-init-method-std",),
    "make_vocab_size_divisible_by": ("--make-vocab-size-divisible-by",),
    "vocab_size": ("--vocab-size",),
    "qk_layernorm": ("--qk-layernorm",),
    "parallel_residual": ("--parallel-residual",),  # of this package: engine/parallel_residual.py
    "layernorm_zero_centered_gamma": ("--apply-layernorm-1p",),
    "bias_gelu_fusion": ("--no-bias-gelu-fusion",),  # the fused GELU is the tanh approximation: another function
    "window_size": ("--window-size",),
    "window_attn_skip_freq": ("--window-attn-skip-freq",),
    "no_rope_freq": ("--no-rope-freq",),
    "rotary_seq_len_interpolation_factor": ("--rotary-seq-len-interpolation-factor",),
    "rotary_scaling_factor": ("--rotary-scaling-factor",),
    "mscale": ("--mscale",),
    "mscale_all_dim": ("--mscale-all-dim",),
    "yarn_original_max_position_embeddings": ("--yarn-original-max-position-embeddings",),
    "yarn_beta_fast": ("--yarn-beta-fast",),
    "yarn_beta_slow": ("--yarn-beta-slow",),
    "yarn_correction_range_round_to_int": (
        "--yarn-correction-range-round-to-int",
        "--no-yarn-correction-range-round-to-int",
    ),
}

OF_YARN = frozenset(
    {"rotary_scaling_factor", "mscale", "mscale_all_dim", *(n for n in FORGOTTEN if n.startswith("yarn_"))}
)
# Names under which earlier versions of Megatron stored an argument.
EARLIER_NAMES = {"layernorm_zero_centered_gamma": "apply_layernorm_1p"}


def stored_argument(args: Mapping[str, Any], name: str) -> Any:
    """A stored argument, under its name or its earlier one; None if there is none."""
    found = args.get(name)
    return args.get(EARLIER_NAMES[name]) if found is None and name in EARLIER_NAMES else found


# Arguments that hold a pattern over layers, and the value that Megatron's frequency N gives every N-th layer.
BY_LAYER = {"no_rope_freq": 1, "window_attn_skip_freq": 0}


def by_layer(name: str, pattern: Any, layers: int) -> list[int] | None:
    """The pattern ``name`` of ``BY_LAYER`` as one 0 or 1 per layer; None if there is none."""
    if not pattern or isinstance(pattern, list):
        return pattern or None
    every = BY_LAYER[name]
    return [every if (layer + 1) % pattern == 0 else 1 - every for layer in range(layers)]


# Restored by Megatron's load_args_from_checkpoint or derived from what it restores.
_RESTORED = frozenset(
    (
        *FORGOTTEN,
        *"num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention".split(),
        *"kv_channels max_position_embeddings position_embedding_type add_position_embedding rotary_base".split(),
        *"use_rotary_position_embeddings rotary_percent rotary_interleaved add_bias_linear add_qkv_bias".split(),
        *"squared_relu swiglu untie_embeddings_and_output_weights normalization encoder_num_layers".split(),
        *"apply_query_key_layer_scaling attention_dropout hidden_dropout".split(),
        *"heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json".split(),
    )
)
# ModelShape refuses models that switch these on; while off, their settings do not matter.
_OF_OTHER_MODELS = (
    *("num_experts", "moe_", "use_grouped_gemm_for_shared_expert"),  # experts
    *("mtp_",),  # multi-token prediction
    *("is_hybrid_model", "mamba_", "use_mamba_mem_eff_path", "mlp_chunks_for_"),  # state-space layers
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("rotary_scaling_factor", "mscale", "cache_mla_latents", "mla_down_proj_fusion", "rope_type"),
)
# Settings of attention variants; their switch (experimental_attention_variant) is compared.
_OF_VARIANTS = ("dsa_", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_")
# How a run computes the same function: parallelism, precision, kernels, memory.
_OF_THE_RUN = (
    *("tensor_", "pipeline_", "context_", "expert_", "hierarchical_context", "sequence_parallel", "max_seqlen_per_dp"),
    *("tp_comm_", "overlap_", "delay_wgrad", "ep_overlap", "use_ring_exchange", "defer_embedding", "wgrad_deferral"),
    *("microbatch_group", "account_for_", "high_priority_a2a", "hybrid_context_parallel", "use_cpu_initialization"),
    *(
        "cpu_offloading",
        "recompute_",
        "distribute_saved",
        "fine_grained_",
        "offload_",
        "min_offloaded",
        "delay_offload",
    ),
    *("delta_offload", "activation_offload", "clone_scatter", "init_model_with_meta", "perform_initialization"),
    *("fp16", "bf16", "fp8", "fp4", "first_last_layers_bf16", "num_layers_at_", "deterministic_mode", "te_precision"),
    *("disable_bf16_reduced", "fp32_residual_connection", "attention_softmax_in_fp32"),
    *("attention_backend", "flash_", "transformer_impl", "use_transformer_engine_op_fuser", "use_te_activation_func"),
    *("cross_entropy_", "use_fused_weighted", "fused_residual", "use_grouped_gemm_for_dense_mlp", "batch_invariant"),
    *("masked_softmax_fusion", "bias_", "apply_rope_fusion", "gradient_accumulation_fusion", "enable_cuda_graph"),
    *("cuda_graph", "external_cuda_graph", "inference_", "symmetric_ar", "config_logger_dir", "enable_experimental"),
    *("calculate_per_token_loss", "qk_clip", "use_precision_aware", "main_grads", "main_params", "exp_avg"),
    *("megatron_fsdp_", "fsdp_", "yaml_cfg", "kitchen_", "use_kitchen", "cp_comm_type", "nccl_all_reduce_for_prefill"),
    *("barrier_with_L1_time", "log_max_attention_logit", "onnx_safe", "test_mode", "bert_", "decoder_num_layers"),
)
_CANNOT_MATTER = (*_OF_OTHER_MODELS, *_OF_VARIANTS, *_OF_THE_RUN)


# Flags that may differ from the checkpoint's, because the stored model computes the same with any value of them.
FREE = {
    "attention_dropout": "acts in training only",
    "hidden_dropout": "acts in training only",
    "init_method_std": "draws weights; those of a checkpoint are drawn",
    "embedding_init_method_std": "draws weights; those of a checkpoint are drawn",
    "make_vocab_size_divisible_by": "pads the vocabulary, and padding has no probability",
    "max_position_embeddings": "bounds the sequence; where it is the size of a weight, the weight's shape is compared",
    "apply_query_key_layer_scaling": "computes the same function in other steps",
    "vocab_size": "says which embeddings are words, where a checkpoint does not know; it must fit the embedding",
}


def of_the_function() -> dict[str, Any]:
    """Every argument that says what a model computes, with Megatron's default (None: no common one). A flag beside a
    checkpoint must agree with it."""
    names = (*compared(), *sorted(_RESTORED - FREE.keys()))
    return {name: False if name == "parallel_residual" else known().get(name) for name in names}


_ABSENT = "no such flag"


def differing_value(stored: Mapping[str, Any], name: str, given: Any) -> Any:
    """The checkpoint's value of an argument of the function if the value ``given`` asks for another function; else
    None. ``stored`` are the checkpoint's arguments."""
    value = stored_argument(stored, name)
    value = of_the_function()[name] if value is None else value
    position = stored.get("position_embedding_type", known()["position_embedding_type"])
    if name in BY_LAYER:
        layers = stored.get("num_layers") or 0
        everywhere = [1 - BY_LAYER[name]] * layers  # as without a pattern
        same = (by_layer(name, value, layers) or everywhere) == (by_layer(name, given, layers) or everywhere)
    elif name in (PATH, ENCODED):
        value = "the layers that it stores" if stored.get(ENCODED) else None
        same = value is not None and _layers(name, given) == _layers(ENCODED, stored[ENCODED])
    elif name == "num_query_groups" and not stored.get("group_query_attention"):
        same = given in (value, stored.get("num_attention_heads"))
    elif name == "use_rotary_position_embeddings":  # an earlier form of --position-embedding-type
        value, same = position, value or position == "rope"
    elif name == "add_position_embedding":  # the same
        value, same = position, not value or position != "learned_absolute"
    else:
        same = _plain(value) == _plain(given) or (value is None and name not in known())
    if same:
        return None
    return _ABSENT if value is None or value is False else value


def _layers(name: str, given: str) -> Any:
    """The configuration of layers in a file or a text; None if it cannot be read."""
    try:
        return json.loads(Path(given).read_text() if name == PATH else given)
    except (OSError, ValueError):
        return None


def refuse_unrestored(stored: Mapping[str, Any], origin: str, effective: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError for a stored argument without which the model would compute something else.

    ``effective`` are the arguments that the model is built with; an argument that has the stored value there is
    accepted. Without ``effective``, every value other than Megatron's default is refused.
    """
    for name, default in compared().items():
        value = _plain(stored.get(name, default))
        if value in (default, None) or (effective is not None and _plain(effective.get(name)) == value):
            continue
        remedy = f"; pass --{name.replace('_', '-')} if Megatron has that flag" if effective is not None else ""
        raise CheckpointError(
            f"{origin} was trained with {name}={value!r}, but Megatron's default is {default!r}. It is not restored "
            f"automatically, and without it the model computes something else{remedy}"
        )


@cache
def known() -> dict[str, Any]:
    """Every argument of Megatron's model, with its parser default."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("megatron_arguments.json").read_text())
    return found


@cache
def compared() -> dict[str, Any]:
    """The model arguments that must have their default, and that default."""
    return {name: default for name, default in known().items() if not _excused(name)}


def restored(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say what the model of ``stored`` computes: as stored, or else Megatron's default."""
    found = {name: known()[name] for name in (*compared(), *sorted(_RESTORED)) if name in known()}
    said = {name: stored_argument(stored, name) for name in (*found, *_RESTORED)}
    found["parallel_residual"] = False  # of this package
    return found | {name: value for name, value in said.items() if value is not None}


def _excused(name: str) -> bool:
    return name in _RESTORED or name.startswith(_CANNOT_MATTER)


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
