"""Megatron's own loading is safe if a checkpoint changes after the check, and still gets what it needs."""

from __future__ import annotations

import argparse
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.planner import SavePlan

from megatron_prune.checkpoint import safe
from megatron_prune.engine import safe_loading
from megatron_prune.errors import CheckpointError
from tests.checkpoint import many_shards, plants


@pytest.mark.parametrize("make", [plants.inside_bytes, plants.inside_signed, plants.inside_stream])
def test_a_modules_state_is_vetted_once_more_before_a_module_gets_it(tmp_path, make):
    state = {"iteration": 3, "model": {"decoder.layers.0.mlp.linear_fc1._extra_state": make(tmp_path / "executed")}}
    load = safe_loading._vetted(lambda load_dir, args: (state, "iter_3", False, None))
    with pytest.raises(CheckpointError, match=r"iter_3: decoder.*_extra_state is refused: .*posix\.system"):
        load("somewhere", argparse.Namespace())
    assert not (tmp_path / "executed").exists()
    state["model"] = {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(0, dtype=torch.uint8)}
    assert load("somewhere", argparse.Namespace())[0] is state


def test_the_plans_in_an_index_are_torchs_own():
    """Megatron compares them with those of its next save (--ckpt-assume-constant-structure)."""
    index = dcp.Metadata(state_dict_metadata={}, storage_data={})
    index.all_local_plans = [SavePlan(items=[])]
    found = safe_loading._IndexPickle().load(io.BytesIO(pickle.dumps(index)))
    assert found.all_local_plans == index.all_local_plans and type(found.all_local_plans[0]) is SavePlan


def test_an_index_that_asks_for_code_is_refused(tmp_path):
    from tests.checkpoint.test_safe import Touches

    with pytest.raises(CheckpointError, match=r"it asks for posix\.system"):
        safe_loading._IndexPickle().load(io.BytesIO(pickle.dumps(Touches(tmp_path / "executed"))))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["made", "torch's"])
def test_megatron_reads_the_index_of_a_hundred_gpus(tmp_path, monkeypatch, real):
    """Start-up accepted it and Megatron's reader, minutes later, did not."""
    directory = many_shards.write(tmp_path / "checkpoint", 31_000, real=real) / "release"
    assert len(safe.load_metadata(directory).storage_data) > 31_000
    safe_loading.install_index_reader(monkeypatch.setattr)
    found = FileSystemReader(directory).read_metadata()
    assert len(found.storage_data) > 31_000 and found.state_dict_metadata.keys() > {"embedding.word_embeddings.weight"}


def test_a_large_index_without_files_of_its_size_is_refused(tmp_path, monkeypatch):
    """It costs time, and is small enough to be sent to somebody."""
    safe_loading.install_index_reader(monkeypatch.setattr)
    pickled = pickle.dumps(dcp.Metadata({}, planner_data=[[] for _ in range(600_000)]))
    (tmp_path / ".metadata").write_bytes(pickled)
    for read in (safe.load_metadata, lambda directory: FileSystemReader(directory).read_metadata()):
        with pytest.raises(CheckpointError, match=r"more than 1,0\d\d,\d\d\d steps"):
            read(tmp_path)
