"""Two writers of one place: one of them is whole, the other says why it did not start, and nothing is deleted."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import artifacts, claims
from megatron_prune.__main__ import main
from megatron_prune.artifacts import PARTIAL, atomic_directory, write_bytes
from megatron_prune.claims import ClaimedError, claim
from megatron_prune.errors import MegatronPruneError, UsageError
from tests.checkpoint import small

ROOT = Path(__file__).parents[1]
# Writes a file, waits for a line on standard input, and ends.
WRITER = """
import sys
from megatron_prune.artifacts import atomic_directory
with atomic_directory(sys.argv[1]) as scratch:
    (scratch / "file").write_text("whole")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def start(code: str, *words: Any) -> subprocess.Popen[str]:
    """A process that has printed its first line."""
    running = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline()
    return running


def test_the_second_writer_says_who_writes_and_deletes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "made"
    first = start(WRITER, place)
    scratch = next(tmp_path.glob(f".made{PARTIAL}*"))
    says = rf"{place} is being written by process {first.pid} of \S+ on {socket.gethostname()}, since 20\d\d-"
    with pytest.raises(ClaimedError, match=says), atomic_directory(place):
        raise AssertionError("it must not start")
    assert (scratch / "file").read_text() == "whole"
    assert first.communicate("\n")[1] == "" and first.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and (place / "file").read_text() == "whole"


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    place = tmp_path / "made"
    first = start(WRITER, place)
    first.kill()
    first.communicate()
    assert len(list(tmp_path.glob(".made*"))) == 2  # its scratch directory and its lock
    with atomic_directory(place) as scratch:
        (scratch / "file").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and (place / "file").read_text() == "second"


@pytest.mark.parametrize("other", ["out1", "out2", "out[1]", "out12"])
def test_no_name_matches_the_scratch_of_another(tmp_path: Path, other: str) -> None:
    """``out[12]`` as a pattern would match the scratch directory of ``out1``."""
    left = tmp_path / f".{other}{PARTIAL}abcdefgh"
    left.mkdir()
    with atomic_directory(tmp_path / "out[12]"):
        pass
    with atomic_directory(tmp_path / "out"):
        pass
    assert left.is_dir()
    with atomic_directory(tmp_path / other):
        pass
    assert not left.exists()


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(claims.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", refuse)


def test_without_locks_a_process_that_has_ended_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)
    lock, place = tmp_path / "lock", tmp_path / "made"
    with claim(lock, place):
        held = lock.read_text()
        with pytest.raises(ClaimedError, match=f"process {os.getpid()} .*if it is no longer there, remove {lock}"):
            with claim(lock, place):
                raise AssertionError("it must not start")
    lock.write_text(json.dumps(json.loads(held) | {"start": "1"}))  # this number was another process's
    with claim(lock, place):
        pass
    lock.write_text(json.dumps(json.loads(held) | {"host": "elsewhere", "start": "1"}))
    with pytest.raises(ClaimedError, match="on elsewhere, since .*remove"), claim(lock, place):
        raise AssertionError("it must not start")
    assert lock.exists()


def test_a_lock_of_words_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("\x1b[2J these are words")
    with claim(tmp_path / "lock", tmp_path / "made"):
        pass


def test_a_lock_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    """In a folder of several users anybody can make one, to any file of this user."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to("precious")
    with (
        pytest.raises(MegatronPruneError, match="lock could not be written: .*link"),
        claim(tmp_path / "lock", tmp_path),
    ):
        raise AssertionError("it must not start")
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "lock").is_symlink()


@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
def test_files_have_the_permissions_of_any_other(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(tmp_path, -1, 4321)  # a project's group, which is not this process's
    tmp_path.chmod(0o2770)
    monkeypatch.setattr(artifacts, "_UMASK", umask)
    before = os.umask(umask)
    try:
        root = small.write(tmp_path / "checkpoint")
        write_bytes(tmp_path / "file.json", b"{}")
        (tmp_path / "usual").mkdir()
        (tmp_path / "usual" / "file").touch()
    finally:
        os.umask(before)
    folder, file = (stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "usual", tmp_path / "usual" / "file"))
    found = [tmp_path / "file.json", *root.rglob("*"), root]
    wrong = {path: oct(path.stat().st_mode) for path in found
             if stat.S_IMODE(path.stat().st_mode) != (folder if path.is_dir() else file)}  # fmt: skip
    assert not wrong, (oct(folder), oct(file), wrong)
    group = tmp_path.stat().st_gid
    assert [path for path in found if path.stat().st_gid != group] == []


# -- signals and disk errors -----------------------------------------------------------------------

ENDLESS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
from megatron_prune import __main__, artifacts
from megatron_prune.cli import checkpoint_commands
def main(words):
    with artifacts.atomic_directory(words[0]) as scratch:
        (scratch / "file").write_text("half")
        print("writing", flush=True)
        time.sleep(600)
checkpoint_commands.inspect_main = main
sys.argv = ["megatron-prune", "inspect", sys.argv[1]]
sys.exit(__main__.console())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    running = start(ENDLESS, tmp_path / "made")
    running.send_signal(number)
    _, errors = running.communicate()
    assert running.returncode == 128 + number
    assert errors == f"megatron-prune inspect: ended by {number.name}; what was half-written is removed\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small.write(tmp_path / "checkpoint")
    real = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(("metadata.json", ".distcp")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert main(["inspect", str(root)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "Permission denied" in said and str(root) in said


def test_an_error_of_the_disk_anywhere_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prune.cli import checkpoint_commands

    def fail(words: Any) -> int:
        raise OSError(5, "Input/output error", "/mnt/data\x1b[31m/a\nb")

    monkeypatch.setattr(checkpoint_commands, "inspect_main", fail)
    assert main(["inspect", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "megatron-prune inspect: /mnt/data\\x1b[31m/a\\nb could not be read or written: Input/output"
    )
    assert "try again" in said and said.count("\n") == 1


def test_an_error_that_is_no_disks_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prune.cli import checkpoint_commands

    def fail(words: Any) -> int:
        raise OSError("a bug")

    monkeypatch.setattr(checkpoint_commands, "inspect_main", fail)
    with pytest.raises(OSError, match="a bug"):
        main(["inspect", "x"])


def test_a_verb_that_works_for_hours_looks_first_whether_it_can_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, why in (("file/x.json", "Not a directory"), (".", "Is a directory")):
        with pytest.raises(UsageError, match=rf"^--output: expected a file that can be written, got .*\({why}|{why}"):
            artifacts.refuse_unwritable("--output", tmp_path / output)
    artifacts.refuse_unwritable("--output", tmp_path / "new" / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_results_that_cannot_be_written_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(path: Any, payload: bytes) -> None:
        tries.append(time.monotonic())
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(artifacts, "write_bytes", fail)
    monkeypatch.setattr(artifacts, "BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(artifacts.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(MegatronPruneError, match=r"Stale file handle; .*; the results are in ") as refused:
        artifacts.write_results(tmp_path / "scores.json", b"{}")
    assert len(tries) == artifacts.TRIES
    assert Path(str(refused.value).rpartition(" ")[2]).read_bytes() == b"{}"
