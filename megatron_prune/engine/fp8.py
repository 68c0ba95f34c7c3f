"""FP8 recipes by name, and the reasons why one cannot run here.

``--fp8-preset`` sets several of Megatron's flags (``PRESETS``), for bf16 and Transformer Engine's layers:

* ``hybrid-delayed``: E4M3 forward, E5M2 backward, one scale per tensor from the largest values of the last 1024 steps.
  The oldest recipe, with the least work per step, because scales are known before the tensor. All layers are FP8.
* ``current``: the same formats, each tensor scaled by its own largest value. First and last layer in bf16.
* ``blockwise``: E4M3 everywhere, a scale for each 1 x 128 of activations and 128 x 128 of weights. First and last
  layer in bf16.

The dimensions that FP8 kernels require are checked for every recipe, even one chosen with Megatron's own flags, because
pruning can produce any dimensions. A flag that contradicts a preset is refused, so that each name means one recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.engine import layers
from megatron_prune.errors import UsageError

FLAG = "--fp8-preset"
_BF16_ENDS = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "hybrid-delayed": {
        "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": False,
    },
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise", **_BF16_ENDS},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise", **_BF16_ENDS},
}  # fmt: skip
# Megatron's spellings of the presets' values; the user may set those that count layers.
_OPTIONS = {
    "--fp8-format": "fp8",
    "--fp8-recipe": "fp8_recipe",
    "--fp8-amax-history-len": "fp8_amax_history_len",
    "--fp8-amax-compute-algo": "fp8_amax_compute_algo",
    "--first-last-layers-bf16": "first_last_layers_bf16",
    "--num-layers-at-start-in-bf16": "num_layers_at_start_in_bf16",
    "--num-layers-at-end-in-bf16": "num_layers_at_end_in_bf16",
}
_COUNTS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
# A recipe's minimum compute capability, the first higher one that lacks it, and the GPUs that have it.
_CAPABILITIES = {
    "delayed": ((8, 9), None, "Ada, Hopper or newer"),
    "tensorwise": ((8, 9), None, "Ada, Hopper or newer"),
    "blockwise": ((9, 0), None, "Hopper or newer"),
    "mxfp8": ((10, 0), (12, 0), "data center Blackwell"),
}
ALIGNMENT = 16  # elements: the divisor that FP8 matrix products require of each dimension


def apply_preset(args: argparse.Namespace, argv: list[str]) -> None:
    """Set the flags of ``args.fp8_preset``; UsageError if ``argv`` contradicts them. Call before validation."""
    if args.fp8_preset is None:
        return
    preset = dict(PRESETS[args.fp8_preset])
    delayed = preset["fp8_recipe"] == "delayed"
    given = {word.split("=", 1)[0] for word in argv}
    for option, name in _OPTIONS.items():
        if option not in given:
            continue
        if name in _COUNTS and not delayed:
            preset[name] = getattr(args, name)
        elif name in _COUNTS or (name in preset and getattr(args, name) != preset[name]):
            raise UsageError(
                option, got=getattr(args, name), expected=f"the value that {FLAG} {args.fp8_preset} sets, or no preset",
                why="with delayed scaling no layer stays in bf16" if name.endswith("bf16") else "",
            )  # fmt: skip
    for option, preset_is in (("--fp16", "bf16"), ("--fp4-format", "FP8")):
        if option in given:
            raise UsageError(option, got="it", expected=f"no such flag with {FLAG}", why=f"the preset is {preset_is}")
    if args.transformer_impl != "transformer_engine":
        raise UsageError(
            "--transformer-impl", got=args.transformer_impl, expected=f"transformer_engine with {FLAG}",
            why="Megatron's local layers cannot compute in FP8",
        )  # fmt: skip
    vars(args).update(preset, bf16=True)


def refuse_unfit(args: argparse.Namespace) -> None:
    """UsageError if the FP8 recipe of validated ``args`` cannot run on this GPU or with this model."""
    if not args.fp8:
        return
    flag, value = (FLAG, args.fp8_preset) if args.fp8_preset else ("--fp8-recipe", args.fp8_recipe)
    _refuse_gpu(flag, value, args.fp8_recipe)
    if args.first_last_layers_bf16:
        _refuse_counts(args)
    for option, what, size in dimensions(args):
        if size % ALIGNMENT:
            raise UsageError(
                flag, got=f"{value} with {what} of {size}", expected=f"dimensions in multiples of {ALIGNMENT}",
                why="FP8 matrix products take no others", do=f"change {option}",
            )  # fmt: skip


def describe(args: argparse.Namespace) -> dict[str, Any] | None:
    """The FP8 recipe of ``args`` as JSON; None without FP8. Comparable forward passes need equal recipes."""
    if not args.fp8:
        return None
    ends = [getattr(args, name) for name in _COUNTS] if args.first_last_layers_bf16 else [0, 0]
    recipe = getattr(args.fp8_recipe, "value", args.fp8_recipe)
    return {"format": str(args.fp8), "recipe": str(recipe), "bf16_layers": ends}


def refuse_delayed(args: argparse.Namespace, why: str = "") -> None:
    """UsageError for forward passes alone under delayed scaling.

    Transformer Engine takes a delayed scale from the largest values of earlier steps, and updates it only in steps
    with gradients. Without any, every scale stays 1: E4M3's values near zero are 2^-9 apart, so a weight of 0.005
    is rounded by up to a fifth, and activations above 448 are clipped.
    """
    if args.fp8 and args.fp8_recipe == "delayed":
        raise UsageError(
            FLAG if args.fp8_preset else "--fp8-recipe", got=args.fp8_preset or "delayed",
            expected="current or blockwise scaling (--fp8-preset current), or bf16, with this verb",
            why=why or "delayed scales come from training steps, and forward passes alone leave them at 1",
        )  # fmt: skip


def cast_weights_again(module: torch.nn.Module) -> None:
    """Make every linear in ``module`` cast its weight to FP8 again at its next forward pass.

    Transformer Engine keeps the FP8 copy from the first micro-batch of a step to the last. Megatron's schedules mark
    the start of a step for the modules that they found first. Code that runs blocks without a schedule, or changes a
    weight between two passes, must call this; otherwise the old copy is used.
    """
    part: Any
    for part in module.modules():
        if hasattr(part, "is_first_microbatch"):
            part.is_first_microbatch = True


def _refuse_gpu(flag: str, value: str, recipe: str) -> None:
    if recipe not in _CAPABILITIES:
        return
    least, beyond, gpus = _CAPABILITIES[recipe]
    found = torch.cuda.get_device_capability()
    if found < least or (beyond is not None and found >= beyond):
        raise UsageError(
            flag, got=value, expected=f"a recipe that a GPU of compute capability {found[0]}.{found[1]} has",
            why=f"{recipe} scaling needs {least[0]}.{least[1]}: {gpus}",
        )  # fmt: skip


def _refuse_counts(args: argparse.Namespace) -> None:
    """Refuse more bf16 layers than a stage has: a pruned model can have few layers per stage."""
    most = args.num_layers // args.pipeline_model_parallel_size
    for name in _COUNTS:
        if not 0 <= getattr(args, name) <= most:
            raise UsageError(
                f"--{name.replace('_', '-')}", got=getattr(args, name), expected=f"0 to {most}",
                why=f"a pipeline stage has {most} of the {args.num_layers} layers",
            )  # fmt: skip


def dimensions(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(flag to change, name, size per rank) of every dimension of the model's FP8 matrix products."""
    ranks, channels = args.tensor_model_parallel_size, args.kv_channels
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    heads = args.num_attention_heads
    uniform = LayerShape(heads, args.num_query_groups if args.group_query_attention else heads, args.ffn_hidden_size)
    in_layers = []
    for layer in dict.fromkeys(layers.sizes(args) if layers.differ(args) else [uniform]):
        heads, rows = layer.num_attention_heads, layer.num_attention_heads + 2 * layer.num_query_groups
        in_layers += [
            ("--ffn-hidden-size", f"an FFN size over {ranks} ranks", layer.ffn_hidden_size // ranks),
            ("--num-attention-heads", f"attention channels over {ranks} ranks", heads * channels // ranks),
            ("--num-query-groups", f"q, k and v rows over {ranks} ranks", rows * channels // ranks),
        ]
    return [
        ("--hidden-size", "a hidden size", args.hidden_size),
        *in_layers,
        ("--seq-length or --micro-batch-size", "tokens of a micro-batch", tokens),
    ]
