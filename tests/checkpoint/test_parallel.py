"""Several processes write the same weights as one would, and nothing if one of them fails."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prune.checkpoint import parallel
from megatron_prune.checkpoint.parallel import shares
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert import safetensors_io
from megatron_prune.convert.huggingface import export_hf
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.structured.apply import rewrite
from tests.checkpoint import small
from tests.waiting import wait_for_progress


def test_shares_are_everything_once_and_even():
    sizes = {"embedding": 70, **{f"layer{i}": 10 + i % 3 for i in range(12)}, "output": 70}
    for number in (1, 2, 3, 7, 40):
        found = shares(sizes, number)
        assert sorted(name for share in found for name in share) == sorted(sizes)
        assert len(found) <= number and all(share == [n for n in sizes if n in share] for share in found)
        # Largest first, to the least loaded process: at most a third over the optimum (Graham, 1969).
        possible = max(70, sum(sizes.values()) / number)
        assert max(sum(sizes[name] for name in share) for share in found) <= (4 / 3 - 1 / (3 * number)) * possible


def test_two_processes_write_the_same_checkpoint_and_the_same_export(tiny_parent, tmp_path):
    parent = open_checkpoint(tiny_parent)
    made = rewrite(tiny_parent, tmp_path / "made", workers=2)
    made.verify(hashes=True)
    assert made.full_hash() == parent.full_hash() and made.huggingface == tmp_path / "made" / "huggingface"
    assert sorted(p.name for p in made.directory.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    assert os.listdir(tmp_path) == ["made"] and not (tmp_path / "made" / ".shares").exists()

    export_hf(tiny_parent, tmp_path / "one", max_shard_bytes=400_000)
    export_hf(tmp_path / "made", tmp_path / "two", max_shard_bytes=400_000, workers=2)
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 2 and safetensors_io.INDEX in os.listdir(tmp_path / "two")
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_process_that_fails_says_why_and_leaves_nothing(tmp_path):
    folder = small.write(tmp_path / "parent") / "release"
    shard = folder / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    place = content.index(b"data.pkl", len(content) // 2)  # the index of some record in the middle
    content[place : place + 4] = b"atad"
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp .*truncated or damaged"):
        rewrite(folder, tmp_path / "made", workers=2)
    assert os.listdir(tmp_path) == ["parent"]


SLEEPERS = """
import time
from megatron_prune.checkpoint.parallel import run
if __name__ == "__main__":
    run(time.sleep, [(7200,), (7200,)], 2)
"""


def test_processes_die_with_whoever_started_them(tmp_path):
    """A killed job must not keep writing where a rerun writes."""
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    job = subprocess.Popen([sys.executable, tmp_path / "sleepers.py"], start_new_session=True)

    def session() -> set[int]:
        found = set()
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = status.read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == job.pid and fields[0] != "Z":
                    found.add(int(status.parent.name))
        return found

    try:
        # The job, a resource tracker, the fork server, and two workers.
        wait_for_progress(lambda: len(session()) >= 5, "two processes", session)
        job.kill()
        job.wait()
        wait_for_progress(lambda: not session(), "the end of all", session)
    finally:
        for pid in session():
            os.kill(pid, 9)


def test_numbers_of_workers_that_cannot_be(tmp_path):
    small.write(tmp_path / "parent", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="--workers: expected .*, got 0"):
        rewrite(tmp_path / "parent", tmp_path / "made", workers=0)
    assert os.listdir(tmp_path) == ["parent"]


def test_processes_have_the_environment_of_their_caller(monkeypatch) -> None:
    """Not the environment in which the fork server was started: clients of object stores read it."""
    assert parallel.run(os.getenv, [("STORE_OF_A_TEST",)], 1) == [None]
    monkeypatch.setenv("STORE_OF_A_TEST", "there")
    assert parallel.run(os.getenv, [("STORE_OF_A_TEST",)], 1) == ["there"]
