"""The ``prune`` verb: the chain of calibrate, plan and apply, under any layout, and its refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.structured import plan, statistics

CALIBRATION = ["--calibration-sequences", "5", "--calibration-seq-length", "64"]
CUTS = {
    "shortgpt": ["--ratio", "0.5"],
    "minitron-width": [
        "--target-hidden-size",
        "48",
        "--target-ffn-hidden-size",
        "96",
        "--target-num-attention-heads",
        "6",
    ],
}


def flags(method: str, parent: Path, corpus: Path, save: Path) -> list[Any]:
    return [
        "prune", "--load", parent, "--method", method, "--save", save,
        "--calibration-data-path", corpus, *CALIBRATION, "--divisible-by", "8", *CUTS[method],
    ]  # fmt: skip


@pytest.mark.parametrize("method", CUTS)
def test_prune_is_calibrate_plan_and_apply_at_any_layout(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, method: str
) -> None:
    calibration = ["--calibration-data-path", tiny_corpus, *CALIBRATION]
    s, p = tmp_path / "s.safetensors", tmp_path / "p.json"
    job(["calibrate", "--load", tiny_parent, *calibration, "--output", s]).ok()
    cut = ["--method", method, "--divisible-by", "8", *CUTS[method]]
    job(["plan", "--load", tiny_parent, "--statistics", s, "--output", p, *cut]).ok()
    job(["apply", "--load", tiny_parent, "--plan", p, "--save", tmp_path / "by-hand"]).ok()
    by_hand = open_checkpoint(tmp_path / "by-hand")

    layouts = {"tp2pp2": (4, 2, 2), "dp2": (2, 1, 1)}
    for name, (nproc, tp, pp) in layouts.items():
        layout = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
        save = tmp_path / name
        finished = job([*flags(method, tiny_parent, tiny_corpus, save), *layout], nproc=nproc).ok()
        assert "near-ties: none" in finished.output
        found = open_checkpoint(save)
        found.verify(hashes=True)
        assert all(torch.equal(found.read(n), by_hand.read(n)) for n in by_hand.names)
        made = plan.read(save / "pruning" / "plan.json")
        assert made.statistics == statistics.read(save / "pruning" / "statistics.safetensors").hash
        assert found.pruning[-1]["plan"] == made.hash
        assert found.pruning[-1]["tokens"] == 5 * 64


def test_random_needs_no_text_and_is_the_same_on_every_layout(
    job: Callable[..., Any], tiny_parent: Path, tmp_path: Path
) -> None:
    arguments = ["prune", "--load", tiny_parent, "--method", "random", "--seed", "7"]
    arguments += ["--axis", "width", "--ratio", "0.5", "--divisible-by", "8"]
    job([*arguments, "--save", tmp_path / "one"]).ok()
    job([*arguments, "--save", tmp_path / "two", "--tensor-model-parallel-size", "2"], nproc=2).ok()
    one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint() == two.fingerprint()
    assert one.pruning[0]["seed"] == 7 and one.pruning[0]["tokens"] == 0
    assert not (tmp_path / "one" / "pruning" / "statistics.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("shortgpt", ["--target-num-layers", "3"], "--ratio: expected .*, got --target-<size> and --ratio"),
        ("shortgpt", ["--ratio", "0.01"], "--ratio: expected .*, got 0.01"),
        ("shortgpt", ["--context-parallel-size", "2"], "--context-parallel-size: expected .*, got 2"),
        (
            "minitron-width",
            ["--target-ffn-hidden-size", "100"],
            "--target-ffn-hidden-size: expected a multiple of --divisible-by 8, got 100",
        ),
        ("minitron-width", ["--calibration-sequences", "100000"], "--calibration-sequences: expected .*, got 100000"),
    ],
)
def test_refused_before_the_model_is_built(
    job: Callable[..., Any],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    method: str,
    more: list[str],
    message: str,
) -> None:
    finished = job([*flags(method, tiny_parent, tiny_corpus, tmp_path / "save"), *more])
    assert finished.returncode != 0
    assert re.search("megatron-prune prune: " + message, finished.output), finished.output[-3000:]
    assert "loading distributed checkpoint" not in finished.output and not (tmp_path / "save").exists()


def test_existing_result_and_calibration_without_use_are_refused(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "file").touch()
    finished = job(flags("shortgpt", tiny_parent, tiny_corpus, tmp_path / "save"))
    assert finished.returncode != 0 and "--save: expected" in finished.output
    arguments = ["prune", "--load", tiny_parent, "--method", "random"]
    arguments += ["--target-num-layers", "2", "--save", tmp_path / "new", "--calibration-sequences", "3"]
    finished = job(arguments)
    assert finished.returncode != 0 and "got it" in finished.output
