"""The reader against Megatron: checkpoints that Megatron saved, at several layouts and namings."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import CheckpointError
from tests.checkpoint import ranks

# tensor parallel, pipeline parallel, data parallel, content metadata
SAVED = {
    "one": (1, 1, 1, {}),
    "tp2": (2, 1, 1, {}),
    "tp2-pp2": (2, 2, 1, {}),
    "dp2": (1, 1, 2, {}),
    "per-layer": (2, 1, 1, {"non_homogeneous_layers": True}),
    "singleton": (2, 1, 1, {"singleton_local_shards": True}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, distributed):
    made = {}

    def get(name):
        if name not in made:
            tp, pp, dp, metadata = SAVED[name]
            folder = tmp_path_factory.mktemp("saved") / name / "iter_0000020"
            distributed(ranks.save, tp * pp * dp, str(folder), tp, pp, metadata)
            made[name] = folder
        return made[name]

    return get


@pytest.fixture
def copy(saved, tmp_path):
    """A checkpoint of our own to damage."""
    return shutil.copytree(saved("tp2-pp2"), tmp_path / "iter_0000020")


@pytest.mark.parametrize("name", SAVED)
def test_reads_what_megatron_saved(name, saved):
    """Every logical weight, read whole, by rows and by blocks, equals the result of torch's own reader."""
    checkpoint = open_checkpoint(saved(name))
    plain = stored_tensors(saved(name))
    assert checkpoint.iteration == 20 and not checkpoint.release
    assert len(checkpoint.names) == 3 + 6 * 4
    for weight in checkpoint.names:
        expected = logical(plain, weight)
        spec = checkpoint.spec(weight)
        assert (spec.shape, spec.dtype) == (tuple(expected.shape), torch.float32)
        assert spec.nbytes == expected.nbytes
        assert torch.equal(checkpoint.read(weight), expected)
        assert torch.equal(checkpoint.read_rows(weight, 5, 29), expected[5:29])
        blocks = list(checkpoint.row_blocks(weight, max_bytes=7 * 4 * 32))
        assert max(map(len, blocks)) <= 7 * 32 and torch.equal(torch.cat(blocks), expected)


def stored_tensors(folder):
    """Every tensor of a checkpoint under its stored key, read by torch."""
    import torch.distributed.checkpoint as dcp

    index = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in index.items()
        if isinstance(entry, dcp.TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def logical(plain, weight):
    """A per-layer weight from stored tensors, stacked or not, gate and up separate or not."""
    if weight in plain:
        return plain[weight]
    if weight + "_w" in plain:
        return torch.cat([plain[weight + "_w"], plain[weight + "_v"]])
    _, _, layer, suffix = weight.split(".", 3)
    return plain[f"decoder.layers.{suffix}"][int(layer)]


def test_fingerprint_knows_weights_not_layouts(saved):
    """Pipeline stages have different seeds, so only checkpoints of one pipeline depth hold the same weights."""
    same = {name: open_checkpoint(saved(name)).fingerprint() for name in ("tp2", "per-layer", "singleton")}
    assert len(set(same.values())) == 1
    assert open_checkpoint(saved("tp2-pp2")).fingerprint() not in same.values()


def test_other_state_is_left_alone(saved):
    checkpoint = open_checkpoint(saved("one"))
    assert "optimizer.state.exp_avg.decoder" in checkpoint.stored
    assert not any("optimizer" in name for name in checkpoint.names)
    assert checkpoint.args["consumed_train_samples"] == 640
    assert checkpoint.pruning == []


def test_hashes_of_megatron_are_checked(copy):
    checkpoint = open_checkpoint(copy)
    checkpoint.verify(hashes=True)
    victim = copy / "__1_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    open_checkpoint(copy)  # the length is right
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is damaged"):
        open_checkpoint(copy).verify(hashes=True)


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_shard_is_refused_by_name(copy, keep):
    victim = copy / "__3_0.distcp"
    size = victim.stat().st_size
    os.truncate(victim, size - 1 if keep == -1 else int(size * keep) if keep < 1 else keep)
    with pytest.raises(CheckpointError, match=r"__3_0\.distcp is truncated"):
        open_checkpoint(copy)


def test_missing_shard_is_refused_by_name(copy):
    (copy / "__2_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__2_0\.distcp is missing"):
        open_checkpoint(copy)


def test_shard_missing_from_the_index_is_refused(copy):
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="linear_fc1.*covered exactly once"):
        open_checkpoint(copy)


def test_unfinished_save_is_refused(copy):
    (copy / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="save was not finished"):
        open_checkpoint(copy)


def test_another_format_is_refused(copy):
    (copy / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="zarr"):
        open_checkpoint(copy)


@pytest.mark.parametrize("path", ["nothing", ""])
def test_what_is_no_checkpoint_is_refused(tmp_path, path):
    with pytest.raises(CheckpointError, match="expected the directory|no complete checkpoint"):
        open_checkpoint(tmp_path / path)


def test_args_that_lie_about_the_weights_are_refused(saved, tmp_path, distributed, monkeypatch):
    from megatron_prune.checkpoint import safe_objects

    real = safe_objects.load_common
    for change, message in (
        ({"ffn_hidden_size": 44}, r"linear_fc1\.weight: expected shape .* from the stored args"),
        ({"num_layers": 3}, "from the stored args"),
        ({"normalization": "LayerNorm"}, "expected .*bias.*, got a checkpoint without it"),
        (
            {"untie_embeddings_and_output_weights": False},
            "expected the weights of a dense GPT, got others too: .*output_layer",
        ),
        ({"num_experts": 8}, "num_experts=8"),
    ):
        monkeypatch.setattr(
            safe_objects, "load_common", lambda *a, change=change: (s := real(*a)) | {"args": s["args"] | change}
        )
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(saved("one"))


def test_rows_out_of_range(saved):
    with pytest.raises(IndexError):
        open_checkpoint(saved("one")).read_rows("decoder.final_layernorm.weight", 0, 33)


def test_pretrained_by_megatron_with_optimizer(job, tiny_corpus, tmp_path):
    """A real save of the training loop at TP2 x PP2 with the distributed optimizer."""
    run = tmp_path / "run"
    sizes = "--num-layers 2 --hidden-size 48 --num-attention-heads 6 --num-query-groups 2 --group-query-attention"
    shape = "--ffn-hidden-size 96 --swiglu --normalization RMSNorm --disable-bias-linear"
    shape += " --position-embedding-type rope"
    training = "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3"
    words = f"{sizes} {shape} {training} --untie-embeddings-and-output-weights --bf16 --use-distributed-optimizer"
    words += " --stream-seed 1 --stream-range 0:4 --vocab-size 384 --tensor-model-parallel-size 2"
    words += " --pipeline-model-parallel-size 2 --verify-integrity"
    words += " --save-interval 1 --ckpt-assume-constant-structure"  # the second save's index holds the first's plans
    job(["pretrain", *words.split(), "--data-path", tiny_corpus, "--save", run], nproc=4).ok()
    checkpoint = open_checkpoint(run)
    assert (checkpoint.iteration, checkpoint.args["consumed_train_samples"]) == (2, 4)
    assert checkpoint.shape.num_query_groups == 2 and not checkpoint.shape.tied
    assert checkpoint.spec("decoder.layers.1.mlp.linear_fc1.weight").dtype == torch.bfloat16
    assert any(key.startswith("optimizer") for key in checkpoint.stored)
    checkpoint.verify(hashes=True)
    assert all(checkpoint.read(name).isfinite().all() for name in checkpoint.names)
    assert read_json(run / "account.json")["parameters"] == checkpoint.shape.parameters()
