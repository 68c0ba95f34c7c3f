"""Pruning in FP8: blocks are calibrated on the outputs of pruned blocks, with and without TE's cached weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_prune.structured.statistics import read
from tests.sparse import small
from tests.sparse.test_resume import kill
from tests.training.small_masked import run_function

FP8 = ["--fp8-preset", "current"]  # the first and the last of four blocks are bf16


def never_cached(argv: list[str]) -> None:
    """A verb in this rank, in which TE casts every weight at every forward pass."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron.core.extensions import transformer_engine as spec

    from megatron_prune.__main__ import main

    for cls in (spec.TELinear, spec.TELayerNormColumnParallelLinear):
        forward = cls.forward

        def without(self: Any, *args: Any, _forward: Any = forward) -> Any:
            self.disable_parameter_transpose_cache = True
            return _forward(self, *args)

        cls.forward = without
    if code := main(argv):
        raise SystemExit(code)


@pytest.mark.parametrize("preset", ["current", "blockwise"])
def test_later_blocks_see_pruned_ones(job, tiny_parent, tiny_corpus, tmp_path, preset: str) -> None:
    words = ("sparsegpt", "--ratio", 0.5, "--fp8-preset", preset)
    cached, never = (
        [str(word) for word in small.flags(tiny_parent, tmp_path / name, *words, corpus=tiny_corpus)]
        for name in ("cached", "never")
    )
    job(cached).ok()
    code, output = run_function(never_cached, tmp_path / "rank", 1, never)
    assert code == 0, output[-4000:]
    one, other = small.result(tmp_path / "cached"), small.result(tmp_path / "never")
    for key in one:
        assert all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True)), key


def test_the_recipe_is_part_of_the_question(job, tiny_parent, tiny_corpus, tmp_path) -> None:
    save = tmp_path / "killed"
    argv = small.flags(tiny_parent, save, "wanda", "--ratio", 0.5, "--bf16", corpus=tiny_corpus)
    kill(tmp_path / "kill", [*argv, *FP8], 1, "block 2")
    refused = job(argv)
    assert refused.returncode == 2 and "unfinished pruning has another fp8" in refused.output
    refused = job([*argv, "--fp8-preset", "blockwise"])
    assert refused.returncode == 2 and "unfinished pruning has another fp8" in refused.output
    assert job([*argv, *FP8]).ok().output.count("kept from before") == 2


def test_scores_need_the_recipe_of_the_statistics(job, tiny_parent, tiny_corpus, tmp_path) -> None:
    statistics, candidates = tmp_path / "s.safetensors", tmp_path / "candidates.json"
    load = ["--load", tiny_parent]
    text = ["--calibration-data-path", tiny_corpus, *small.CALIBRATION]
    job(["calibrate", *load, *text, "--output", statistics, *FP8]).ok()
    assert read(statistics).calibrations[0]["fp8"] == {
        "format": "hybrid", "recipe": "tensorwise", "bf16_layers": [1, 1],
    }  # fmt: skip
    asked = job(["plan", "--load", tiny_parent, "--statistics", statistics, "--method", "minitron-depth",
                 "--target-num-layers", "3", "--output", tmp_path / "plan.json"])  # fmt: skip
    assert asked.returncode == 3
    candidates = next(tmp_path.glob("*candidates*.json"))
    score = ["calibrate", *load, "--score", candidates, "--statistics", statistics]
    for flags, given in ((["--bf16"], "no FP8"), (["--fp8-preset", "blockwise"], "e4m3 with blockwise")):
        refused = job([*score, *flags])
        assert (
            refused.returncode == 2 and "--fp8-preset: expected" in refused.output and f"got {given}" in refused.output
        )
    job([*score, *FP8]).ok()


def test_delayed_scaling_is_refused_where_nothing_sets_its_scales(job, tiny_parent, tiny_corpus, tmp_path) -> None:
    load = ["--load", tiny_parent, "--fp8-preset", "hybrid-delayed"]
    text = ["--calibration-data-path", tiny_corpus, *small.CALIBRATION]
    for words in (
        ["calibrate", *load, *text, "--output", tmp_path / "s.safetensors"],
        ["sparsify", *load, *text, "--method", "wanda", "--ratio", "0.5", "--save", tmp_path / "x"],
        ["evaluate", *load, "--data-path", tiny_corpus, "--seq-length", "32", "--output", tmp_path / "scores.json"],
    ):
        refused = job(words)
        assert refused.returncode == 2 and "got hybrid-delayed" in refused.output, words[0]
