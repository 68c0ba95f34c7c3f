"""A masked run that stops and resumes, at the same layout or another, keeps its zeros and finds its masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.data.blend import members, parse_blend, samples_per_epoch
from megatron_prune.masks import open_masks
from tests.training.small import SEQ_LENGTH, layout, recipe
from tests.training.small_masked import (
    ADAM,
    account,
    assert_zero_in_checkpoint,
    losses,
    run_function,
    start_from,
    watch,
    watched,
)

STEPS = 6
RANGE = "64:112"


@pytest.mark.slow
def test_three_hundred_steps_resumed_at_another_layout(tiny_pruned, tiny_corpus, tmp_path):
    """DP=2 with accumulation, bf16, everything overlapped; then TP=2 and PP=2 from its save."""
    pruned, save = tiny_pruned("unstructured"), tmp_path / "run"
    epoch = samples_per_epoch(members(parse_blend(str(tiny_corpus))), SEQ_LENGTH)
    first, last = epoch - 600, epoch + 600
    words = recipe(tiny_corpus, f"{first}:{last}", save, "--stream-epochs", "3", "--save-interval", "150", "--bf16")
    words[words.index("--global-batch-size") + 1] = "4"
    words[words.index("--micro-batch-size") + 1] = "1"
    argv = start_from(pruned, *words, "--use-distributed-optimizer")
    begin = [*argv, "--overlap-grad-reduce", "--overlap-param-gather", "--exit-interval", "150"]
    code, output = run_function(watch, tmp_path / "first", 2, [str(w) for w in begin], pruned.file, str(tmp_path))
    assert code == 0 and "exiting program at iteration 150" in output, output[-4000:]
    assert_zero_in_checkpoint(save / "iter_0000150", pruned.kept, moments=("param", *ADAM))
    assert not account(save)["complete"]

    reshard(save)
    seen = watched([*argv, *layout(2, 2)], tmp_path / "then", 4, pruned.file)
    assert all(rank["steps"] == 150 for rank in seen)
    assert_zero_in_checkpoint(save / "iter_0000300", pruned.kept, moments=("param", *ADAM))
    assert account(save)["complete"] and len(losses(save)) == 300
    [counted] = Path(f"{tiny_corpus}.streams").glob(
        f"stream-*/unique-{first}-{last}.json"
    )  # before each start, by rank 0
    assert account(save)["unique_tokens"] == json.loads(counted.read_text())["unique_tokens"] < account(save)["tokens"]
    assert np.mean(losses(save)[-20:]) < np.mean(losses(save)[:20]) - 1


def test_resumed_without_its_optimizer(tiny_pruned, tiny_corpus, tmp_path):
    """Masters are made again from the weights, and the moments start at zero. In another folder: the run in --save
    does not change what it began with."""
    pruned, save = tiny_pruned("2:4"), tmp_path / "run"
    argv = start_from(pruned, *recipe(tiny_corpus, RANGE, save), "--bf16", "--save-interval", "3")
    code, output = run_function(
        watch, tmp_path / "first", 1, [str(w) for w in (*argv, "--exit-interval", "3")], pruned.file, str(tmp_path)
    )
    assert code == 0, output[-4000:]
    second = tmp_path / "second"
    watched([*argv, "--no-load-optim", "--save", second], tmp_path / "then", 1, pruned.file)
    assert_zero_in_checkpoint(second / "iter_0000006", pruned.kept, moments=ADAM)
    assert account(second)["complete"] and len(losses(second)) == STEPS - 3


def test_a_resumed_run_finds_its_masks_and_keeps_to_them(tiny_pruned, tiny_corpus, tmp_path, job):
    """Without ``--masks`` it resumes with its own; with other masks, or if its own are missing, it is refused."""
    pruned, save = tiny_pruned("2:4"), tmp_path / "run"
    words = recipe(tiny_corpus, RANGE, save, "--save-interval", "3")
    job(["pretrain", *start_from(pruned, *words), "--exit-interval", "3"]).ok()
    begun = account(save)
    assert begun["masks"] == open_masks(pruned.masks).hash and not begun["complete"]

    resume = ["pretrain", "--pretrained-checkpoint", pruned.path, *words]
    others = tiny_pruned("unstructured").masks
    for flags, says in (
        (["--masks", others], "expected the masks of the run in"),
        (["--masks", pruned.masks, "--random-masks", "1"], "expected the masks of the run in"),
    ):
        refused = job([*resume, *flags])
        assert refused.returncode == 2 and says in refused.output and "Traceback" not in refused.output
    own = save / "masks"
    own.rename(tmp_path / "away")
    refused = job(resume)
    assert (
        refused.returncode == 2
        and "expected the masks that the run there was trained under, got no masks" in refused.output
    ), refused.output[-2000:]
    shutil.copytree(others, own)
    refused = job(resume)
    assert (
        refused.returncode == 2
        and "expected the masks that the run there was trained under, got others" in refused.output
    )
    shutil.rmtree(own)
    (tmp_path / "away").rename(own)

    job([*resume, *layout(2)], nproc=2).ok()
    assert_zero_in_checkpoint(save / "iter_0000006", pruned.kept, moments=ADAM)
    done = account(save)
    assert done["complete"] and done["masks"] == begun["masks"] and done["start"] == "pruned"
    whole = tmp_path / "whole"
    job(["pretrain", *start_from(pruned, *recipe(tiny_corpus, RANGE, whole))]).ok()
    np.testing.assert_allclose(losses(save), losses(whole), rtol=2e-5)


def test_a_masked_run_goes_on_in_another_directory(tiny_pruned, tiny_corpus, tmp_path, job):
    """``--load`` of a masked run, optimizer and all: its masks come along, and ``evaluate`` finds them."""
    pruned, first, second = tiny_pruned("2:4"), tmp_path / "first", tmp_path / "second"
    job(["pretrain", *start_from(pruned, *recipe(tiny_corpus, RANGE, first, "--exit-interval", "3"))]).ok()
    words = recipe(tiny_corpus, RANGE, second)
    words[words.index("--load") + 1] = str(first)
    job(["pretrain", *words]).ok()
    assert_zero_in_checkpoint(second / "iter_0000006", pruned.kept, moments=ADAM)
    expected = open_masks(pruned.masks).hash
    assert account(second)["masks"] == open_masks(second / "masks").hash == expected
    scores = tmp_path / "scores.json"
    argv = ["evaluate", "--load", second / "iter_0000006", "--data-path", tiny_corpus]
    job([*argv, "--seq-length", "32", "--windows", "4", "--output", scores, *layout(2)], nproc=2).ok()
    assert json.loads(scores.read_text())["masks"] == expected
    assert json.loads(scores.read_text())["parameters_nonzero"] == account(second)["parameters_nonzero"]
