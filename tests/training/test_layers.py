"""Training of models whose layers differ: the same losses at every layout, after a kill, and resharded on the way."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.masks import open_masks, verify
from megatron_prune.study import match
from tests.structured import layered
from tests.training.small import layout, recipe, record

RANGE = "0:32"  # four steps


def losses(save: Path) -> list[float]:
    with open(save / "losses.csv") as table:
        return [float(row["loss"]) for row in csv.DictReader(table)]


@pytest.fixture(scope="module")
def pruned(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered.cut(tiny_parent, tmp_path_factory.mktemp("layered") / "pruned")


@pytest.fixture(scope="module")
def uninterrupted(pruned: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory, job: Any) -> Path:
    """From the pruned model, in one process."""
    save = tmp_path_factory.mktemp("run") / "save"
    words = recipe(tiny_corpus, RANGE, save, "--pretrained-checkpoint", pruned, "--use-distributed-optimizer")
    job(["pretrain", *words]).ok()
    return save


def test_killed_and_resharded_it_ends_with_the_same_losses(
    uninterrupted: Path, pruned: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    argv = recipe(
        tiny_corpus, RANGE, save, "--pretrained-checkpoint", pruned, "--use-distributed-optimizer", "--save-interval", 2
    )
    assert record(tmp_path / "records", [*argv, *layout(1, 1)], 1, kill_at=4) != 0
    reshard(save)
    assert record(tmp_path / "records", [*argv, *layout(2, 2)], 4) == 0
    np.testing.assert_allclose(losses(save), losses(uninterrupted), rtol=2e-5)
    found, expected = open_checkpoint(save), open_checkpoint(uninterrupted)
    assert found.shape == expected.shape == open_checkpoint(pruned).shape
    for name in found.names:
        np.testing.assert_allclose(found.read(name), expected.read(name), rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_virtual_stages_hold_the_layers_of_their_place(
    uninterrupted: Path, pruned: Path, tiny_corpus: Path, tmp_path: Path, job: Callable[..., Any]
) -> None:
    """Megatron's own layer spec gives every virtual stage the layers of the first one."""
    words = recipe(
        tiny_corpus, RANGE, tmp_path / "save", "--pretrained-checkpoint", pruned,
        "--num-layers-per-virtual-pipeline-stage", 1, "--use-distributed-optimizer",
    )  # fmt: skip
    job(["pretrain", *words, *layout(1, 2)], nproc=2).ok()
    np.testing.assert_allclose(losses(tmp_path / "save"), losses(uninterrupted), rtol=2e-5)


def test_a_scratch_run_of_the_same_shape(
    pruned: Path, uninterrupted: Path, tiny_corpus: Path, tmp_path: Path, job: Callable[..., Any]
) -> None:
    found = []
    for tp in (1, 2):
        save = tmp_path / f"tp{tp}"
        words = recipe(tiny_corpus, RANGE, save, "--use-distributed-optimizer")
        job(["pretrain", "--shape-from", pruned, *words, *layout(tp)], nproc=tp).ok()
        assert open_checkpoint(save).shape == open_checkpoint(pruned).shape
        found.append(losses(save))
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5)
    assert abs(found[0][0] - losses(uninterrupted)[0]) > 1e-3  # its own initial weights
    scratch, retrained = (json.loads((one / "account.json").read_text()) for one in (tmp_path / "tp1", uninterrupted))
    ours, theirs = scratch["arguments"], retrained["arguments"]
    assert {key for key in ours if ours[key] != theirs[key]} <= set(match.ALLOWED)
    assert (
        scratch["flops_executed"]
        == retrained["flops_executed"]
        == open_checkpoint(pruned).shape.training_flops(32) * 32
    )


def test_a_layer_that_the_ranks_cannot_split_is_refused(
    pruned: Path, tiny_corpus: Path, tmp_path: Path, job: Callable[..., Any]
) -> None:
    words = recipe(tiny_corpus, RANGE, tmp_path / "save", "--shape-from", pruned, *layout(3))
    refused = job(["pretrain", *words], nproc=3)
    assert refused.returncode == 2 and "layer 0 has 50 FFN channels" in refused.output


@pytest.mark.slow
def test_a_sparse_parents_masks_are_held_in_what_is_cut_from_it(
    tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, job: Callable[..., Any]
) -> None:
    sparse, cut, save = tmp_path / "sparse", tmp_path / "cut", tmp_path / "save"
    job(["sparsify", "--load", tiny_parent, "--method", "magnitude", "--ratio", "0.5", "--save", sparse]).ok()
    layered.cut(sparse, cut)
    words = recipe(tiny_corpus, "0:16", save, "--pretrained-checkpoint", cut, "--masks", cut / "masks")
    job(["pretrain", *words, *layout(2)], nproc=2).ok()
    trained, before = open_checkpoint(save), open_checkpoint(cut)
    verify(open_masks(cut / "masks"), trained)
    assert trained.shape == before.shape and trained.full_hash() != before.full_hash()
