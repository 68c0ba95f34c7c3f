"""Hostile and damaged checkpoints are refused, and nothing in them runs."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune.checkpoint import safe, safe_objects
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import CheckpointError
from tests.checkpoint import small


class Touches:
    """Unpickled by ``pickle``, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class ViaBuild:
    """The same, hidden behind an allowed class's state."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return dcp.StorageMeta, (), {"checkpoint_id": Touches(self.path)}


@pytest.fixture
def checkpoint(tmp_path):
    return small.write(tmp_path / "checkpoint") / "release"


@pytest.fixture
def proof(tmp_path):
    return tmp_path / "executed"


def replace_metadata(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_record(folder, key, payload):
    """Replace the bytes of a stored object or tensor shard."""

    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == key)
        metadata.storage_data[index] = _StorageInfo("__hostile.distcp", 0, len(payload))

    replace_metadata(folder, change)
    (folder / "__hostile.distcp").write_bytes(payload)


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_the_attacks_work_on_pickle(proof):
    """Otherwise the tests below prove nothing."""
    pickle.loads(pickle.dumps(Touches(proof)))
    assert proof.exists()


@pytest.mark.parametrize("attack", [Touches, ViaBuild])
def test_code_in_the_index_does_not_run(checkpoint, proof, attack):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(attack(proof)))
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it asks for posix\.system"):
        open_checkpoint(checkpoint)
    assert not proof.exists()


def test_code_in_the_planner_data_does_not_run(checkpoint, proof):
    replace_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", {"x": Touches(proof)}))
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(checkpoint)
    assert not proof.exists()


@pytest.mark.parametrize("payload", [lambda p: [Touches(p)], lambda p: [{"args": argparse.Namespace(x=Touches(p))}]])
def test_code_in_the_common_state_does_not_run(checkpoint, proof, payload):
    replace_record(checkpoint, "common_state/shard_0_1", saved(payload(proof)))
    with pytest.raises(CheckpointError, match="common state is refused.*posix.system"):
        open_checkpoint(checkpoint)
    assert not proof.exists()


def test_code_in_a_legacy_common_file_does_not_run(checkpoint, proof):
    torch.save({"args": Touches(proof)}, checkpoint / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt: the common state is refused"):
        open_checkpoint(checkpoint)
    assert not proof.exists()


def test_code_in_a_tensor_does_not_run(checkpoint, proof):
    replace_record(checkpoint, "decoder.final_layernorm.weight", saved(Touches(proof)))
    with pytest.raises(CheckpointError, match=r"__hostile\.distcp .*final_layernorm.*it asks for posix\.system"):
        open_checkpoint(checkpoint).read("decoder.final_layernorm.weight")
    assert not proof.exists()


def test_the_tools_refuse_it_too(checkpoint, proof):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touches(proof)))
    done = subprocess.run(
        [sys.executable, small.TOOLS / "inspect_checkpoint.py", checkpoint], capture_output=True, text=True
    )
    assert done.returncode == 2 and "refused" in done.stderr and "Traceback" not in done.stderr
    assert not proof.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b", "a\0b", 7])
def test_files_outside_the_directory_are_refused(checkpoint, name):
    (checkpoint.parent / "secret").write_bytes(b"x" * 100)

    def change(metadata):
        index = next(iter(metadata.storage_data))
        metadata.storage_data[index] = _StorageInfo(name, 0, 100)

    replace_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match="not inside the checkpoint"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [(-1, 10, "sizes"), (0, -10, "sizes"), (0, 1 << 61, "truncated"), (1 << 40, 10, "truncated"), ("0", 1, "refused")],
)
def test_byte_ranges_outside_the_file_are_refused(checkpoint, offset, length, message):
    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", offset, length)

    replace_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"not an archive",
        saved(torch.zeros(32))[:-100],
        saved(torch.zeros(31)),
        saved(torch.zeros(32, dtype=torch.float64)),
        saved([torch.zeros(32)]),
        saved({"a": 1}),
    ],
    ids=["empty", "garbage", "cut", "short", "double", "list", "dictionary"],
)
def test_damaged_records_are_refused(checkpoint, payload):
    replace_record(checkpoint, "decoder.final_layernorm.weight", payload)
    with pytest.raises(CheckpointError, match="__hostile"):
        open_checkpoint(checkpoint).read("decoder.final_layernorm.weight")


def test_a_view_beyond_its_storage_is_refused(checkpoint):
    """A record may claim more numbers than it holds; they must not be read from its neighbour."""
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(16)))) as whole, zipfile.ZipFile(forged, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name).replace(b"K\x10\x85", b"K\x20\x85"))  # size (16,) -> (32,)
    replace_record(checkpoint, "decoder.final_layernorm.weight", forged.getvalue())
    with pytest.raises(CheckpointError, match="reaches beyond its storage"):
        open_checkpoint(checkpoint).read("decoder.final_layernorm.weight")


def test_transposed_tensors_are_read_right(checkpoint):
    """A stored tensor need not be contiguous."""
    value = torch.arange(32.0 * 32).view(32, 32)
    metadata = safe.load_metadata(checkpoint)
    key = "embedding.word_embeddings.weight"
    first = next(i for i in metadata.storage_data if i.fqn == key)
    size = metadata.state_dict_metadata[key].size
    value = torch.arange(float(size.numel())).view(size[1], size[0]).T
    assert not value.is_contiguous() and len(metadata.state_dict_metadata[key].chunks) == 1
    replace_record(checkpoint, first.fqn, saved(value))
    found = open_checkpoint(checkpoint)
    assert torch.equal(found.read(key), value) and torch.equal(found.read_rows(key, 3, 9), value[3:9])


def test_megatrons_own_classes_in_args_are_inert(checkpoint):
    from megatron.core.transformer.enums import AttnBackend

    state = {"args": argparse.Namespace(**small.ARGS, attention_backend=AttnBackend.auto), "iteration": 3}
    torch.save(state, checkpoint / "common.pt")
    found = open_checkpoint(checkpoint)
    assert isinstance(found.args["attention_backend"], (safe.Opaque, AttnBackend))
    assert found.args["params_dtype"] == torch.float32


def test_megatrons_own_allow_list_survives_a_read(checkpoint):
    """Reading must not remove what Megatron registered in this process."""
    from megatron.core import safe_globals

    safe_globals.register_safe_globals()
    before = set(torch.serialization.get_safe_globals())
    open_checkpoint(checkpoint)
    assert set(torch.serialization.get_safe_globals()) == before


def test_it_survives_reads_in_several_threads(checkpoint):
    """As for object stores: each of two threads could take the other's list for Megatron's."""
    from megatron.core import safe_globals

    safe_globals.register_safe_globals()
    before = set(torch.serialization.get_safe_globals())
    payload = saved([{"x": list(range(3000))}])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: safe_objects.vet(payload, "x", "here"), range(64)))
    assert set(torch.serialization.get_safe_globals()) == before


def test_reading_does_not_import_megatron(checkpoint):
    code = "import sys; from megatron_prune.checkpoint.reader import open_checkpoint; open_checkpoint(sys.argv[1])"
    code += "; assert 'megatron.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, checkpoint], check=True)


def test_copies_are_independent(checkpoint, tmp_path):
    other = shutil.copytree(checkpoint.parent, tmp_path / "moved")
    assert open_checkpoint(other).fingerprint() == open_checkpoint(checkpoint).fingerprint()
