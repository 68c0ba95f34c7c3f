"""Weights that live in FP8 (``--fp8-param-gather``): masters begin with the checkpoint's values, zeros stay zero."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.small import layout, recipe
from tests.training.small_masked import (
    ADAM,
    account,
    assert_zero_in_checkpoint,
    leave_with,
    losses,
    run_function,
    start_from,
)

RANGE, STEPS = "64:112", 6
FP8 = ["--fp8-param-gather", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
PRESETS = ["hybrid-delayed", "current", "blockwise"]


def observe(argv: list[str], folder: str, source: str) -> None:
    """``pretrain`` in this rank; compares the masters that it begins with, with a checkpoint and with its weights."""
    from megatron.core.fp8_utils import is_float8tensor
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_prune.__main__ import main
    from megatron_prune.checkpoint.reader import open_checkpoint

    seen = {"fp8": 0, "as stored": 0, "as rounded": 0}
    setup = training.setup_model_and_optimizer

    @functools.wraps(setup)
    def set_up(*positional: Any, **named: Any) -> Any:
        found = setup(*positional, **named)
        checkpoint = open_checkpoint(source)
        names = {
            parameter: f"decoder.layers.{block.layer_number - 1}.{name}"  # Megatron numbers a stage's layers from 0
            for chunk in found[0]
            for block in unwrap_model(chunk).decoder.layers
            for name, parameter in block.named_parameters()
        }
        for part in found[1].chained_optimizers:
            groups = zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
            for parameter, master in ((p, m) for ps, ms in groups for p, m in zip(ps, ms, strict=True)):
                if not is_float8tensor(parameter):
                    continue
                place = part._get_model_param_range_map(parameter)["param"]
                stored = checkpoint.read(names[parameter]).float().view(-1)[place.start : place.end]
                rounded = parameter.dequantize().float().view(-1)[place.start : place.end]
                seen["fp8"] += 1
                seen["as stored"] += bool((master == stored.bfloat16().float()).all())
                seen["as rounded"] += bool((master == rounded).all())
        Path(folder, f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
        return found

    training.setup_model_and_optimizer = set_up
    leave_with(main(["pretrain", *argv]))


def begun(argv: list[Any], folder: Path, nproc: int, source: Path) -> dict[str, int]:
    """Run ``observe``; the merged observations of all ranks."""
    code, output = run_function(observe, folder, nproc, [str(word) for word in argv], str(folder), str(source))
    assert code == 0, output[-4000:]
    ranks = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(nproc)]
    return {key: sum(rank[key] for rank in ranks) for key in ranks[0]}


@pytest.mark.parametrize("preset", PRESETS)
def test_masters_begin_with_the_checkpoints_values_and_moments_are_restored(preset, tiny_parent, tiny_corpus, tmp_path):
    def argv(name: str, *more: str) -> list[str]:
        words = recipe(tiny_corpus, RANGE, tmp_path / name, "--fp8-preset", preset, *FP8, "--save-interval", "2", *more)
        return ["--pretrained-checkpoint", tiny_parent, *words]

    seen = begun(argv("whole"), tmp_path / "seen", 2, tiny_parent)
    assert seen["fp8"] >= 8 and seen["as stored"] == seen["fp8"] and seen["as rounded"] == 0
    assert account(tmp_path / "whole")["start"] == "continued"

    # Resumed after its second step, it continues from its own checkpoint, with its masters and moments.
    begun(argv("resumed", "--exit-interval", "2"), tmp_path / "first", 2, tiny_parent)
    assert len(losses(tmp_path / "resumed")) == 2
    begun(argv("resumed"), tmp_path / "second", 2, tiny_parent)
    np.testing.assert_allclose(losses(tmp_path / "resumed"), losses(tmp_path / "whole"), rtol=2e-3)
    # Without its moments the next steps would equal an optimizer's first.
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]


@pytest.mark.parametrize("preset, more", [
    ("hybrid-delayed", []), ("current", []), ("blockwise", []),
    ("current", ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]),
], ids=["delayed", "current", "blockwise", "precision-aware"])  # fmt: skip
@pytest.mark.parametrize("pp", [1, 2])
def test_zeros_stay_zero(preset, more, pp, tiny_pruned, tiny_corpus, tmp_path):
    pruned, save = tiny_pruned("2:4"), tmp_path / "run"
    words = recipe(
        tiny_corpus, RANGE, save, *layout(1, pp), "--fp8-preset", preset, *FP8, *more, "--save-interval", "4"
    )
    seen = begun(start_from(pruned, *words), tmp_path / "seen", 2, pruned.path)
    assert seen["fp8"] >= 8 and seen["as stored"] == seen["fp8"]
    for step in (4, STEPS):
        assert_zero_in_checkpoint(save / f"iter_{step:07d}", pruned.kept, moments=("param", *ADAM))
    assert account(save)["complete"] and losses(save)[-1] < losses(save)[0]


def test_masters_that_cannot_begin_so_are_refused(tiny_parent, tiny_corpus, tmp_path, job):
    words = recipe(tiny_corpus, RANGE, tmp_path / "run", "--fp8-preset", "hybrid-delayed", *FP8)
    start = ["--pretrained-checkpoint", tiny_parent]
    refused = job(["pretrain", *start, *words, "--use-precision-aware-optimizer"])
    assert refused.returncode == 2 and "got it with --fp8-param-gather" in refused.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [
    ["--bf16", "--use-precision-aware-optimizer"],
    ["--bf16", "--use-precision-aware-optimizer", "--main-params-dtype", "fp16", "--exp-avg-dtype", "bf16"],
], ids=["remainders", "fp16 masters"])  # fmt: skip
def test_zeros_stay_zero_where_the_optimizer_has_the_masters(more, tiny_pruned, tiny_corpus, tmp_path, job):
    pruned, save = tiny_pruned("2:4"), tmp_path / "run"
    words = recipe(tiny_corpus, RANGE, save, "--use-distributed-optimizer", *more, "--save-interval", "4")
    job(["pretrain", *start_from(pruned, *words)], nproc=2).ok()
    for step in (4, STEPS):
        assert_zero_in_checkpoint(save / f"iter_{step:07d}", pruned.kept, moments=("param", *ADAM))
    assert losses(save)[-1] < losses(save)[0]


def fused(argv: list[str], folder: str) -> None:
    """``pretrain`` in this rank, TE's linears putting their weights' gradients into ``main_grad`` themselves."""
    import transformer_engine.pytorch as te
    from megatron.training import training

    from megatron_prune.__main__ import main

    setup, seen = training.setup_model_and_optimizer, []

    @functools.wraps(setup)
    def set_up(*positional: Any, **named: Any) -> Any:
        found = setup(*positional, **named)
        for module in (module for chunk in found[0] for module in chunk.modules()):
            if isinstance(module, te.Linear | te.LayerNormLinear):
                module.fuse_wgrad_accumulation = True
                seen.append(module)
        return found

    training.setup_model_and_optimizer = set_up
    leave_with(main(["pretrain", *argv]))
    added = sum(bool(getattr(module.weight, "grad_added_to_main_grad", False)) for module in seen)
    Path(folder, f"seen-{os.environ['RANK']}.json").write_text(json.dumps([len(seen), added]))


@pytest.mark.parametrize("more", [[], FP8], ids=["bf16 weights", "fp8 weights"])
def test_fused_weight_gradients_keep_zeros(more, tiny_pruned, tiny_corpus, tmp_path):
    pruned = tiny_pruned("2:4")
    arms = {}
    for name, function in (("fused", fused), ("plain", observe)):
        save, folder = tmp_path / name, tmp_path / f"{name}-seen"
        words = recipe(
            tiny_corpus,
            RANGE,
            save,
            *(["--fp8-preset", "current", *more] if more else ["--bf16", "--use-distributed-optimizer"]),
        )
        argv = [str(word) for word in start_from(pruned, *words)]
        code, output = run_function(
            function, folder, 2, argv, str(folder), *([str(pruned.path)] if name == "plain" else [])
        )
        assert code == 0, output[-4000:]
        arms[name] = losses(save)
        assert_zero_in_checkpoint(save / f"iter_{STEPS:07d}", pruned.kept, moments=ADAM)
    assert json.loads((tmp_path / "fused-seen" / "seen-0.json").read_text()) == [16, 16]
    np.testing.assert_allclose(arms["fused"], arms["plain"], rtol=5e-3)


def test_a_teacher_does_not_follow_its_student_into_fp8(tiny_parent, tiny_corpus, tmp_path, job):
    """Of the same weights, but in bf16: the divergence of the first step is what FP8 rounds away, and not zero."""
    words = recipe(tiny_corpus, RANGE, tmp_path / "run", "--fp8-preset", "current", *FP8)
    start = ["--pretrained-checkpoint", tiny_parent, "--objective", "distill", "--teacher", tiny_parent]
    done = job(["pretrain", *start, *words]).ok()
    found = [float(each) for each in re.findall(r"distillation loss: ([0-9.E+-]+)", done.output)]
    assert len(found) == STEPS and 0 < found[0] < 0.1 and all(map(math.isfinite, found))
