"""Paths, positions, copies and tables in a store, against the same on a disk; and a store that does not answer."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest

from megatron_prune import artifacts, storage
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration, is_complete, repair_tracker
from megatron_prune.errors import MegatronPruneError, StorageError, UsageError
from tests.checkpoint import small


@pytest.fixture(params=["path", "disk", "s3"])
def root(request, configured, tmp_path):
    """An empty directory on a disk, and in each store."""
    if request.param == "path":
        return tmp_path / "root"
    return storage.path(f"msc://{request.param}/{tmp_path.name}")


def test_paths_are_those_of_pathlib(root):
    assert storage.path(str(root)) == root == storage.path(root)
    assert storage.path(Path(str(root))) == root  # a Path merges two slashes
    assert (root / "a").parent == root and (root / "a" / "b").name == "b"
    assert pickle.loads(pickle.dumps(root)) == root and str(root / "a") == f"{root}/a"
    assert (root / "a" / "b").relative_to(root).as_posix() == "a/b"


def test_files_come_and_go(root):
    assert not root.exists() and not (root / "a.json").is_file() and not root.is_dir()
    artifacts.write_json(root / "sub" / "a.json", {"a": 1})
    artifacts.write_json(root / "sub" / "a.json", {"a": 2})
    artifacts.write_bytes(root / "b", b"")
    assert artifacts.read_json(root / "sub" / "a.json") == {"a": 2}
    assert root.is_dir() and (root / "sub").is_dir() and not (root / "sub").is_file()
    assert (root / "sub" / "a.json").is_file() and not (root / "sub" / "a.json").is_dir()
    assert not (root / "sub" / "a.json" / "below").exists()
    assert sorted(path.name for path in root.iterdir()) == ["b", "sub"]
    assert storage.files(root) == [root / "b", root / "sub" / "a.json"]
    (root / "b").unlink()
    (root / "b").unlink(missing_ok=True)
    assert not (root / "b").exists()
    with pytest.raises(MegatronPruneError, match="none does not exist"):
        artifacts.read_json(root / "none")
    with pytest.raises(FileNotFoundError):
        storage.open_bytes(root / "none")


def test_bytes_are_read_by_position(root):
    payload = bytes(range(256)) * 1000  # more than a block
    artifacts.write_bytes(root / "x", payload)
    artifacts.write_bytes(root / "empty", b"")
    handle = storage.open_bytes(root / "x")
    assert handle.read(5, 3) == payload[3:8] and handle.read(5, len(payload) - 2) == payload[-2:]
    assert handle.read(5, len(payload)) == handle.read(5, 10**9) == b"" == storage.open_bytes(root / "empty").read(1, 0)
    for start, length in ((65_530, 10), (100, 131_072), (65_536, 65_536), (200_000, 100_000)):
        assert handle.read(length, start) == payload[start : start + length]
        buffer = bytearray(length)
        got = handle.read_into(memoryview(buffer), start)
        assert got and buffer[:got] == payload[start : start + got]
    window = storage.Window(handle, 10, 20)
    assert window.seek(-5, 2) == 15 and window.read() == payload[25:30] and window.read() == b""
    assert artifacts.sha256_file(root / "x") == hashlib.sha256(payload).hexdigest()
    assert (root / "x").stat().st_size == len(payload) and (root / "x").stat().st_mtime > 1e9


def test_directories_are_copied_either_way(store, tmp_path, monkeypatch):
    for name in ("a", "last", "sub/z"):
        artifacts.write_bytes(tmp_path / "source" / name, name.encode())
    put, upload = [], storage.StorePath.upload
    monkeypatch.setattr(storage.StorePath, "upload", lambda self, file: (put.append(self.name), upload(self, file)))
    artifacts.copy_directory(tmp_path / "source", store.path("copy"), last="last")
    assert put == ["a", "z", "last"]
    artifacts.copy_directory(store.path("copy"), store.path("again"))
    artifacts.copy_directory(store.path("again"), tmp_path / "back")
    found = {str(file.relative_to(tmp_path / "back")): file.read_text() for file in storage.files(tmp_path / "back")}
    assert found == {name: name for name in ("a", "last", "sub/z")}


def test_a_table_has_every_row_when_it_is_settled(root, monkeypatch):
    monkeypatch.setattr(storage, "_SHARE", 10**9)  # the second row would not be written for a year
    artifacts.write_bytes(root / "t", b"head\n")
    table = storage.GrowingText(root / "t", "head\n")
    for row in ("1\n", "2\n"):
        table.write(row)
    assert (root / "t").read_text() == ("head\n1\n2\n" if isinstance(root, Path) else "head\n1\n")
    table.settle()
    assert (root / "t").read_text() == "head\n1\n2\n"
    table.write("3\n")
    table.close()
    assert (root / "t").read_text() == "head\n1\n2\n3\n"


def test_a_table_whose_store_fails_is_put_later(configured):
    table = storage.GrowingText(storage.path("msc://silent/t"), "head\n")
    table.write("1\n")
    with pytest.raises(StorageError):
        table.settle()
    table._where = storage.path("msc://disk/table")  # it answers again
    table.close()
    assert storage.path("msc://disk/table").read_text() == "head\n1\n"


def test_a_checkpoint_is_the_same_there(store, tmp_path):
    local = open_checkpoint(small.write(tmp_path / "checkpoint"))
    there = open_checkpoint(store.put(tmp_path / "checkpoint", "checkpoint"))
    there.verify(hashes=True)
    assert there.fingerprint() == local.fingerprint() and there.full_hash() == local.full_hash()
    assert there.args == local.args and there.pruning == local.pruning and there.format == "torch_dist"
    assert str(there.directory) == store("checkpoint/release")


@pytest.mark.parametrize("tracker", ["", "../../x", "-1", "9" * 5_000_000])
def test_a_hostile_tracker_is_replaced_or_passed_over(store, tmp_path, tracker):
    small.write(tmp_path / "checkpoint")
    root = store.path("checkpoint")
    store.put(tmp_path / "checkpoint", "checkpoint")
    (root / "latest_checkpointed_iteration.txt").write_bytes(tracker.encode())
    assert find_iteration(root).directory == root / "release"
    assert repair_tracker(root) == root / "release"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_half_a_save_is_none(disk, tmp_path):
    small.write(tmp_path / "checkpoint")
    root = disk.path("checkpoint")
    disk.put(tmp_path / "checkpoint", "checkpoint")
    shard = max((root / "release").iterdir(), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert not is_complete(root / "release")
    with pytest.raises(MegatronPruneError, match="truncated"):
        open_checkpoint(root)


def test_legacy_files_are_refused(disk, tmp_path):
    folder = tmp_path / "legacy" / "iter_0000001" / "mp_rank_00"
    artifacts.write_bytes(folder / "model_optim_rng.pt", b"x")
    with pytest.raises(MegatronPruneError, match="legacy per-rank files.*only be read from a disk"):
        open_checkpoint(disk.put(tmp_path / "legacy", "legacy") + "/iter_0000001")


def test_a_store_that_does_not_answer_is_no_empty_one(configured):
    """Otherwise a run would start again over its own saves."""
    root = storage.path("msc://silent/run")
    for ask in (find_iteration, repair_tracker, is_complete, open_checkpoint, type(root).exists, type(root).is_dir):
        with pytest.raises(StorageError, match="msc://silent/run"):
            ask(root)
    assert not storage.is_reachable(root)


def test_other_addresses_are_refused_with_the_way_out(configured, monkeypatch):
    with pytest.raises(UsageError, match=r"--load: expected .*msc://PROFILE.*, got s3://b/x .*MSC_CONFIG"):
        open_checkpoint("s3://b/x")
    with pytest.raises(UsageError, match=r"--load: expected a profile of MSC_CONFIG.*, got msc://other/x"):
        open_checkpoint("msc://other/x")
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed, got .*; pip install 'megatron-prune\[msc\]'"):
        open_checkpoint("msc://disk/x")
