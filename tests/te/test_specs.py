"""One model, two layer specs: the same names, shards and answers at several layouts, sequence parallel ones too."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.masks import open_masks
from megatron_prune.structured.statistics import Statistics, read
from tests.training.small import MODEL, layout, recipe

LOCAL, TE = ["--transformer-impl", "local"], ["--transformer-impl", "transformer_engine"]
LAYOUTS = {
    "tp1": (1, 1, 1, []),
    "tp2": (2, 1, 1, []),
    "pp2": (1, 2, 1, []),
    "tp2pp2": (2, 2, 1, []),
    "dp2": (1, 1, 2, []),
    "tp2 sequence parallel": (2, 1, 1, ["--sequence-parallel"]),
    "tp2pp2 sequence parallel": (2, 2, 1, ["--sequence-parallel"]),
}


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda name: name.replace(" ", "-"))
def te(request) -> tuple[int, list[str]]:
    """(processes, flags) of Transformer Engine's spec at a layout."""
    tp, pp, dp, more = LAYOUTS[request.param]
    return tp * pp * dp, [*layout(tp, pp), *TE, *more]


def sharded_state(argv: list[str]) -> dict[str, Any]:
    """In a rank: the state that Megatron would save for the model of ``argv``: shape, offset and type by key."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    from megatron_prune.engine import runtime

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    args = runtime.start("evaluate", argv)
    runtime.initialize(args)
    (model,) = runtime.build_model(args)
    state = model.sharded_state_dict()
    apply_factories(state)
    found: dict[str, Any] = {}
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            place = (tuple(entry.global_shape), tuple(entry.global_offset), tuple(entry.local_shape), str(entry.dtype))
            found[f"{entry.key} {entry.global_offset}"] = place
        elif isinstance(entry, ShardedObject) and not entry.key.endswith("_extra_state"):
            found[entry.unique_key] = "object"
    return found


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_sharded_state_is_the_same(distributed, tp: int, pp: int) -> None:
    argv = [*MODEL, "--seq-length", "32", "--micro-batch-size", "1", *layout(tp, pp)]
    local, engine = (distributed(sharded_state, tp * pp, [*argv, *spec]) for spec in (LOCAL, TE))
    assert local == engine and len(local) == tp * pp
    assert sum(key.startswith("decoder.layers.mlp.linear_fc1.weight") for key in local[0]) >= 2  # gate and up


def calibrated(job, parent: Path, corpus: Path, output: Path, nproc: int, more: list[str]) -> Statistics:
    job(["calibrate", "--load", parent, "--calibration-data-path", corpus,
         "--calibration-sequences", "6", "--calibration-seq-length", "32",
         "--output", output, *more], nproc).ok()  # fmt: skip
    return read(output)


@pytest.fixture(scope="module")
def local_statistics(job, tiny_parent, tiny_corpus, tmp_path_factory) -> Statistics:
    return calibrated(job, tiny_parent, tiny_corpus, tmp_path_factory.mktemp("local") / "s.safetensors", 1, LOCAL)


def test_statistics_and_plans_are_the_same(te, job, local_statistics, tiny_parent, tiny_corpus, tmp_path) -> None:
    nproc, more = te
    found = calibrated(job, tiny_parent, tiny_corpus, tmp_path / "s.safetensors", nproc, more)
    for name, expected in local_statistics.tensors.items():
        largest = float(expected.abs().max())  # sums cancel
        np.testing.assert_allclose(found.tensors[name], expected, rtol=1e-4, atol=2e-6 * largest, err_msg=name)
    assert math.isclose(found.loss_sum, local_statistics.loss_sum, rel_tol=1e-6)
    local = tmp_path / "local.safetensors"
    local_statistics.write(local)
    plans = []
    for method, target in (
        ("shortgpt", ["--target-num-layers", "2"]),
        ("minitron-width", ["--target-hidden-size", "32", "--target-ffn-hidden-size", "64"]),
    ):
        for statistics in (local, tmp_path / "s.safetensors"):
            plan = tmp_path / f"{method}-{statistics.stem}.json"
            job(["plan", "--load", tiny_parent, "--statistics", statistics, "--method", method, *target,
                 "--divisible-by", "16", "--output", plan]).ok()  # fmt: skip
            content = json.loads(plan.read_text())
            plans.append(
                {key: content[key] for key in content if key.startswith("kept") or key in ("layers", "selection")}
            )
    assert plans[0] == plans[1] != plans[2] == plans[3] and all(plans)


@pytest.mark.parametrize("method, pattern", [("wanda", "unstructured"), ("sparsegpt", "2:4")])
def test_masks_are_the_same(te, job, tiny_parent, tiny_corpus, tmp_path, method: str, pattern: str) -> None:
    nproc, more = te
    words = [
        "sparsify",
        "--load",
        tiny_parent,
        "--method",
        method,
        "--ratio",
        "0.5",
        "--pattern",
        pattern,
    ]
    words += ["--calibration-data-path", tiny_corpus, "--calibration-sequences", "6", "--calibration-seq-length", "32"]
    job([*words, "--save", tmp_path / "local", *LOCAL]).ok()
    job([*words, "--save", tmp_path / "te", *more], nproc).ok()
    local, engine = (open_masks(tmp_path / name / "masks") for name in ("local", "te"))
    equal = [int((local.read(name) == engine.read(name)).sum()) for name in local.entries]
    total = sum(local.read(name).numel() for name in local.entries)
    assert list(local.entries) == list(engine.entries) and sum(equal) >= 0.999 * total
    one, other = (open_checkpoint(tmp_path / name) for name in ("local", "te"))
    for name in local.entries:
        same = (local.read(name) == engine.read(name)).all(1)  # rows whose masks are
        torch.testing.assert_close(one.read(name)[same], other.read(name)[same], rtol=2e-2, atol=2e-3)


def test_losses_are_the_same(te, job, tiny_parent, tiny_corpus, tmp_path) -> None:
    nproc, more = te
    words = [
        "evaluate",
        "--load",
        tiny_parent,
        "--data-path",
        tiny_corpus,
        "--seq-length",
        "32",
        "--windows",
        "8",
    ]
    job([*words, "--output", tmp_path / "local.json", *LOCAL]).ok()
    job([*words, "--output", tmp_path / "te.json", *more], nproc).ok()
    local, engine = (json.loads((tmp_path / f"{name}.json").read_text())["corpora"] for name in ("local", "te"))
    assert len(local) == 1
    for label, scores in local.items():
        assert math.isclose(scores["loss"], engine[label]["loss"], rel_tol=1e-5)


def losses(save: Path) -> list[float]:
    with open(save / "losses.csv") as table:
        return [float(row["loss"]) for row in csv.DictReader(table)]


@pytest.mark.parametrize("first, then", [(LOCAL, TE), (TE, LOCAL)], ids=["local-te", "te-local"])
@pytest.mark.parametrize("layout_then", ["tp1", "tp2pp2", "tp2 sequence parallel"])
def test_a_run_goes_on_with_the_other_spec(first, then, layout_then, job, tiny_parent, tiny_corpus, tmp_path) -> None:
    """With its optimizer state: the losses are those of a run with one spec throughout."""

    def words(name: str, spec: list[str], *more: str) -> list[Any]:
        argv = recipe(
            tiny_corpus, "64:112", tmp_path / name, "--use-distributed-optimizer", "--save-interval", "3", *more, *spec
        )
        return ["pretrain", "--pretrained-checkpoint", tiny_parent, *argv]

    tp, pp, dp, more = LAYOUTS[layout_then]
    more = more if then is TE else []
    job(words("whole", first)).ok()
    job(words("mixed", first, "--exit-interval", "3")).ok()
    assert len(losses(tmp_path / "mixed")) == 3
    if layout_then == "tp1":  # the other spec has its weights in another order
        refused = job(words("mixed", then))
        assert refused.returncode != 0 and "with its weights in another order" in refused.output
    reshard(tmp_path / "mixed")
    job(words("mixed", then, *layout(tp, pp), *more), tp * pp * dp).ok()
    np.testing.assert_allclose(losses(tmp_path / "mixed"), losses(tmp_path / "whole"), rtol=1e-4)
