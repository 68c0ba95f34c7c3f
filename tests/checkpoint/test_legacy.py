"""Legacy per-rank files, written by Megatron's own converter, against their source checkpoint."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import is_complete, repair_tracker
from megatron_prune.convert import inspect
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError
from megatron_prune.structured.apply import apply_plan
from tests.checkpoint.test_safe import Touches
from tests.training.small import any_plan

# name: (model, processes, flags of the layout)
LAYOUTS = {
    "tp3": ("llama-gqa", 3, "--tensor-model-parallel-size 3"),
    "tp2-uneven": (
        "llama-mha-tied",
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3",
    ),
    "virtual": ("llama-gqa", 2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
}
RECIPE = "--mock-data --seq-length 64 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 0.1".split()


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_hf, job):
    """``converted(layout)``: (the `torch_dist` parent, what Megatron's ``--ckpt-convert-format torch`` made of it)."""
    folder = tmp_path_factory.mktemp("legacy")

    def get(layout):
        model, nproc, flags = LAYOUTS[layout]
        parent, made = folder / model, folder / layout / "torch"
        if not parent.exists():
            import_hf(tiny_hf(model, layers=4), parent)
        if not made.exists():
            argv = ["pretrain", "--load", parent, "--finetune", *RECIPE, *flags.split()]
            job([*argv, "--ckpt-convert-format", "torch", "--ckpt-convert-save", made.parent], nproc=nproc).ok()
        return parent, made

    return get


@pytest.fixture
def copy(converted, tmp_path):
    """Files at TP=3 to damage."""
    return shutil.copytree(converted("tp3")[1], tmp_path / "copy")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_that_megatron_split(converted, layout):
    parent, made = (open_checkpoint(path) for path in converted(layout))
    assert (parent.format, made.format) == ("torch_dist", "torch") and len(list(made.directory.iterdir())) > 1
    assert made.shape == parent.shape and made.names == parent.names
    assert made.fingerprint() == parent.fingerprint() and made.full_hash() == parent.full_hash()
    for name in made.names:
        expected = parent.read(name)
        rows = len(expected)
        assert torch.equal(made.read_rows(name, rows // 3, rows - 1), expected[rows // 3 : rows - 1]), name


def test_names_of_transformer_engine_are_read_too(copy, converted):
    for file in copy.glob("iter_*/*/*.pt"):
        state = torch.load(file, weights_only=False)
        for key in list(state["model"]):
            te = key.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
            te = te.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
            state["model"][te] = state["model"].pop(key)
        torch.save(state, file)
    assert open_checkpoint(copy).full_hash() == open_checkpoint(converted("tp3")[0]).full_hash()


def test_it_exports_like_the_other_format(converted, tmp_path):
    parent, made = converted("tp2-uneven")
    first, second = (export_hf(path, tmp_path / name) for path, name in ((parent, "a"), (made, "b")))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_it_is_planned_and_cut_like_the_other_format(converted, tmp_path):
    parent, made = (open_checkpoint(path) for path in converted("virtual"))
    plan = any_plan(made)
    assert plan == any_plan(parent)
    for load, name in ((parent.root, "a"), (made.root, "b")):
        apply_plan(load, plan, tmp_path / name)
    assert open_checkpoint(tmp_path / "a").full_hash() == open_checkpoint(tmp_path / "b").full_hash()
    found = inspect.describe(made)
    assert found["format"] == "torch" and len(found["files"]) == 2 and found["flags"] == inspect.flags(parent)


def test_megatron_loads_it_at_its_layout_and_others_are_refused(converted, job, tiny_corpus, tmp_path):
    load = converted("tp3")[1]
    argv = ["evaluate", "--load", load, "--data-path", tiny_corpus, "--seq-length", 64]
    argv += ["--windows", 2, "--output", tmp_path / "scores.json"]
    refused = job(argv)
    assert refused.returncode == 2 and "legacy per-rank files of TP=3, PP=1" in refused.output
    assert "megatron-prune convert rewrite" in refused.output and "Traceback" not in refused.output
    job([*argv, "--tensor-model-parallel-size", 3], nproc=3).ok()
    assert (tmp_path / "scores.json").exists()


# -- damage ---------------------------------------------------------------------------------------


def _one(copy: Path) -> Path:
    return copy / "iter_0000000" / "mp_rank_01" / "model_optim_rng.pt"


def _change(change):
    def damage(copy):
        state = torch.load(_one(copy), weights_only=False)
        change(state)
        torch.save(state, _one(copy))

    return damage


def _hostile(copy):
    torch.save({"args": Touches(copy / "executed")}, _one(copy))


FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
DAMAGES = {
    "missing": (lambda copy: _one(copy).unlink(), "mp_rank_01.*is missing"),
    "rank": (lambda copy: shutil.rmtree(_one(copy).parent), "got none for tensor-parallel rank 1 of stage 0"),
    "truncated": (lambda copy: os.truncate(_one(copy), _one(copy).stat().st_size - 200), "is refused"),
    "empty": (lambda copy: _one(copy).write_bytes(b""), "is refused"),
    "code": (_hostile, "is refused: .*system"),
    "weight": (_change(lambda state: state["model"].pop(FC2)), r"linear_fc2.*, got NoneType"),
    "shape": (_change(lambda state: state["model"].update({FC2: torch.zeros(3, 3)})), r"linear_fc2.*, got \[3, 3\]"),
    "type": (
        _change(lambda s: s["model"].update({FC2: s["model"][FC2].bfloat16()})),
        "linear_fc2.*: expected one type",
    ),
    "parts": (_change(lambda state: state.update(model=7)), "expected tensors by name|damaged"),
    "old": (
        _change(lambda state: state.update(model0=state.pop("model"))),
        "expected the same model chunks in every rank",
    ),
    "cycle": (_change(lambda state: state["model"].update(loop=state)), "contains itself"),
    "expert": (lambda copy: (copy / "iter_0000000" / "mp_rank_00_000_000").mkdir(), "expected mp_rank_TT or"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_by_name(copy, kind):
    damage, message = DAMAGES[kind]
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)
    assert not (copy / "executed").exists()


def test_layers_of_the_first_rank_must_add_up(copy):
    for file in copy.glob("iter_*/*/*.pt"):
        state = torch.load(file, weights_only=False)
        state["args"] = argparse.Namespace(**vars(state["args"]) | {"num_layers": 5})
        torch.save(state, file)
    with pytest.raises(CheckpointError, match="expected 5 layers in all stages, as its stored args say, got 4"):
        open_checkpoint(copy)


def test_a_half_written_iteration_is_passed_over(copy):
    """Megatron's tracker can name it while a rank is still writing."""
    shutil.copytree(copy / "iter_0000000", copy / "iter_0000007")
    half = copy / "iter_0000007" / "mp_rank_02" / "model_optim_rng.pt"
    os.truncate(half, half.stat().st_size // 2)
    assert not is_complete(copy / "iter_0000007")
    (copy / "latest_checkpointed_iteration.txt").write_text("7")
    assert repair_tracker(copy) == copy / "iter_0000000"
    assert open_checkpoint(copy).iteration == 0
    shutil.rmtree(copy / "iter_0000000")
    (copy / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(CheckpointError, match="no other complete checkpoint"):
        repair_tracker(copy)
