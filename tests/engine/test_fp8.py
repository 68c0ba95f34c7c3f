"""FP8 presets: their flags, refusals, and Megatron's own validation of them on 64 ranks."""

from __future__ import annotations

import argparse
import os
from typing import Any

import pytest

from megatron_prune.engine import fp8
from megatron_prune.errors import UsageError

# Llama-3.1-8B and the paper's pruned shapes (examples/llama3.1_8b/layouts.yaml): layers, hidden, heads, groups, FFN.
SHAPES = {
    "llama3.1-8b": (32, 4096, 32, 8, 14336),
    "depth 16": (16, 4096, 32, 8, 14336),
    "depth 12": (12, 4096, 32, 8, 14336),
    "depth 6": (6, 4096, 32, 8, 14336),
    "width 50%": (32, 3072, 32, 8, 9216),
    "width 62.5%": (32, 2432, 32, 8, 6144),
    "width 75%": (32, 1792, 32, 8, 6016),
    "width 81.3%": (32, 1536, 32, 8, 4736),
}


def words(shape: str, *more: str, pp: int = 2) -> list[str]:
    layers, hidden, heads, groups, ffn = SHAPES[shape]
    return (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --group-query-attention "
        f"--num-query-groups {groups} --ffn-hidden-size {ffn} --kv-channels 128 --swiglu --normalization RMSNorm "
        "--disable-bias-linear --position-embedding-type rope --rotary-base 500000 --max-position-embeddings 8192 "
        "--padded-vocab-size 128256 --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
        "--seq-length 8192 --micro-batch-size 1 --global-batch-size 512 --lr 3e-4 --train-iters 100 "
        f"--tensor-model-parallel-size 2 --pipeline-model-parallel-size {pp} --sequence-parallel "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --no-rope-fusion"
    ).split() + list(more)


def validated(argv: list[str], capability: tuple[int, int], world: int) -> str | dict[str, Any]:
    """In a separate rank: Megatron's validation as rank 0 of a simulated world of Hoppers."""
    from packaging.version import Version

    from megatron_prune.engine import cpu

    cpu._cuda_is_available = lambda: True
    os.environ.update(RANK="0", WORLD_SIZE=str(world), LOCAL_RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    import megatron.core.utils
    import torch

    megatron.core.utils._te_version = Version(
        "2.9.0"
    )  # Megatron asks for the version of TE even where it is not installed
    torch.cuda.get_device_capability = lambda *_: capability
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_prune.engine import arguments, installed

    installed.assume(installed.named("te,apex"))
    try:
        args = arguments.parse("pretrain", argv)
        config = gpt_config_from_args(args).transformer
    except UsageError as error:
        return str(error)
    recipe = config.fp8_recipe
    return {
        "format": config.fp8,
        "recipe": str(getattr(recipe, "value", recipe)),
        "bf16": config.bf16,
        "history": (config.fp8_amax_history_len, config.fp8_amax_compute_algo),
        "ends": config.first_last_layers_bf16
        and (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16),
        "param": config.fp8_param,
    }  # fmt: skip


EXPECTED = {
    "hybrid-delayed": {"format": "hybrid", "recipe": "delayed", "history": (1024, "max"), "ends": False},
    "current": {"format": "hybrid", "recipe": "tensorwise", "history": (1, "most_recent"), "ends": (1, 1)},
    "blockwise": {"format": "e4m3", "recipe": "blockwise", "history": (1, "most_recent"), "ends": (1, 1)},
}


@pytest.mark.parametrize("gather", [[], ["--fp8-param-gather"]], ids=["", "param-gather"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", fp8.PRESETS)
def test_megatron_validates_every_preset_on_64_ranks(distributed, preset: str, shape: str, gather: list[str]) -> None:
    argv = words(shape, "--fp8-preset", preset, *gather)
    (found,) = distributed(validated, 1, argv, (9, 0), 64)
    assert found == EXPECTED[preset] | {"bf16": True, "param": bool(gather)}


@pytest.mark.parametrize(
    "preset, more, capability, message",
    [
        ("current", [], (8, 0), "--fp8-preset: expected .* compute capability 8.0 has, got current .*8.9"),
        ("blockwise", [], (8, 9), "compute capability 8.9 has.*needs 9.0: Hopper"),
        ("hybrid-delayed", ["--ffn-hidden-size", "9224"], (9, 0), "of 4612 .*change --ffn-hidden-size"),
        ("current", ["--hidden-size", "3080"], (9, 0), "hidden size of 3080"),
        ("current", ["--kv-channels", "12", "--num-query-groups", "2"], (9, 0), "q, k and v rows over 2 ranks of 216"),
        ("hybrid-delayed", ["--num-layers-at-start-in-bf16", "2"], (9, 0), "no layer stays in bf16"),
        ("hybrid-delayed", ["--fp8-recipe", "blockwise"], (9, 0), "--fp8-recipe: expected .*, got blockwise"),
        ("current", ["--num-layers-at-end-in-bf16", "17"], (9, 0), "expected 0 to 16, got 17"),
        ("current", ["--fp16"], (9, 0), "--fp16: .*the preset is bf16"),
        ("current", ["--transformer-impl", "local"], (9, 0), "local layers cannot compute in FP8"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(distributed, preset, more, capability, message) -> None:
    import re

    (found,) = distributed(validated, 1, words("llama3.1-8b", "--fp8-preset", preset, *more), capability, 64)
    assert isinstance(found, str) and re.search(message, found), found


def test_megatrons_own_flags_are_checked_too(distributed) -> None:
    argv = words("llama3.1-8b", "--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8")
    (found,) = distributed(validated, 1, argv, (9, 0), 64)
    assert "got mxfp8 (" in found and "needs 10.0: data center Blackwell" in found


def test_counts_of_bf16_layers_stay_the_users() -> None:
    args = argparse.Namespace(
        fp8_preset="current", transformer_impl="transformer_engine",
        num_layers_at_start_in_bf16=3, num_layers_at_end_in_bf16=1,
    )  # fmt: skip
    fp8.apply_preset(args, ["--fp8-preset", "current", "--num-layers-at-start-in-bf16=3"])
    assert (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16, args.bf16) == (3, 1, True)


def chosen(*argv: str) -> argparse.Namespace:
    """Arguments as a preset leaves them."""
    args = argparse.Namespace(
        fp8_preset=argv[0] if argv else None, transformer_impl="transformer_engine", fp8=None, fp8_recipe="delayed",
        first_last_layers_bf16=False, num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1,
    )  # fmt: skip
    fp8.apply_preset(args, [])
    return args


def test_recipes_that_differ_are_described_differently() -> None:
    described = [fp8.describe(chosen()), *(fp8.describe(chosen(preset)) for preset in fp8.PRESETS)]
    assert described[0] is None and len({str(recipe) for recipe in described}) == 4
    more = chosen("current")
    more.num_layers_at_end_in_bf16 = 2
    assert fp8.describe(more) != fp8.describe(chosen("current"))


def test_delayed_scaling_is_refused_where_nothing_sets_its_scales() -> None:
    for args in (chosen(), chosen("current"), chosen("blockwise")):
        fp8.refuse_delayed(args)
    with pytest.raises(UsageError, match="--fp8-preset: expected .*, got hybrid-delayed.*leave them at 1"):
        fp8.refuse_delayed(chosen("hybrid-delayed"))
    megatrons = chosen()
    megatrons.fp8 = "hybrid"  # --fp8-format alone: delayed is Megatron's default
    with pytest.raises(UsageError, match="--fp8-recipe: expected .*, got delayed"):
        fp8.refuse_delayed(megatrons)
