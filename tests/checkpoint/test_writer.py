"""The writer: what Megatron loads from it, what it refuses, and what remains after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint import record
from megatron_prune.checkpoint import writer as writer_module
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.safe import Opaque
from megatron_prune.checkpoint.writer import CheckpointWriter, rewrite_args
from megatron_prune.errors import CheckpointError, MegatronPruneError
from tests.checkpoint import ranks, small


def test_round_trip_and_what_lies_beside_the_weights(tmp_path):
    chain = [{"method": "shortgpt", "plan": "abc"}]
    root = small.write(tmp_path / "made", block_rows=7, pruning=chain)
    checkpoint = open_checkpoint(root)
    for name, expected in small.tensors().items():
        assert torch.equal(checkpoint.read(name), expected)
    assert checkpoint.release and checkpoint.iteration == 0
    assert checkpoint.pruning == chain
    assert read_json(checkpoint.directory / "pruning.json")["fingerprint"] == checkpoint.fingerprint()
    checkpoint.verify(hashes=True)
    assert set(os.listdir(root)) == {"release", "latest_checkpointed_iteration.txt"}
    assert set(read_json(checkpoint.directory / "integrity.json")["files"]) == {
        ".metadata", "metadata.json", "pruning.json", "__0_0.distcp"}  # fmt: skip


def test_block_sizes_do_not_change_the_fingerprint(tmp_path):
    found = {open_checkpoint(small.write(tmp_path / str(n), block_rows=n)).fingerprint() for n in (1, 5, 1000)}
    assert len(found) == 1
    other = open_checkpoint(small.write(tmp_path / "bf16", dtype=torch.bfloat16)).fingerprint()
    assert other not in found


def test_the_fingerprint_is_of_64_elements_of_every_weight(tmp_path):
    """From the definition: name, shape, type and elements evenly spaced from the first to the last."""
    checkpoint = open_checkpoint(small.write(tmp_path / "made", block_rows=7))
    digest, expected = hashlib.sha256(), small.tensors()
    for name in checkpoint.names:
        weight = expected[name]
        digest.update(json.dumps([name, list(weight.shape), "torch.float32"]).encode())
        count = min(64, weight.numel())
        places = [i * (weight.numel() - 1) // max(1, count - 1) for i in range(count)]
        assert (places[0], places[-1], len(set(places))) == (0, weight.numel() - 1, count)
        digest.update(weight.flatten()[places].numpy().tobytes())
    assert checkpoint.fingerprint() == digest.hexdigest()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_megatron_loads_it_at_other_layouts(tp, pp, tmp_path, distributed):
    """Strictly, with Megatron's own loader and hashes; each rank's parameters are the slices they should be."""
    directory = small.write(tmp_path / "made", block_rows=13) / "release"
    expected = small.tensors()
    loaded = distributed(ranks.load, tp * pp, str(directory), tp, pp)
    seen = set()
    for rank, parameters in enumerate(loaded):
        tp_rank, pp_rank = rank % tp, rank // tp
        for name, value in parameters.items():
            full = global_name(name, pp_rank * small.ARGS["num_layers"] // pp)
            seen.add(full)
            assert torch.equal(value, shard(full, expected[full], tp, tp_rank)), (rank, name)
    assert seen == set(expected)


def global_name(name, first_layer):
    """Our name of a parameter of Megatron's local spec in a pipeline stage."""
    if not name.startswith("decoder.layers."):
        return name
    _, _, layer, rest = name.split(".", 3)
    rest = rest.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    rest = rest.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    return f"decoder.layers.{int(layer) + first_layer}.{rest}"


def shard(name, tensor, tp, rank):
    """Rank ``rank``'s slice under tensor parallelism, written out by hand."""
    if name.endswith("linear_fc1.weight"):
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(tp, dim=1)[rank]
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return tensor.chunk(tp)[rank]
    return tensor


def test_large_blocks_become_several_records(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "RECORD_BYTES", 1024)
    monkeypatch.setattr(record, "FILE_BYTES", 10_000)
    checkpoint = open_checkpoint(small.write(tmp_path / "made"))
    for stored in checkpoint.stored.values():
        assert all(torch.Size(piece.sizes).numel() * 4 <= 1024 for piece in stored.pieces)
    assert len(list(checkpoint.directory.glob("*.distcp"))) > 3
    for name, expected in small.tensors().items():
        assert torch.equal(checkpoint.read(name), expected)


def test_blocks_that_are_views_are_stored_small(tmp_path):
    big = torch.randn(128, 32 * 50)
    size = {}
    for kind, embedding in (("view", big[:, ::50]), ("copy", big[:, ::50].contiguous())):
        with CheckpointWriter(tmp_path / kind, args=small.ARGS, dtype=torch.float32) as writer:
            for name, tensor in small.tensors().items():
                blocks = embedding if name.startswith("embedding") else tensor
                writer.add(name, tensor.shape, [blocks[:64], blocks[64:]])
        size[kind] = (tmp_path / kind / "release" / "__0_0.distcp").stat().st_size
        assert torch.equal(open_checkpoint(tmp_path / kind).read("embedding.word_embeddings.weight"), big[:, ::50])
    assert size["view"] == size["copy"]


def test_types_are_kept_or_cast(tmp_path):
    with CheckpointWriter(tmp_path / "made", args=small.ARGS, dtype=torch.bfloat16) as writer:
        for name, tensor in small.tensors().items():
            writer.add(name, tensor.shape, [tensor], dtype=torch.float32 if "layer_norm" in name else None)
    checkpoint = open_checkpoint(tmp_path / "made")
    assert checkpoint.spec("decoder.layers.0.mlp.linear_fc1.layer_norm_weight").dtype == torch.float32
    assert checkpoint.spec("decoder.layers.0.mlp.linear_fc1.weight").dtype == torch.bfloat16
    assert checkpoint.args["params_dtype"] == torch.bfloat16 and checkpoint.args["bf16"] is True


def test_stored_arguments_start_anew():
    old = {
        "hidden_size": 8, "consumed_train_samples": 5, "consumed_valid_samples": 6, "skipped_train_samples": 7,
        "iteration": 9, "load": "/a", "save": "/b", "seed": 1234, "attention_backend": Opaque(5),
        "lists": [1, (2, 3)], "bad": [Opaque(1)],
    }  # fmt: skip
    new = rewrite_args(old, torch.float32)
    assert new["hidden_size"] == 8 and new["seed"] == 1234 and new["lists"] == [1, (2, 3)]
    for key in ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples", "iteration"):
        assert new[key] == 0
    assert not {"load", "save", "attention_backend", "bad"} & set(new)


class Refusals:
    """Each writes a checkpoint wrongly."""

    @staticmethod
    def unknown_weight(writer, tensors):
        writer.add("decoder.layers.9.mlp.linear_fc1.weight", (1, 1), [torch.zeros(1, 1)])

    @staticmethod
    def wrong_shape(writer, tensors):
        writer.add("decoder.final_layernorm.weight", (31,), [torch.zeros(31)])

    @staticmethod
    def wrong_block(writer, tensors):
        writer.add("output_layer.weight", (128, 32), [torch.zeros(128, 31)])

    @staticmethod
    def too_few_rows(writer, tensors):
        writer.add("output_layer.weight", (128, 32), [torch.zeros(127, 32)])

    @staticmethod
    def twice(writer, tensors):
        for _ in range(2):
            writer.add("decoder.final_layernorm.weight", (32,), [torch.zeros(32)])

    @staticmethod
    def incomplete(writer, tensors):
        for name, tensor in list(tensors.items())[:-1]:
            writer.add(name, tensor.shape, [tensor])

    @staticmethod
    def layers_of_two_types(writer, tensors):
        for layer in range(2):
            name = f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight"
            writer.add(name, (32,), [torch.zeros(32)], dtype=(torch.float32, torch.bfloat16)[layer])


@pytest.mark.parametrize(
    ("wrongly", "message"),
    [
        (Refusals.unknown_weight, "expected a weight of the model"),
        (Refusals.wrong_shape, r"expected \[32\] as the stored args say, got \[31\]"),
        (Refusals.wrong_block, "expected blocks of rows of"),
        (Refusals.too_few_rows, "expected 128 rows, got 127"),
        (Refusals.twice, "expected each weight once"),
        (Refusals.incomplete, "got none for output_layer.weight and 0 more"),
        (Refusals.layers_of_two_types, "must have the same type"),
    ],
)
def test_refuses_and_leaves_nothing(tmp_path, wrongly, message):
    with pytest.raises(CheckpointError, match=message):
        with CheckpointWriter(tmp_path / "made", args=small.ARGS, dtype=torch.float32) as writer:
            wrongly(writer, small.tensors())
    assert os.listdir(tmp_path) == []


def test_an_existing_directory_is_refused(tmp_path):
    small.write(tmp_path / "made")
    before = open_checkpoint(tmp_path / "made").fingerprint()
    with pytest.raises(MegatronPruneError, match="already exists"):
        small.write(tmp_path / "made")
    assert open_checkpoint(tmp_path / "made").fingerprint() == before


def test_a_disk_too_small_is_refused_before_work(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"GB free, which made needs, got"):
        small.write(tmp_path / "made")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    """On the writing thread, after some records are out."""
    written = small.disk_with(monkeypatch, 50_000)
    with pytest.raises(CheckpointError, match="no space left while writing .*made"):
        small.write(tmp_path / "made")
    assert sum(written) > 50_000 and os.listdir(tmp_path) == []


SLOW_WRITER = """
import sys, time, torch
from tests.checkpoint import small
from megatron_prune.checkpoint.writer import CheckpointWriter
with CheckpointWriter(sys.argv[1], args=small.ARGS, dtype=torch.float32) as writer:
    for i, (name, tensor) in enumerate(small.tensors().items()):
        writer.add(name, tensor.shape, [tensor])
        if i == 12:
            print("half", flush=True)
            time.sleep(7200)
"""


def test_killed_while_writing_nothing_is_taken_for_a_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, tmp_path / "made"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) != []  # it had begun
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "made")
    small.write(tmp_path / "made")  # the rerun removes the remains and succeeds
    assert os.listdir(tmp_path) == ["made"]
    for name, expected in small.tensors().items():
        assert torch.equal(open_checkpoint(tmp_path / "made").read(name), expected)


def test_every_weight_kind_of_the_layout_table_is_written(tmp_path):
    """Biases, LayerNorm, learned positions and query/key norms too."""
    args = small.ARGS | {
        "normalization": "LayerNorm", "add_bias_linear": True, "qk_layernorm": True, "swiglu": False,
        "position_embedding_type": "learned_absolute", "max_position_embeddings": 16,
        "untie_embeddings_and_output_weights": False,
    }  # fmt: skip
    checkpoint = open_checkpoint(small.write(tmp_path / "made", args))
    assert len(checkpoint.names) == len(list(weights(ModelShape.from_args(args)))) == 4 + 16 * 4
    for name, expected in small.tensors(args).items():
        assert torch.equal(checkpoint.read(name), expected)
