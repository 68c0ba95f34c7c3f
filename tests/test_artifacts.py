"""Files are whole or absent: a reader never sees half of one, and files are on disk before they are renamed."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_prune import artifacts
from megatron_prune.errors import CheckpointError, MegatronPruneError, UsageError


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Syncs and renames from now on, by the file names at that time."""
    events: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(artifacts.os, "fsync", synced)
    for name, real in (("replace", replace), ("rename", rename)):
        monkeypatch.setattr(
            artifacts.os, name, lambda a, b, real=real: (events.append(("rename", str(b))), real(a, b))[1]
        )
    return events


def test_a_reader_of_json_keeps_the_whole_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"value": "old" * 1000})
    with open(path) as reader:
        begun = reader.read(10)
        artifacts.write_json(path, {"value": 1})
        assert begun + reader.read() == artifacts.json_bytes({"value": "old" * 1000}).decode()
    assert artifacts.read_json(path) == {"value": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, [1])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        artifacts.write_json(path, [2])
    assert artifacts.read_json(path) == [1] and os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_on_disk_before_its_name_and_its_name_before_it_is_said(tmp_path: Path, disk) -> None:
    artifacts.write_bytes(tmp_path / "a", b"content")
    (first, temporary), *rest = disk
    assert first == "fsync" and Path(temporary).parent == tmp_path and Path(temporary).name != "a"
    assert rest == [("rename", str(tmp_path / "a")), ("fsync", str(tmp_path))]


def test_a_folder_is_on_disk_before_its_name(tmp_path: Path, disk) -> None:
    with artifacts.atomic_directory(tmp_path / "made") as scratch:
        (scratch / "sub").mkdir()
        (scratch / "a").write_text("a")
        (scratch / "sub" / "b").write_text("b")
        assert not (tmp_path / "made").exists()
    *before, renamed, last = disk
    assert {path for _, path in before} == {str(scratch / name) for name in ("a", "sub", "sub/b")} | {str(scratch)}
    assert {event for event, _ in before} == {"fsync"}
    assert (renamed, last) == (("rename", str(tmp_path / "made")), ("fsync", str(tmp_path)))


def test_folders_that_are_missing_are_made(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "a" / "b" / "c.json", {})
    assert artifacts.read_json(tmp_path / "a" / "b" / "c.json") == {}


def test_the_hash_of_json_is_of_its_canonical_form() -> None:
    expected = hashlib.sha256(b'{"a":1,"b":[2,{"c":null}]}').hexdigest()
    assert artifacts.sha256_json({"b": [2, {"c": None}], "a": 1}) == expected
    with pytest.raises(ValueError):
        artifacts.sha256_json([math.nan])


def test_numbers_that_are_not_finite_become_null_and_others_stay() -> None:
    given = {"a": (1, 2.5, math.inf, -math.inf, math.nan, "x", None, True), "b": {"c": [0.0]}}
    assert artifacts.with_nulls(given) == {"a": [1, 2.5, None, None, None, "x", None, True], "b": {"c": [0.0]}}


def test_an_error_after_the_rename_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is no temporary file to remove, which must not raise another error."""

    def after(source: str, target: Path, real=os.replace) -> None:
        real(source, target)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(artifacts.os, "replace", after)
    with pytest.raises(OSError, match="Input/output error"):
        artifacts.write_json(tmp_path / "a.json", 1)


def test_a_folder_is_copied_whole_and_over_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a").write_text("a")
    artifacts.copy_directory(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "a").read_text() == "a"
    with pytest.raises(MegatronPruneError, match="already exists"):
        artifacts.copy_directory(source, tmp_path / "copy")
    assert sorted(os.listdir(tmp_path)) == ["copy", "source"]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("link", ["file", "folder", "sub/folder"])
def test_what_is_outside_of_a_folder_is_not_copied_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, stored: bool
) -> None:
    """Neither to a disk nor to a store: the folder may be a stranger's, and the links lead to this user's files."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    source, target = tmp_path / "source", tmp_path / "copy"
    (source / link).parent.mkdir(parents=True)
    (source / link).symlink_to(tmp_path / "secret" / "key" if link == "file" else tmp_path / "secret")
    if stored:
        monkeypatch.setattr(artifacts.storage, "is_stored", lambda path: path == target)
        monkeypatch.setattr(artifacts.storage, "copy_files", shutil.copytree)
    with pytest.raises(MegatronPruneError, match="is a link to .*, outside of"):
        artifacts.copy_directory(source, target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "no space left while writing .*; free"), (errno.EFBIG, "limit on the size of files .*ulimit -f")],
)
def test_a_disk_that_refused_is_found_in_a_cyclic_chain_of_errors(tmp_path: Path, number: int, said: str) -> None:
    """Megatron raises errors whose causes lead in a circle (an fp32 run that is resumed with --bf16)."""
    first, second = ValueError("first"), OSError(number, os.strerror(number))
    first.__cause__, second.__context__ = second, first
    with pytest.raises(CheckpointError, match=said), artifacts.explain_full_disk(tmp_path / "made"):
        raise first
    first.__cause__ = other = ValueError("second")
    other.__context__ = first
    with pytest.raises(ValueError, match="first"), artifacts.explain_full_disk(tmp_path / "made"):
        raise first


def test_workers_are_bounded_by_the_machine(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(artifacts.os, "sched_getaffinity", lambda _: set(range(16)))
    assert [artifacts.bound_workers("--workers", number) for number in (1, 64, 65, 99999)] == [1, 64, 64, 64]
    assert "--workers 99999: this machine gives 16 cores; 64 are started" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert artifacts.bound_workers("--num-workers", 99999) == 8
    with pytest.raises(UsageError, match="--workers: expected at least 1 process, got 0"):
        artifacts.bound_workers("--workers", 0)


def test_a_worker_ends_with_its_parent() -> None:
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        me = os.getpid()
        if os.fork() == 0:
            artifacts.end_with_parent(me)
            os.write(writing, b"here")
            time.sleep(3600)
        time.sleep(3600)
    os.close(writing)
    assert os.read(reading, 4) == b"here"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(reading, 4) == b""  # the last process that had it open has ended
