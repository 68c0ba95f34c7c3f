"""Prune, retrain, prune and retrain by hand: masks go through a cut and are held, every link is listed and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.masks import open_masks
from megatron_prune.structured import plan
from megatron_prune.training import lineage
from tests.training.small import GLOBAL_BATCH, SEQ_LENGTH, layout, recipe

FFN = 192  # of the parent


def zeros(root: Path) -> None:
    """Every removed weight is zero, and nearly no other."""
    found, masks = open_checkpoint(root), open_masks(root / "masks")
    for name in masks.entries:
        weight, kept = found.read(name), masks.read(name)
        assert not weight[~kept].any() and float((weight[kept] == 0).float().mean()) < 0.01, name


def test_prune_and_retrain_twice(job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    sparse, once, cut, twice, last = (tmp_path / name for name in ("sparse", "once", "cut", "twice", "last"))

    def train(start: Path, save: Path, samples: str, *more: object, nproc: int = 1) -> None:
        begin = ["pretrain", "--pretrained-checkpoint", start, "--masks", start / "masks"]
        job([*begin, *recipe(tiny_corpus, samples, save), *more], nproc=nproc).ok()

    job(["sparsify", "--load", tiny_parent, "--method", "magnitude", "--ratio", 0.4, "--save", sparse]).ok()
    train(sparse, once, "0:24", *layout(tp=2), nproc=2)
    sizes = ["--target-num-layers", 3, "--target-ffn-hidden-size", 96, "--divisible-by", 12]
    job(["plan", "--load", once, "--method", "random", *sizes, "--seed", 3, "--output", tmp_path / "plan.json"]).ok()
    job(["apply", "--load", once, "--plan", tmp_path / "plan.json", "--save", cut]).ok()
    train(cut, twice, "24:40", *layout(pp=3), nproc=3)
    # Most of what goes is gone already: zeros are the smallest weights.
    job(["sparsify", "--load", twice, "--method", "magnitude", "--ratio", 0.6, "--save", last]).ok()

    # The masks of what is left, by hand.
    made, before, after = plan.read(tmp_path / "plan.json"), open_masks(once / "masks"), open_masks(twice / "masks")
    assert made.kept_ffn is not None and len(made.kept_layers) == 3
    assert before.hash == open_masks(sparse / "masks").hash and after.hash == open_masks(cut / "masks").hash
    for layer, (source, channels) in enumerate(zip(made.kept_layers, made.kept_ffn, strict=True)):
        rows = [*channels, *(FFN + channel for channel in channels)]  # gate, up
        for suffix, taken in {
            "self_attention.linear_qkv": (slice(None), slice(None)),
            "self_attention.linear_proj": (slice(None), slice(None)),
            "mlp.linear_fc1": (rows, slice(None)),
            "mlp.linear_fc2": (slice(None), list(channels)),
        }.items():
            whole = before.read(f"decoder.layers.{source}.{suffix}.weight")
            assert torch.equal(after.read(f"decoder.layers.{layer}.{suffix}.weight"), whole[taken]), (layer, suffix)
    for root in (sparse, once, cut, twice, last):
        zeros(root)
    trained, start = open_checkpoint(twice), open_checkpoint(cut)
    assert any(not torch.equal(trained.read(name), start.read(name)) for name in after.entries)
    again = open_masks(last / "masks")
    for name in again.entries:
        assert not (again.read(name) & ~after.read(name)).any(), name  # nothing comes back

    # Every link is listed, with what came before it; tokens of all of them count.
    stages = lineage.of(open_checkpoint(last))
    assert [stage["kind"] for stage in stages] == ["pruned", "trained", "pruned", "trained", "pruned"]
    assert [stage["method"] for stage in stages[::2]] == ["magnitude", "random", "magnitude"]
    assert [stage["masks"] for stage in stages] == [before.hash, before.hash, None, after.hash, again.hash]
    assert [stage["range"] for stage in lineage.trainings(stages)] == [[0, 24], [24, 40]]
    assert [stage["tokens"] for stage in stages] == [0, 24 * SEQ_LENGTH, 0, 16 * SEQ_LENGTH, 0]
    assert lineage.tokens(stages) == 40 * SEQ_LENGTH
    account = read_json(twice / "account.json")
    assert [stage["kind"] for stage in account["lineage"]] == ["pruned", "trained", "pruned"]
    assert account["masks"] and account["steps"] == 16 // GLOBAL_BATCH
    seen = job(
        ["pretrain", "--pretrained-checkpoint", last, "--masks", last / "masks"]
        + recipe(tiny_corpus, "16:32", tmp_path / "x")
    )
    assert seen.returncode == 2 and "both would see 16:24" in seen.output
