"""Hostile checkpoints and models, given to every tool that reads one: refused with a message, without side effects."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune.__main__ import main as run_verb
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import TRACKER_FILE
from megatron_prune.convert import inspect
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.errors import MegatronPruneError
from tests.checkpoint import small
from tests.checkpoint.test_safe import Touches, replace_metadata, replace_record, saved
from tests.training.small import any_plan

WEIGHT = "decoder.final_layernorm.weight"


def tool(verb):
    return lambda words: run_verb([verb, *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = small.write(tmp_path_factory.mktemp("whole") / "checkpoint")
    any_plan(open_checkpoint(root)).write(root.parent / "plan.json")
    return root


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint") / "release"


@pytest.fixture
def verbs(whole, tmp_path):
    """Every program that reads a checkpoint without running a model, as a function of the checkpoint."""
    inspecting, converting = tool("inspect"), tool("convert")
    out = tmp_path / "out"
    plan = ["--method", "random", "--target-ffn-hidden-size", "24", "--output", str(out / "plan.json")]
    return {
        "inspect": lambda load: inspecting([load, "--verify-integrity", "--sparsity"]),
        "export": lambda load: converting(["export", "--load", load, "--hf", str(out / "hf")]),
        "rewrite": lambda load: converting(["rewrite", "--load", load, "--save", str(out / "made")]),
        "plan": lambda load: run_verb(["plan", "--load", load, *plan]),
        "apply": lambda load: run_verb(
            ["apply", "--load", load, "--plan", str(whole.parent / "plan.json"), "--save", str(out / "made")]
        ),
    }


def with_args(**changes):
    def attack(folder, proof):
        state = {"args": Namespace(**small.ARGS | changes), "iteration": 0}
        replace_record(folder, "common_state/shard_0_1", saved([state]))

    return attack


def cyclic():
    value: list = []
    value.append(value)
    return value


def laughing():
    """A list of two lists of two lists …: a kilobyte with 2^60 elements."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


def metadata_bytes(payload):
    return lambda folder, proof: (folder / ".metadata").write_bytes(payload)


def stored(offset, length, name="__0_0.distcp"):
    def attack(folder, proof):
        def change(metadata):
            index = next(index for index in metadata.storage_data if index.fqn == WEIGHT)
            metadata.storage_data[index] = _StorageInfo(name, offset, length)

        replace_metadata(folder, change)

    return attack


def in_root(name, text):
    return lambda folder, proof: (folder.parent / name).write_text(text)


def in_folder(name, text):
    return lambda folder, proof: (folder / name).write_text(text)


def compressed(folder, proof):
    """A gigabyte of zeros in a megabyte."""
    with zipfile.ZipFile(folder / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"args": {}}, protocol=2))
        archive.writestr("archive/data/0", bytes(1 << 27))


def a_pipe(name):
    def attack(folder, proof):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return attack


def a_device(folder, proof):
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").symlink_to("/dev/zero")


def cyclic_metadata(folder, proof):
    def change(metadata):
        metadata.state_dict_metadata["loop"] = metadata.state_dict_metadata
        metadata.state_dict_metadata[WEIGHT].chunks.append(metadata.state_dict_metadata[WEIGHT].chunks)

    replace_metadata(folder, change)


def absurd_tensor(folder, proof):
    def change(metadata):
        entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"]
        entry.size = torch.Size((1 << 61, 96, 32))
        entry.chunks[0].sizes = torch.Size((1 << 61, 96, 32))

    replace_metadata(folder, change)


def a_huge_tracker(folder, proof):
    with open(folder.parent / TRACKER_FILE, "wb") as handle:
        handle.truncate(1 << 40)
    (folder / "metadata.json").unlink()


ATTACKS = {
    "code in the index": lambda folder, proof: metadata_bytes(pickle.dumps(Touches(proof)))(folder, proof),
    "code in the arguments": lambda folder, proof: with_args(x=Touches(proof))(folder, proof),
    "memo of the index": metadata_bytes(b"\x80\x04Nr" + struct.pack("<I", 1 << 31) + b"."),
    "bytes of the index": metadata_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x."),
    "frame of the index": metadata_bytes(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N."),
    "nested index": metadata_bytes(b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b"."),
    "cyclic index": cyclic_metadata,
    "absurd tensor": absurd_tensor,
    "traversal in a shard": stored(0, 10, "../secret"),
    "absolute shard": stored(0, 10, "/etc/passwd"),
    "offset beyond the file": stored(1 << 50, 10),
    "length beyond the file": stored(0, 1 << 61),
    "cyclic arguments": with_args(x=cyclic()),
    "laughing arguments": with_args(x=laughing()),
    "absurd layers": with_args(num_layers=10**12),
    "absurd width": with_args(hidden_size=1 << 60),
    "negative width": with_args(ffn_hidden_size=-48),
    "no heads": with_args(num_attention_heads=0),
    "words for numbers": with_args(num_layers="4"),
    "nothing for numbers": with_args(hidden_size=[]),
    "half a head": with_args(num_query_groups=1.5),
    "compressed arguments": compressed,
    "pipe for the index": a_pipe(".metadata"),
    "pipe for a shard": a_pipe("__0_0.distcp"),
    "device for a shard": a_device,
    "list for metadata.json": in_folder("metadata.json", "[]"),
    "number for metadata.json": in_folder("metadata.json", "5"),
    "deep metadata.json": in_folder("metadata.json", "[" * 200_000),
    "other backend": in_folder("metadata.json", '{"sharded_backend": "zarr"}'),
    "huge tracker": a_huge_tracker,
    "traversal in the tracker": lambda folder, proof: (
        (folder / "metadata.json").unlink(), in_root(TRACKER_FILE, "../../etc")(folder, proof)
    ),
    "digits in the tracker": lambda folder, proof: (
        (folder / "metadata.json").unlink(), in_root(TRACKER_FILE, "9" * 5000)(folder, proof)
    ),
}  # fmt: skip
# Records that only some tools read.
PARTIAL = {
    "list for pruning.json": (in_folder("pruning.json", "[]"), {"inspect", "rewrite", "apply"}),
    "words for pruning.json": (in_folder("pruning.json", '{"chain": ["x"]}'), {"inspect", "rewrite", "apply"}),
    "list for integrity.json": (in_folder("integrity.json", "[]"), {"inspect"}),
    "traversal in integrity.json": (in_folder("integrity.json", '{"files": {"../secret": "0"}}'), {"inspect"}),
    "nothing in integrity.json": (in_folder("integrity.json", '{"files": {}}'), {"inspect"}),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_every_tool_refuses_it(checkpoint, verbs, tmp_path, capsys, kind):
    (tmp_path / "secret").write_bytes(b"x" * 100)
    (tmp_path / "out").mkdir()
    ATTACKS[kind](checkpoint, tmp_path / "executed")
    before = sorted(path for path in tmp_path.rglob("*"))
    for verb, run in verbs.items():
        assert run(str(checkpoint.parent)) == 2, verb
        out, err = capsys.readouterr()
        assert "Traceback" not in err and len(err) < 2000 and len(err.splitlines()) == 1, (verb, err)
        assert sorted(path for path in tmp_path.rglob("*")) == before, verb


@pytest.mark.parametrize("kind", PARTIAL)
def test_who_reads_it_refuses_it(checkpoint, verbs, tmp_path, capsys, kind):
    attack, readers = PARTIAL[kind]
    attack(checkpoint, tmp_path / "executed")
    for verb in readers:
        assert verbs[verb](str(checkpoint.parent)) == 2, verb
        assert "Traceback" not in capsys.readouterr().err


def test_other_urls_are_refused_by_flag(verbs, tmp_path, capsys, whole):
    for verb, run in verbs.items():
        assert run("s3://bucket/checkpoint") == 2
        said = capsys.readouterr().err
        assert (
            "--load: expected a directory, or msc://PROFILE/… with --enable-msc, got s3://bucket/checkpoint" in said
        ), verb
    rewrite = ["rewrite", "--load", str(whole), "--save", "msc://profile/x"]
    assert tool("convert")(rewrite) == 2
    assert "got msc://profile/x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("release/run_config.yaml", "Megatron-Bridge"),
        ("release/modelopt_state/common.pt", "ModelOpt"),
        ("release/config.json", "Hugging Face model"),
    ],
)
def test_other_programs_directories_are_named(checkpoint, file, message):
    path = checkpoint.parent / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    with pytest.raises(MegatronPruneError, match=message):
        open_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("name", ["train_state.pt", "latest_train_state.pt", "weights/x", "config.json"])
def test_other_programs_directories_without_ours_are_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(MegatronPruneError, match="Bridge|NeMo|Hugging Face model"):
        open_checkpoint(tmp_path)


# -- random damage ---------------------------------------------------------------------------


def mutations(content: bytes, draws: random.Random, start: int = 0, stop: int | None = None) -> bytes:
    """``content`` with a byte changed, a piece cut out, doubled, or overwritten, between ``start`` and ``stop``."""
    changed = bytearray(content)
    for _ in range(draws.randint(1, 3)):
        at = draws.randrange(start, stop or len(changed))
        kind, length = draws.randrange(4), draws.randint(1, 16)
        if kind == 0:
            changed[at] = draws.randrange(256)
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[max(0, at - length) : at]
        else:
            changed[at : at + length] = draws.randbytes(length)
    return bytes(changed)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "pruning.json", "integrity.json", "common.pt"])
def test_no_bytes_crash_a_reader(checkpoint, name):
    """A file with random changes is read, or refused with a message; nothing else happens."""
    path, draws = checkpoint / name, random.Random(name)
    if name == "common.pt":
        torch.save({"args": Namespace(**small.ARGS), "iteration": 3, "checkpoint_version": 3.0}, path)
    original, refused = path.read_bytes(), 0
    for _ in range(150):
        path.write_bytes(mutations(original, draws))
        try:
            found = open_checkpoint(checkpoint)
            found.verify(hashes=True)
            json.dumps(inspect.describe(found))
        except MegatronPruneError:
            refused += 1
    assert refused > 75
    path.write_bytes(original)
    json.dumps(inspect.describe(open_checkpoint(checkpoint)))


def test_no_bytes_crash_the_reader_of_numbers(checkpoint):
    path, draws = checkpoint / "__0_0.distcp", random.Random(5)
    record = next(box.piece for box in open_checkpoint(checkpoint).boxes(WEIGHT))
    original = path.read_bytes()
    for _ in range(150):
        changed = mutations(original[record.start : record.start + record.length], draws)[: record.length]
        content = bytearray(original)
        content[record.start : record.start + len(changed)] = changed
        path.write_bytes(content)
        try:
            open_checkpoint(checkpoint).read(WEIGHT)
        except MegatronPruneError as error:
            assert "__0_0.distcp" in str(error)


# -- Hugging Face models --------------------------------------------------------------------------

ODD = ["x", -1, 0, 10**12, 1.5, [], {}, True, "1" * 5000]
NOT_SO_ODD = [
    ("rope_parameters", {}), ("rope_parameters", []), ("rope_parameters", 0), ("rope_theta", 1.5),
    *(("rms_norm_eps", value) for value in (0, 1.5, 10**12)), *(("rope_theta", value) for value in (0, 10**12)),
]  # fmt: skip


KEYS = (
    "num_hidden_layers hidden_size num_attention_heads vocab_size num_key_value_heads intermediate_size head_dim "
    "rope_theta max_position_embeddings rms_norm_eps rope_parameters model_type"
)


@pytest.mark.parametrize("key", KEYS.split())
def test_odd_configs_are_refused(tiny_hf, tmp_path, key):
    shutil.copytree(tiny_hf("llama-gqa"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for value in ODD:
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {key: value}))
        if (key, value) in NOT_SO_ODD and value is not True:
            continue
        with pytest.raises(MegatronPruneError, match="RoPE parameters" if key == "rope_parameters" else key):
            import_hf(tmp_path / "hf", tmp_path / "made")
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "5",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 7}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        "[",
    ],
)
def test_odd_indices_are_refused(tiny_hf, tmp_path, index):
    shutil.copytree(tiny_hf("llama-gqa"), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()  # beside it no index is read
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(MegatronPruneError, match=r"model\.safetensors\.index\.json"):
        import_hf(tmp_path / "hf", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_headers_that_lie_are_refused(tiny_hf, tmp_path):
    """Offsets beyond the file, overlapping tensors, absurd sizes: as the safetensors library refuses them."""
    hf = Path(shutil.copytree(tiny_hf("llama-gqa"), tmp_path / "hf"))
    original = (hf / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    header = json.loads(original[8 : 8 + length])
    name = "model.norm.weight"
    for change in (
        {"data_offsets": [0, 1 << 60]}, {"shape": [1 << 40]}, {"data_offsets": [10, 5]}, {"dtype": "X"}, {"shape": "x"}
    ):  # fmt: skip
        text = json.dumps(header | {name: header[name] | change}).encode()
        stream = io.BytesIO()
        stream.write(struct.pack("<Q", len(text)) + text + original[8 + length :])
        (hf / "model.safetensors").write_bytes(stream.getvalue())
        with pytest.raises(MegatronPruneError, match=r"model\.safetensors|model\.norm\.weight"):
            import_hf(hf, tmp_path / "made")
        assert not (tmp_path / "made").exists()
