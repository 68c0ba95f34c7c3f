"""Hugging Face ``config.json`` of the Llama family ⇄ Megatron arguments.

``args_from_config`` and ``config_from_args`` are inverses on the models that both formats can express;
anything else raises CheckpointError. RoPE is read in the form of transformers 4 (``rope_theta``,
``rope_scaling``) and 5 (``rope_parameters``), and written in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.layout import ModelShape, vocabulary
from megatron_prune.errors import CheckpointError, UsageError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# transformers' defaults for keys missing from config.json.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
_LARGEST = 1 << 31
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Fixed in Megatron's RoPE scaling, which only lets the factor be chosen.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Megatron arguments of a Llama-family model: (required value, value assumed if absent).
_REQUIRED: dict[str, tuple[Any, Any]] = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "swiglu": (True, False),
    "add_bias_linear": (False, True),
    "add_qkv_bias": (False, False),
    "qk_layernorm": (False, False),
    "apply_layernorm_1p": (False, False),
    "position_embedding_type": ("rope", "learned_absolute"),
    "rotary_percent": (1.0, 1.0),
    "rotary_interleaved": (False, False),
    "rotary_seq_len_interpolation_factor": (None, None),
    "window_size": (None, None),
    "squared_relu": (False, False),
}


def args_from_config(
    config: Mapping[str, Any],
    *,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    max_position_embeddings: int | None = None,
) -> dict[str, Any]:
    """Megatron arguments for the model that a ``config.json`` describes.

    As in Megatron, the vocabulary is padded to a multiple of ``make_vocab_size_divisible_by`` ×
    ``tensor_model_parallel_size``. ``max_position_embeddings`` can lower the model's own value.

    Raises CheckpointError naming what Megatron (or this package) cannot represent.
    """
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(f"model_type {kind!r} is not supported: expected {' or '.join(ARCHITECTURES)}")
    values = {
        **_DEFAULTS[kind],
        **{k: v for k, v in config.items() if v is not None or k == "sliding_window"},
    }
    missing = [key for key in _SIZES if key not in values]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")
    _check_numbers(values)
    for key, only in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("quantization_config", None),
        ("partial_rotary_factor", 1.0),
    ):
        if values.get(key, only) != only:
            raise CheckpointError(f"config.json has {key}={values[key]}, expected {only}")
    positions = _positions(values, max_position_embeddings)
    theta, factor = _read_rope(values)
    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads", heads)
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    if multiple < 1:
        raise UsageError(
            "--make-vocab-size-divisible-by, --tensor-model-parallel-size",
            got=f"{make_vocab_size_divisible_by}, {tensor_model_parallel_size}",
            expected="two positive numbers",
        )  # fmt: skip
    return {
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "ffn_hidden_size": values["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "group_query_attention": groups != heads,
        "kv_channels": values.get("head_dim") or values["hidden_size"] // heads,
        "max_position_embeddings": positions,
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # Megatron's default, compared on loading
        "use_rotary_position_embeddings": False,
        "rotary_base": theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": factor is not None,
        "rope_scaling_factor": 8.0 if factor is None else factor,
        "normalization": "RMSNorm",
        "layernorm_epsilon": values.get("rms_norm_eps", 1e-6),
        "apply_layernorm_1p": False,
        "qk_layernorm": False,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", False),
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": values.get("initializer_range", 0.02),
        "vocab_size": values["vocab_size"],
        "padded_vocab_size": -(-values["vocab_size"] // multiple) * multiple,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": 1,
    }


def find_config(hf: str | Path) -> dict[str, Any] | None:
    """A model's ``config.json``: given as a file, a directory, or a model name in the Hub's local cache.

    Returns None if there is none; downloads nothing. Raises CheckpointError if it is not JSON.
    """
    path = Path(hf)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file() and str(hf).count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(hf), "config.json")
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def config_from_args(
    args: Mapping[str, Any], dtype: torch.dtype, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a Llama-family model with these Megatron arguments.

    ``original`` is the config of an imported model: its ``model_type`` and other entries (such as token ids)
    are kept. Raises CheckpointError naming an argument that the Llama family does not support.
    """
    for name, (required, absent) in _REQUIRED.items():
        found = args.get(name)
        if (absent if found is None else found) != required:
            raise CheckpointError(f"the model has {name}={found}, but Hugging Face's Llama only supports {required}")
    for name in ("rotary_base", "rope_scaling_factor", "layernorm_epsilon", "init_method_std"):
        if not _is_number(args.get(name) or 1.0):
            raise CheckpointError(f"the checkpoint's stored args have {name}={args[name]!r:.60}, expected a number")
    shape = ModelShape.from_args(args)
    # A tokenizer's folder may hold the config of another model family, which does not apply.
    base = dict(original) if original is not None and original.get("model_type") in ARCHITECTURES else {}
    kind = base.get("model_type", "llama")
    positions = args.get("max_position_embeddings") or base.get("max_position_embeddings") or 2048
    if base:
        # An import may have lowered it; the weights still support the original's positions.
        positions = max(positions, (_DEFAULTS[kind] | base)["max_position_embeddings"])
    if kind == "llama" and shape.hidden_size % shape.num_attention_heads:
        # A pruned width: transformers 5 refuses such a Llama, but a Mistral without a window is the same model.
        kind = "mistral"
        base.pop("architectures", None)
    theta = float(args.get("rotary_base") or 10000)
    factor = float(args.get("rope_scaling_factor") or 8.0) if args.get("use_rope_scaling") else None
    scaling = None if factor is None else {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
    name = str(dtype).removeprefix("torch.")
    epsilon = args.get("layernorm_epsilon")
    own = {"attention_bias": False, "mlp_bias": False} if kind == "llama" else {"sliding_window": None}
    return {
        **own,
        "architectures": [ARCHITECTURES[kind]],
        **base,
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "vocab_size": vocabulary(args),
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5 if epsilon is None else epsilon,
        "initializer_range": args.get("init_method_std") or 0.02,
        "tie_word_embeddings": shape.tied,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
        "torch_dtype": name,
        "dtype": name,
    }


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Raises CheckpointError for sizes that are not positive integers, and for values that are not numbers."""
    for key in (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
        found = values.get(key)
        if found is not None and (type(found) is not int or not 1 <= found <= _LARGEST):
            raise CheckpointError(f"config.json has {key}={found!r:.60}, expected a number from 1 to {_LARGEST}")
    for key in ("rms_norm_eps", "initializer_range", "rope_theta"):
        if not _is_number(values.get(key, 1.0)):
            raise CheckpointError(f"config.json has {key}={values[key]!r:.60}, expected a number")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15


def _positions(values: Mapping[str, Any], lowered: int | None) -> int:
    own = values["max_position_embeddings"]
    positions = own if lowered is None else lowered
    if positions > own:
        raise CheckpointError(f"--max-position-embeddings {positions}: expected at most the model's own {own}")
    window = values.get("sliding_window")
    if window is not None and window < positions:
        raise CheckpointError(
            f"config.json has sliding_window={window}, which changes the model on sequences longer than that "
            f"(max_position_embeddings={positions}); pass --max-position-embeddings {window} to import it "
            "for sequences within the window"
        )
    return positions


def _read_rope(values: Mapping[str, Any]) -> tuple[int | float, float | None]:
    """RoPE ``(theta, factor)``; factor is None without scaling."""
    given = [values.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, Mapping) for part in given):
        raise CheckpointError(f"config.json has RoPE parameters {given!r:.60}, expected an object")
    rope: dict[str, Any] = {key: value for part in given for key, value in part.items()}
    for key in ("rope_theta", "factor", "partial_rotary_factor"):
        if not _is_number(rope.get(key, 1.0)):
            raise CheckpointError(f"config.json has RoPE parameters with {key}={rope[key]!r:.60}, expected a number")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    theta = int(theta) if theta == int(theta) else theta  # --rotary-base takes an integer
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"config.json has partial_rotary_factor={rope['partial_rotary_factor']}, expected 1")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"config.json has RoPE scaling of type {kind!r}, expected default or llama3")
    for key, expected in _LLAMA3_ROPE.items():
        if rope.get(key, expected) != expected:
            raise CheckpointError(
                f"config.json has RoPE scaling with {key}={rope[key]}, but Megatron only supports {expected}"
            )
    if "factor" not in rope:
        raise CheckpointError("config.json has RoPE scaling of type llama3 without its factor")
    return theta, float(rope["factor"])
