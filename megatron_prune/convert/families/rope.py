"""Rotary position embeddings: entries of ``config.json`` ⇄ Megatron arguments.

Read in the form of transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``), written in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import show

# Fixed in Megatron's Llama 3 scaling, which only lets the factor be chosen.
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 8192}
# transformers' defaults of YaRN, with the Megatron arguments that take them.
_YARN = {"beta_fast": (32.0, "yarn_beta_fast"), "beta_slow": (1.0, "yarn_beta_slow")}
KINDS = "default, linear, llama3 or yarn"


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15


def read_rope(values: Mapping[str, Any], *, partial: bool) -> dict[str, Any]:
    """Megatron's arguments for the RoPE of a configuration. ``partial``: part of a head may be rotated.

    Raises CheckpointError naming what Megatron cannot express.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}  # as in transformers: the old form wins
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json has RoPE parameters {show(given)}, expected an object")
    rope: dict[str, Any] = dict(given)
    for key in ("rope_theta", "factor", "partial_rotary_factor", "beta_fast", "beta_slow"):
        found = rope.get(key, 1.0)
        if not is_number(found) or not found:
            raise CheckpointError(
                f"config.json has RoPE parameters with {key}={show(found)}, expected a positive number"
            )
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    percent = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if not is_number(percent) or not 0 < percent <= 1 or (percent != 1 and not partial):
        allowed = "a number above 0, up to 1" if partial else "1"
        raise CheckpointError(f"config.json has partial_rotary_factor={percent!r:.60}, expected {allowed}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    read: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": int(theta) if theta == int(theta) else theta,  # --rotary-base takes an integer
        "rotary_percent": float(percent),
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": 8.0,
    }
    if kind == "default":
        return read
    if not isinstance(kind, str) or kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"config.json has RoPE scaling of type {show(kind)}, expected {KINDS}")
    if "factor" not in rope:
        raise CheckpointError(f"config.json has RoPE scaling of type {kind} without its factor")
    factor = rope["factor"]
    if kind == "linear":
        if factor != int(factor) or factor < 1:
            raise CheckpointError(
                f"config.json has linear RoPE scaling with factor={factor}, but Megatron only supports whole numbers"
            )
        return read | {"rotary_seq_len_interpolation_factor": int(factor)}
    original = values.get(_ORIGINAL) or rope.get(_ORIGINAL) or values["max_position_embeddings"]
    if kind == "llama3":
        rope[_ORIGINAL] = original
        for key, expected in _LLAMA3.items():
            if rope.get(key, expected) != expected:
                raise CheckpointError(
                    f"config.json has RoPE scaling with {key}={show(rope[key])}, but Megatron only supports {expected}"
                )
        return read | {"rope_scaling_factor": float(factor)}
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise CheckpointError(f"config.json has YaRN with {key}={show(rope[key])}, expected it to be left out")
    if not is_number(original):
        raise CheckpointError(
            f"config.json has YaRN with original_max_position_embeddings={show(original)}, expected a positive number"
        )
    return read | {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": float(factor),
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
        "yarn_original_max_position_embeddings": original,
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
        **{name: float(rope.get(key, default)) for key, (default, name) in _YARN.items()},
    }


def rope_entries(args: Mapping[str, Any], *, partial: bool) -> dict[str, Any]:
    """The inverse of ``read_rope``."""
    theta = float(args.get("rotary_base") or 10000)
    scaling: dict[str, Any] | None = None
    if args.get("position_embedding_type") == "yarn":
        if (args.get("mscale") or 1.0, args.get("mscale_all_dim") or 0.0) != (1.0, 0.0):
            raise CheckpointError(
                f"the model has YaRN with mscale={args.get('mscale')}, mscale_all_dim={args.get('mscale_all_dim')}, "
                "but the export only supports 1 and 0"
            )
        whole = args.get("yarn_correction_range_round_to_int")
        scaling = {
            "rope_type": "yarn",
            "factor": float(args.get("rotary_scaling_factor") or 1.0),
            "original_max_position_embeddings": args.get("yarn_original_max_position_embeddings") or 4096,
            **({} if whole is None or whole else {"truncate": False}),
        }
        for key, (default, name) in _YARN.items():
            if args.get(name) not in (None, default):
                scaling[key] = float(args[name])
    elif args.get("rotary_seq_len_interpolation_factor"):
        scaling = {"rope_type": "linear", "factor": float(args["rotary_seq_len_interpolation_factor"])}
    elif args.get("use_rope_scaling"):
        scaling = {"rope_type": "llama3", "factor": float(args.get("rope_scaling_factor") or 8.0), **_LLAMA3}
    percent = args.get("rotary_percent")
    part = {"partial_rotary_factor": 1.0 if percent is None else float(percent)} if partial else {}
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta, **part},
        **part,
    }
