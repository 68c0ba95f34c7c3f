"""Zeros are checked: a nonzero weight under a mask stops the run, and evaluation; and how zeros are held."""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.errors import EXIT_REFUSED
from tests import tiny
from tests.training.small import layout, recipe
from tests.training.small_masked import (
    ADAM,
    account,
    assert_zero_in_checkpoint,
    leave_with,
    losses,
    removed_parts,
    run_function,
    start_from,
    watch,
)

RANGE = "64:128"
STEPS = 8


def spoil(argv: list[str], kept_file: str, step: int, rank: int, what: str, name: str) -> None:
    """``pretrain`` in this rank; after ``step``, on ``rank`` alone, one element of ``what`` is set under its mask.

    Of the distributed optimizer's slices the rank that has the weight's last one is ``rank``.
    """
    from megatron.training import training

    from megatron_prune.__main__ import main

    setup, train_step = training.setup_model_and_optimizer, training.train_step
    caught: list = []

    @functools.wraps(setup)
    def set_up(*positional, **named):
        caught.append(setup(*positional, **named))
        return caught[0]

    @functools.wraps(train_step)
    def spoiling(*positional, **named):
        done = train_step(*positional, **named)
        if named["iteration"] + 1 == step and int(os.environ["RANK"]) == rank:
            chunks, optimizer, _ = caught[0]
            kept = pickle.loads(Path(kept_file).read_bytes())
            ((parameter, removed),) = [(p, r) for n, p, r in removed_parts(chunks, kept) if n == name]
            target = parameter
            if what != "weight":
                target = parameter.main_param
                first = optimizer.chained_optimizers[0]._get_model_param_range_map(parameter)["param"].start
                removed = removed.flatten()[first : first + target.numel()]
                target = target if what == "master" else optimizer.optimizer.state[target][what]
            with torch.no_grad():
                target.view(-1)[int(removed.flatten().nonzero()[-1])] = 0.5
        return done

    training.setup_model_and_optimizer, training.train_step = set_up, spoiling
    leave_with(main(["pretrain", *argv]))


NAME = "decoder.layers.2.mlp.linear_fc2.weight"
SHARDED = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
SPOILT = [
    # what, flags, layout, processes, the rank where it is changed after step 4, its name, where it is found
    ("weight", [], (1, 2), 2, 1, "the weight", "at step 4"),
    ("weight", [], (1, 1), 2, 1, "the weight", "at step 4"),
    ("weight", ["--eval-interval", 100, "--save-interval", 3], (1, 1), 1, 0, "the weight", "before the save at step 6"),
    ("weight", ["--eval-interval", 100], (2, 1), 2, 0, "the weight", "before the save at step 8"),
    ("master", SHARDED, (1, 1), 2, 0, "the fp32 master of", "at step 4"),
    ("exp_avg_sq", SHARDED, (2, 1), 4, 1, "the optimizer's exp_avg_sq of", "at step 4"),
]


@pytest.mark.parametrize("case", SPOILT, ids=lambda case: f"{case[0]} {case[-1]} of {case[3]}")
def test_what_is_not_zero_stops_the_run_on_all_ranks(tiny_pruned, tiny_corpus, tmp_path, case):
    what, flags, (tp, pp), nproc, rank, called, when = case
    pruned, save = tiny_pruned("2:4"), tmp_path / "run"
    argv = [*start_from(pruned, *recipe(tiny_corpus, RANGE, save), *layout(tp, pp)), "--eval-interval", "4", *flags]
    code, output = run_function(
        spoil, tmp_path / "ranks", nproc, [str(word) for word in argv], pruned.file, 4, rank, what, NAME
    )
    assert code == EXIT_REFUSED and "Traceback" not in output, output[-3000:]
    # Rank 0 prints it, and then the job ends, wherever it was found.
    assert f"{when}: {called} {NAME} (layer 2): 1 of its elements are not zero" in output, output[-3000:]
    assert not account(save)["complete"] and len(losses(save)) == int(when.split()[-1])
    assert not (save / f"iter_{int(when.split()[-1]):07d}").exists()


def test_evaluate_finds_a_run_s_masks_and_looks_whether_they_hold(tiny_pruned, tiny_corpus, tmp_path, job):
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.masks import open_masks

    pruned = tiny_pruned("2:4")
    argv = ["evaluate", "--data-path", tiny_corpus, "--seq-length", "32", "--windows", "4"]
    for load, flags, nproc in ((pruned.path, [], 1), (pruned.path / "release", layout(2, 2), 4)):
        job([*argv, "--load", load, *flags, "--output", tmp_path / "scores.json"], nproc=nproc).ok()
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["masks"] == open_masks(pruned.masks).hash
        removed = sum(int((~mask).sum()) for mask in pruned.kept.values())
        shape = open_checkpoint(pruned.path).shape
        padding = 2 * tiny.PADDING * shape.hidden_size
        assert scores["parameters_nonzero"] == shape.parameters() - removed - padding

    spoilt = tmp_path / "spoilt"
    shutil.copytree(pruned.path, spoilt)
    shutil.rmtree(spoilt / "masks")
    shutil.copytree(tiny_pruned("unstructured").masks, spoilt / "masks")
    refused = job([*argv, "--load", spoilt, *layout(1, 2), "--output", tmp_path / "not.json"], nproc=2)
    assert refused.returncode == EXIT_REFUSED and "Traceback" not in refused.output, refused.output[-3000:]
    assert "the weight decoder.layers.0.self_attention.linear_qkv.weight (layer 0)" in refused.output
    assert not (tmp_path / "not.json").exists()

    damaged = max((spoilt / "masks").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x18  # somewhere in the bits
    damaged.write_bytes(bytes(content))
    refused = job([*argv, "--load", spoilt, "--output", tmp_path / "not.json"], nproc=2)
    assert refused.returncode == EXIT_REFUSED and "damaged" in refused.output, refused.output[-3000:]


def watch_fused(argv: list[str], kept_file: str, folder: str) -> None:
    """``watch`` with Megatron's fused weight-gradient kernel, of which a GPU has the real one.

    It adds to ``main_grad`` in the backward pass, and autograd gets a buffer with anything in it.
    """
    from megatron.core.tensor_parallel import layers

    from megatron_prune.engine import cpu

    class Kernel:
        calls = 0

        @staticmethod
        def wgrad_gemm_accum_fp32(inputs, grad_output, main_grad):
            Kernel.calls += 1
            main_grad.add_(grad_output.t().float() @ inputs.float())

        wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32

    empty = torch.empty

    def garbage(*size, **named):
        made = empty(*size, **named)
        return made.fill_(math.nan) if made.is_floating_point() else made

    layers.fused_weight_gradient_mlp_cuda = Kernel
    layers._grad_accum_fusion_available = True
    backward = layers.LinearWithGradAccumulationAndAsyncCommunication.backward

    def backward_with_garbage(*arguments):
        torch.empty = garbage
        try:
            return backward(*arguments)
        finally:
            torch.empty = empty

    layers.LinearWithGradAccumulationAndAsyncCommunication.backward = staticmethod(backward_with_garbage)
    flags = cpu.flags()
    cpu.flags = lambda: [flag for flag in flags if flag != "--no-gradient-accumulation-fusion"]
    watch(argv, kept_file, folder)
    assert Kernel.calls, "the fused path did not run"


@pytest.mark.parametrize("flags", [[], ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce"]],
                         ids=["fp32", "bf16"])  # fmt: skip
def test_fused_weight_gradients_are_masked(tiny_pruned, tiny_corpus, tmp_path, job, flags):
    pruned, save = tiny_pruned("unstructured"), tmp_path / "run"
    argv = start_from(pruned, *recipe(tiny_corpus, RANGE, save), *flags)
    code, output = run_function(
        watch_fused, tmp_path / "seen", 2, [str(word) for word in argv], pruned.file, str(tmp_path)
    )
    assert code == 0, output[-4000:]
    assert_zero_in_checkpoint(save / "iter_0000008", pruned.kept, moments=ADAM)
    plain = tmp_path / "plain"
    job(["pretrain", *start_from(pruned, *recipe(tiny_corpus, RANGE, plain), *flags)], nproc=2).ok()
    np.testing.assert_allclose(losses(save), losses(plain), rtol=2e-5 if not flags else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("where", ["main_grad", "grad"])
def test_any_gradient_becomes_zero_and_the_kept_stay_bit_by_bit(dtype, where):
    from megatron_prune.training.zeros import Held

    numbers = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(6, 10, generator=numbers).to(dtype))
    gradient = torch.randn(6, 10, generator=numbers).to(dtype)
    gradient[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, torch.finfo(dtype).tiny])
    gradient[1, :5] = gradient[0, :5]
    kept = torch.rand(6, 10, generator=numbers) < 0.5
    kept[0], kept[1] = False, True
    before = gradient.clone()
    if where == "main_grad":
        parameter.main_grad = gradient
        parameter.grad = torch.full_like(parameter, math.nan)  # as after a fused kernel
    else:
        parameter.grad = gradient
    held = Held.make("name", parameter, kept.clone())
    assert held.bits.itemsize == 1
    held.clear_gradient()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[gradient.itemsize]
    assert torch.equal(gradient.view(bits)[kept], before.view(bits)[kept])
    assert not gradient.view(bits)[~kept].any()  # +0, not -0

    held.clear_weight()
    assert int(held.violations(parameter)) == 0 and parameter.count_nonzero() == kept.sum()
    with torch.no_grad():
        parameter[0, 0], parameter[0, 1] = math.nan, -0.0
    assert int(held.violations(parameter)) == 1
    assert int(held.violations(parameter.view(-1)[1:], start=1)) == 0
    parameter.grad = parameter.main_grad = None
    held.clear_gradient()


def test_the_weights_that_masters_of_fp8_are_made_from_are_zeroed_too():
    """Transformer Engine keeps the unrounded initial weight on the CPU until the optimizer has taken it."""
    from megatron_prune.training.zeros import Held

    parameter = torch.nn.Parameter(torch.ones(4, 4))
    initial = torch.full((4, 4), 1.001)
    parameter.get_high_precision_init_val = lambda: initial
    kept = torch.eye(4, dtype=torch.bool)
    Held.make("name", parameter, kept.clone()).clear_weight()
    assert torch.equal(initial != 0, kept) and torch.equal(parameter != 0, kept)
    parameter.get_high_precision_init_val = lambda: None  # taken
    Held.make("name", parameter, kept.clone()).clear_weight()
