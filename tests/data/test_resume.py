"""Killed at random moments and started again, by any number of workers: the same bytes, and no work done twice."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prune.artifacts import PARTIAL, sha256_file
from megatron_prune.data import preprocess as module
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.shards import Parts
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import DataError, RunError
from tests import tiny
from tests.waiting import alive, wait_for_progress

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer("HuggingFaceTokenizer", tiny_tokenizer)


@pytest.fixture
def inputs(tmp_path, tiny_documents):
    return [tiny.write_jsonl(tmp_path / f"{i}.jsonl", tiny_documents[i * 20 : i * 20 + 20]) for i in range(6)]


def hashes(prefix):
    return [sha256_file(f"{prefix}{suffix}") for suffix in SUFFIXES]


SLOW = """
import sys, time
from megatron_prune.data import preprocess as module
from megatron_prune.data.tokenizers import load_tokenizer
module.BATCH_BYTES = 4000
slow, encode = float(sys.argv[1]), module.Encoder.__call__
def later(self, batch):
    time.sleep(slow)
    return encode(self, batch)
module.Encoder.__call__ = later
tokenizer = load_tokenizer("HuggingFaceTokenizer", sys.argv[2])
print("go", flush=True)
made = module.preprocess(sys.argv[5:], sys.argv[3], tokenizer, append_eod=True, workers=int(sys.argv[4]))
print(made.resumed, flush=True)
"""


def finished(prefix):
    return len(list(prefix.parent.glob(f".{prefix.name}.corpus{PARTIAL}parts/*.json")))


def test_killed_at_random_and_resumed_gives_the_same_bytes(tmp_path, inputs, tokenizer, tiny_tokenizer):
    (tmp_path / "expected").mkdir()
    (tmp_path / "out").mkdir()
    preprocess(inputs, tmp_path / "expected" / "P", tokenizer, append_eod=True)
    chance = random.Random(5)
    prefix, kept, done = tmp_path / "out" / "P", 0, 0
    for attempt in itertools.count():
        arguments = ["0.03", tiny_tokenizer, prefix, [2, 1, 3, 1][attempt], *inputs]
        command = [sys.executable, "-c", SLOW, *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
            assert run.stdout is not None and run.stdout.readline() == "go\n"
            if attempt < 3:
                while run.poll() is None and finished(prefix) <= kept:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0.0, 0.05))
                run.send_signal(signal.SIGKILL)
            rest = run.stdout.read().split()
        if rest:
            done = int(rest[0])
            break
        assert not any(Path(f"{prefix}{suffix}").exists() for suffix in SUFFIXES)
        assert finished(prefix) > kept, "finished inputs are kept"
        kept = finished(prefix)
    assert done == kept > 0
    assert hashes(prefix) == hashes(tmp_path / "expected" / "P")
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["P.bin", "P.idx", "P.json"]


def stop_after(monkeypatch, count):
    """Let ``count`` inputs finish and fail at the first batch of the next one."""
    finish, encode = module.PartWriter.finish, module.Encoder.__call__
    seen = []
    monkeypatch.setattr(module.PartWriter, "finish", lambda self: (finish(self), seen.append(self)))

    def fail_then(self, batch):
        if len(seen) == count:
            raise RuntimeError("stopped")
        return encode(self, batch)

    monkeypatch.setattr(module.Encoder, "__call__", fail_then)


def test_only_what_is_unchanged_is_kept(tmp_path, inputs, tokenizer, tiny_documents, monkeypatch):
    def interrupted(**settings):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            stop_after(patch, 4)
            preprocess(inputs, tmp_path / "P", tokenizer, **settings)

    interrupted()
    assert preprocess(inputs, tmp_path / "P", tokenizer).resumed == 4
    interrupted()
    assert preprocess(inputs, tmp_path / "P", tokenizer, append_eod=True).resumed == 0, "another setting"
    interrupted()
    tiny.write_jsonl(inputs[1], tiny_documents[200:210])
    assert preprocess(inputs, tmp_path / "P", tokenizer).resumed == 3, "a changed file"
    preprocess(inputs, tmp_path / "Q", tokenizer)
    assert hashes(tmp_path / "P")[:2] == hashes(tmp_path / "Q")[:2]
    interrupted()
    again = preprocess([inputs[5], inputs[3], inputs[3]], tmp_path / "P", tokenizer)
    assert again.resumed == 2, "another order, and an input named twice"
    interrupted()
    part = next((tmp_path / f".P.corpus{PARTIAL}parts").glob("*.bin"))
    part.write_bytes(part.read_bytes()[:-2])
    assert preprocess(inputs, tmp_path / "P", tokenizer).resumed == 3, "a part that lost its end"
    assert hashes(tmp_path / "P")[:2] == hashes(tmp_path / "Q")[:2]


def test_a_broken_input_does_not_cost_the_others(tmp_path, inputs, tokenizer):
    good = inputs[4].read_bytes()
    inputs[4].write_bytes(good + b"{broken\n")
    with pytest.raises(DataError, match="4.jsonl:21: expected JSON"):
        preprocess(inputs, tmp_path / "P", tokenizer, workers=2)
    assert not list(tmp_path.glob("P.*"))
    inputs[4].write_bytes(good)
    assert preprocess(inputs, tmp_path / "P", tokenizer).resumed == 4
    preprocess(inputs, tmp_path / "Q", tokenizer)
    assert hashes(tmp_path / "P") == hashes(tmp_path / "Q")


def test_a_full_disk_is_explained_and_costs_nothing(tmp_path, inputs, tokenizer, monkeypatch):
    def full(self, keys):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="no space left while writing .*are kept"):
        patch.setattr(Parts, "_join", full)
        preprocess(inputs, tmp_path / "P", tokenizer)
    assert preprocess(inputs, tmp_path / "P", tokenizer).resumed == len(inputs)


def test_two_runs_to_one_prefix_are_refused(tmp_path, inputs, tiny_tokenizer):
    arguments = ["0.2", tiny_tokenizer, tmp_path / "P", 1, *inputs]
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    with Parts(tmp_path / "P"):
        second = subprocess.run(command, text=True, capture_output=True, env=ENVIRONMENT)
    assert second.returncode and f"P is being written by process {os.getpid()} of " in second.stderr


def test_workers_end_with_a_parent_that_was_killed(tmp_path, inputs, tiny_tokenizer):
    arguments = ["0.1", tiny_tokenizer, tmp_path / "P", 2, *inputs]
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
        assert run.stdout is not None and run.stdout.readline() == "go\n"
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        wait_for_progress(lambda: len(children.read_text().split()) >= 2, "two workers")
        workers = children.read_text().split()
        run.kill()
    wait_for_progress(lambda: not any(map(alive, workers)), "the end of the workers, which outlived their parent")
