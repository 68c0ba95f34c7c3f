"""What a checkpoint stores beside its weights: arguments, counters, and the empty state of every module."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from megatron_prune.checkpoint.layout import ModelShape, stacked_name

# Arguments of the run that saved the parent, not of the model.
_RUN_ARGUMENTS = (
    "load",
    "save",
    "pretrained_checkpoint",
    "rank",
    "local_rank",
    "ckpt_step",
    "finetune",
    "exit_interval",
)
# Modules whose `_extra_state` Transformer Engine or Megatron's local layers ask for when loading.
_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def rewrite_args(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Stored arguments of a checkpoint that starts anew: nothing consumed, no paths of the old run.

    Values of Megatron's own classes (enumerations that Megatron does not restore) are left out, so that
    the result loads anywhere with ``weights_only``.
    """
    kept = {key: value for key, value in args.items() if key not in _RUN_ARGUMENTS and _plain(value)}
    return kept | {
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": "torch_dist",
    }


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str, torch.dtype)


def common_state(args: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron wants to find in a checkpoint that starts anew with these (rewritten) arguments."""
    return {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def extra_state_keys(shape: ModelShape) -> list[str]:
    """Keys of every module's `_extra_state` in the index of a checkpoint."""
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm") if shape.qk_norm else ()
    layers = shape.num_layers
    in_blocks = [
        f"{stacked_name(module)}._extra_state/shard_{layer}_{layers}"
        for module in (*_EXTRA_STATE, *norms)
        for layer in range(layers)
    ]
    return [*in_blocks, "decoder.final_layernorm._extra_state/shard_0_1"]
