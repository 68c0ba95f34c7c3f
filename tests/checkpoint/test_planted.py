"""A pickle planted in any record of any checkpoint: nothing runs it, and every reader names the record.

The reader of all verbs and tools gets every record and key, every verb a selection of them, and Megatron's own loader
all object records, as if the checkpoint had changed after it was checked.
"""

from __future__ import annotations

import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint import safe_objects
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.errors import CheckpointError
from megatron_prune.masks import open_masks
from tests.checkpoint import plants
from tests.checkpoint.test_safe import Touches, replace_record, saved
from tests.data.corpora import write_corpus


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return plants.write(tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole.parent, tmp_path / "checkpoint") / "release"


def test_it_opens_with_nothing_planted(whole):
    assert len(open_checkpoint(whole.parent).names) > 20
    assert set(plants.OF_TRAINING) < set(plants.objects(whole))


def test_every_object_record_is_vetted(whole, tmp_path):
    for number, key in enumerate(plants.objects(whole)):
        folder = shutil.copytree(whole.parent, tmp_path / str(number)) / "release"
        plants.in_object(key)(folder, tmp_path / "executed")
        with pytest.raises(CheckpointError, match=r"__planted\.distcp: the .* is refused: .*posix\.system") as refused:
            open_checkpoint(folder.parent)
        assert key in str(refused.value) or key == "common_state/shard_0_1"
        shutil.rmtree(folder.parent)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", plants.ATTACKS)
def test_every_kind_of_plant_is_refused(copy, tmp_path, kind):
    plants.ATTACKS[kind](copy, tmp_path / "executed")
    with pytest.raises(CheckpointError, match=r"is refused: .*posix\.system"):
        open_checkpoint(copy.parent)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "key", ["args", "model", "optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine"]
)
def test_every_key_of_legacy_files_is_vetted(tmp_path, key):
    folder = plants.write_legacy(tmp_path / "legacy")
    assert open_checkpoint(tmp_path / "legacy").format == "torch"
    state = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    if isinstance(state[key], dict):
        state[key]["x"] = Touches(tmp_path / "executed")
    else:
        state[key] = [Touches(tmp_path / "executed")]
    torch.save(state, folder / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt is refused: .*posix\.system"):
        open_checkpoint(tmp_path / "legacy")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("make", [plants.inside_bytes, plants.inside_stream])
def test_what_a_module_would_unpickle_of_a_legacy_file_is_vetted(tmp_path, make):
    folder = plants.write_legacy(tmp_path / "legacy")
    state = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = make(tmp_path / "executed")
    torch.save(state, folder / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"linear_fc1\._extra_state is refused: .*posix\.system"):
        open_checkpoint(tmp_path / "legacy")
    assert not (tmp_path / "executed").exists()


def test_the_optimizers_file_of_a_legacy_rank_is_vetted(tmp_path):
    folder = plants.write_legacy(tmp_path / "legacy")
    (folder / "distrib_optim.pt").write_bytes(saved([Touches(tmp_path / "executed")]))
    with pytest.raises(CheckpointError, match=r"distrib_optim\.pt is refused: .*posix\.system"):
        open_checkpoint(tmp_path / "legacy")
    assert not (tmp_path / "executed").exists()


def test_every_object_record_of_masks_is_vetted(tmp_path):
    from tests.masks import small as small_masks

    folder = small_masks.write(tmp_path / "made") / "masks"
    for key in [*plants.objects(folder), "zzz/shard_0_1"]:
        changed = shutil.copytree(folder, tmp_path / "changed")
        plants.in_object(key)(changed, tmp_path / "executed")
        with pytest.raises(CheckpointError, match=rf"the record {key} is refused: .*posix\.system"):
            open_masks(changed)
        shutil.rmtree(changed)
    assert not (tmp_path / "executed").exists()


def test_the_tool_that_reshards_an_optimizer_refuses_it(copy, tmp_path):
    plants.in_object("rng_state/shard_0.0_1.1")(copy, tmp_path / "executed")
    with pytest.raises(CheckpointError, match=r"the record rng_state/shard_0\.0_1\.1 is refused: .*posix\.system"):
        reshard(copy)
    assert not (tmp_path / "executed").exists()


# -- Transformer Engine's own ---------------------------------------------------------------------


def test_what_transformer_engine_stores_is_not_refused(monkeypatch):
    """The bytes of a state under delayed scaling: a recipe's class, tensors, plain values."""
    name = "transformer_engine.common.recipe"
    for package in ("transformer_engine", "transformer_engine.common", name):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    recipe = type("DelayedScaling", (), {"__module__": name})
    sys.modules[name].DelayedScaling = recipe
    state = {"recipe": recipe(), "scale_fwd": torch.ones(3), "amax_history_fwd": torch.ones(16, 3),
             "extra_fp8_variables": {"fp8": True, "num_gemms": 1, "name": ("a", 1.5)}}  # fmt: skip
    state["recipe"].margin = 0
    content = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    safe_objects.vet(saved([content]), plants.MODULE_STATE, "here")
    safe_objects.vet(saved([torch.zeros(0, dtype=torch.uint8)]), plants.MODULE_STATE, "here")


def test_the_lists_are_megatrons():
    """Classes that Megatron allows must open here; the list for Transformer Engine's state is exactly Megatron's."""
    from megatron.core.safe_globals import SAFE_GLOBALS, SafeUnpickler

    ours = safe_objects._IN_MODULE_STATE | safe_objects._STORAGE_IN_MODULE_STATE
    assert ours == SafeUnpickler._SAFE_CLASSES
    allowed = {"argparse.Namespace", "types.SimpleNamespace", "_io.BytesIO", *safe_objects._COMMON_IGNORED}
    assert {f"{item.__module__}.{item.__qualname__}" for item in SAFE_GLOBALS} <= allowed


# -- verbs ----------------------------------------------------------------------------------------

RECIPE = "--seq-length 16 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 0.1 --mock-data".split()
MODEL = ["--load", "{}"]
VERBS = {
    "evaluate": ["evaluate", *MODEL, "--data-path", "none", "--output", "none"],
    "calibrate": ["calibrate", *MODEL, "--calibration-data-path", "none", "--output", "none.safetensors"],
    "sparsify": ["sparsify", *MODEL, "--method", "magnitude", "--ratio", "0.5", "--save", "none"],
    "prune": ["prune", *MODEL, "--method", "magnitude", "--ratio", "0.5", "--save", "none"],
    "pretrained": ["pretrain", "--pretrained-checkpoint", "{}", *RECIPE],
    "resumed": ["pretrain", *MODEL, *RECIPE],
    "shape": ["pretrain", "--shape-from", "{}", *RECIPE],
}


def test_every_verb_that_runs_a_model_refuses_it(whole, tmp_path, distributed):
    """In one process: no verb reaches the model, so the next one can follow."""
    folders = {}
    for number, (kind, attack) in enumerate(plants.ATTACKS.items()):
        folders[kind] = shutil.copytree(whole.parent, tmp_path / str(number)) / "release"
        attack(folders[kind], tmp_path / "executed")
    cases = []
    for number, words in enumerate(VERBS.values()):  # each verb gets two kinds, and each kind goes to some verb
        for kind in (list(folders)[number], list(folders)[(number + 4) % len(folders)]):
            cases.append((words[0], [word.format(folders[kind].parent) for word in words[1:]], kind))
    assert {kind for _, _, kind in cases} == set(plants.ATTACKS)
    (ends,) = distributed(plants.run_verbs, 1, cases)
    for (verb, words, kind), (code, said) in zip(cases, ends, strict=True):
        assert code == 2 and "is refused: " in said and "posix.system" in said, (verb, words, kind, code, said[-500:])
    assert not (tmp_path / "executed").exists()


def test_megatron_itself_does_not_run_it(whole, tmp_path, distributed):
    """Without our checks before: the bytes may change between the check and Megatron's reading."""
    folder = shutil.copytree(whole.parent, tmp_path / "planted") / "release"
    keys = [key for key in plants.objects(folder) if "/shard_" in key]
    for number, key in enumerate(keys):
        if key != "common_state/shard_0_1":  # which is loaded with each of the others
            plants.put(folder, key, saved([Touches(tmp_path / "executed")]), f"__p{number}.distcp")
    (found,) = distributed(plants.load_objects, 1, str(folder), keys)
    for key, error in found:
        if key != "common_state/shard_0_1":
            assert f"the record {key} is refused" in error and "posix.system" in error, (key, error)
    plants.in_common("optimizer")(folder, tmp_path / "executed")
    (found,) = distributed(plants.load_objects, 1, str(folder), ["rng_state/shard_0.0_1.1"])
    assert "the record common_state/shard_0_1 is refused" in found[0][1], found
    plants.in_index(folder, tmp_path / "executed")
    (found,) = distributed(plants.load_objects, 1, str(folder), ["rng_state/shard_0.0_1.1"])
    assert "it asks for posix.system, which no checkpoint index needs" in found[0][1], found
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["decoder.final_layernorm.weight", "embedding.word_embeddings.weight"])
def test_a_tensors_record_is_named_when_it_is_loaded(copy, tmp_path, job, key):
    replace_record(copy, key, saved(Touches(tmp_path / "executed")))
    words = ["evaluate", "--load", copy.parent, "--data-path", write_corpus(tmp_path / "text", [np.arange(100)])]
    done = job([*words, "--output", tmp_path / "scores.json", "--seq-length", "16", "--windows", "1"])
    assert done.returncode == 2, done.output[-2000:]
    assert f"the shard of {key}" in done.output and "posix.system" in done.output
    assert not (tmp_path / "executed").exists()
