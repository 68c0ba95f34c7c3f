"""The ``prune`` verb: the chain of calibrate, plan and apply, under any layout, and its refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import UsageError
from megatron_prune.structured import plan, statistics
from megatron_prune.training import learned_file

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


def test_a_place_that_cannot_be_written_is_found_before_the_text_is_read(tmp_path: Path) -> None:
    from megatron_prune.pruning.prune import _new

    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="^--save: expected a directory that can be written, got .*Not a directory"):
        _new(str(tmp_path / "file" / "made"))
    assert _new(str(tmp_path / "new" / "made")) == tmp_path / "new" / "made"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


LEARNED = ["--target-hidden-size", "64", "--target-ffn-hidden-size", "96", "--divisible-by", "4"]
TRAINING = ["--seq-length", "32", "--global-batch-size", "4", "--lr", "1e-2", "--seed", "7", "--num-workers", "0"]


def test_masks_are_learned_planned_and_applied_by_one_command(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """As by hand with the paper's settings; stopped, and resumed at another layout."""
    corpus = ["--train-data-path", tiny_corpus]
    save, work, hand = tmp_path / "save", tmp_path / "save.learning", tmp_path / "hand"
    asked = ["prune", "--load", tiny_parent, "--method", "sheared-llama", "--save", save, *LEARNED]
    asked += ["--mask-tokens", "1280", "--mask-lr", "0.5", *corpus, *TRAINING, "--save-interval", "5"]
    stopped = job([*asked, "--exit-interval", "5"])
    assert stopped.returncode == 2 and "run the same command again to resume" in stopped.output
    assert work.is_dir() and not save.exists()
    finished = job([*asked, "--tensor-model-parallel-size", "2"], nproc=2).ok()
    assert "near-ties: none" in finished.output and not work.exists()

    recipe = ["--min-lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1", "--weight-decay", "0"]
    recipe += ["--adam-beta2", "0.95", "--micro-batch-size", "1", "--mask-lr", "0.5", "--mask-ramp", "0.2"]
    place = ["--save", hand, "--load", hand, "--pretrained-checkpoint", tiny_parent, "--use-checkpoint-args"]
    job(["learn-masks", *place, *corpus, *TRAINING, *recipe, "--stream-range", "0:40", *LEARNED]).ok()
    chosen = ["--method", "sheared-llama", "--statistics", hand / learned_file.FILE, *LEARNED]
    job(["plan", "--load", hand, *chosen, "--output", tmp_path / "p.json"]).ok()
    job(["apply", "--load", hand, "--plan", tmp_path / "p.json", "--save", tmp_path / "by-hand"]).ok()

    found, by_hand = open_checkpoint(save), open_checkpoint(tmp_path / "by-hand")
    found.verify(hashes=True)
    assert all((found.read(n) - by_hand.read(n)).abs().max() < 1e-3 for n in by_hand.names)
    (entry,), (expected,) = found.pruning, by_hand.pruning
    assert entry["tokens"] == expected["tokens"] == 1280 and entry["flops"] == expected["flops"]
    assert entry["learned"]["range"] == [0, 40] and entry["parent"] == expected["parent"] | {
        "path": entry["parent"]["path"]
    }
    masks = learned_file.read(save / "pruning" / learned_file.FILE)
    assert plan.read(save / "pruning" / "plan.json").statistics == masks.hash

    # What is pruned again learns on the samples that follow.
    again = ["prune", "--load", save, "--method", "sheared-llama", "--save", tmp_path / "again", *corpus, *TRAINING]
    job([*again, "--mask-tokens", "256", "--target-ffn-hidden-size", "64", "--divisible-by", "4"]).ok()
    assert open_checkpoint(tmp_path / "again").pruning[-1]["learned"]["range"] == [40, 48]


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("sheared-llama", [], "--mask-tokens: expected the tokens that .* learns its masks on, got nothing"),
        ("sheared-llama", ["--mask-tokens", "100"], "--mask-tokens: expected a multiple of 128, .*, got 100"),
        (
            "sheared-llama",
            ["--mask-tokens", "128", "--calibration-sequences", "4"],
            "--calibration-sequences: expected a --method that is calibrated with it, got --method sheared-llama",
        ),
        ("sheared-llama", ["--mask-tokens", "128", "--ckpt-step", "3"], "--ckpt-step: expected no such flag .*, got 3"),
        (
            "shortgpt",
            ["--mask-tokens", "128"],
            "--mask-tokens: expected --method sheared-llama with it, got .*shortgpt",
        ),
    ],
)
def test_flags_of_learning_that_cannot_be_meant_are_refused(
    job: Callable[..., Any],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    method: str,
    more: list[str],
    message: str,
) -> None:
    words = ["prune", "--load", tiny_parent, "--method", method, "--save", tmp_path / "save", "--ratio", "0.5"]
    finished = job([*words, "--divisible-by", "8", "--train-data-path", tiny_corpus, *TRAINING, *more])
    assert finished.returncode == 2
    assert re.search("megatron-prune prune: " + message, finished.output), finished.output[-3000:]
    assert list(tmp_path.iterdir()) == []
