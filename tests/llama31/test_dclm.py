"""examples/llama3.1_8b/dclm.sh on a download in miniature: shards, interrupted, held-out text, blend, index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import zstandard

from megatron_prune.artifacts import read_json
from tests import tiny
from tests.llama31.example import EXAMPLE

SHARDS = [f"global-shard_0{g}_of_10/local-shard_{n}_of_10" for g, n in ((1, 0), (2, 1))]


@pytest.fixture
def dclm(tmp_path, tiny_tokenizer):
    """``dclm(*words)``: the script over a made-up download in ``tmp_path``."""
    texts = iter(tiny.documents(280))
    for folder in [*SHARDS, "global-shard_10_of_10/local-shard_9_of_10"]:
        for number in range(3):
            file = tmp_path / "text" / folder / f"shard_0000000{number}_processed.jsonl.zst"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps({"text": next(texts), "url": "x"}) + "\n" for _ in range(20))
            file.write_bytes(zstandard.compress(lines.encode()))
    env = {**os.environ, "PYTHON": sys.executable, "WORKERS": "1", "SEQ_LENGTH": "32", "TOKENIZER": str(tiny_tokenizer)}
    env |= {"DCLM_TEXT": str(tmp_path / "text"), "DCLM_OUT": str(tmp_path / "out"), "CACHE": str(tmp_path / "cache")}

    own = env

    def run(*words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
        line = ["bash", EXAMPLE / "dclm.sh", *words]
        return subprocess.run(line, env=own | dict(env or {}), capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_from_download_to_stream(dclm, tmp_path) -> None:
    out: Path = tmp_path / "out"
    assert "2 shards: tokenize 0 to 1" in dclm("shards").stdout
    assert (out / "shards.txt").read_text().split() == SHARDS
    assert dclm("tokenize", "0").returncode == 0
    early = dclm("blend")
    assert early.returncode == 1 and "--array 1" in early.stderr and not (out / "blend.txt").exists()
    assert dclm("tokenize", "1").returncode == 0
    assert dclm("tokenize", "7").returncode == 2
    again = dclm("tokenize", "1")
    assert again.returncode == 0 and "is there" in again.stdout
    assert dclm("held-out").returncode == 0
    blend = dclm("blend")
    assert blend.returncode == 0, blend.stderr
    names = ["global-01-local-0", "global-02-local-1"]
    assert (out / "blend.txt").read_text().split() == [str(out / name) for name in names]
    held = [read_json(out / f"{name}.json") for name in names]
    assert [corpus["documents"] for corpus in held] == [60, 60]
    assert f"{sum(corpus['tokens'] for corpus in held):,} tokens" in blend.stdout
    index = dclm("index", "--stream-range", "0:16")
    assert index.returncode == 0, index.stderr
    described = json.loads(index.stdout)
    assert len(described["corpora"]) == 2 and described["seed"] == 1
    assert [path.parent for path in (tmp_path / "cache").glob("*/stream.json")]


def lacks(ran: subprocess.CompletedProcess) -> list[str]:
    """What the script reports as missing, one line for each; it has started nothing."""
    assert ran.returncode == 2 and not ran.stdout
    lines = ran.stderr.splitlines()
    assert lines and all(" lacks " in line for line in lines), ran.stderr
    return [line.partition(" lacks ")[2] for line in lines]


def test_what_is_lacking_is_said_before_anything_is_done(dclm, tmp_path, tiny_tokenizer) -> None:
    out: Path = tmp_path / "out"
    assert "nothing is lacking" in dclm("check").stdout and not out.exists()
    assert lacks(dclm("tokenize", "0")) == [f"{out}/shards.txt: dclm.sh shards makes it"]
    assert lacks(dclm("blend")) == [f"{out}/shards.txt: dclm.sh shards makes it"]
    names = [f"{out}/blend.txt: dclm.sh blend makes it"]
    names += [f"{out}/{name}.json: dclm.sh held-out makes it" for name in ("calibration", "validation", "test")]
    assert lacks(dclm("index")) == names
    assert not out.exists()


def test_all_that_is_lacking_is_said_at_once(dclm, tmp_path) -> None:
    env = {"PYTHON": "no-such-python", "TOKENIZER": str(tmp_path / "none"), "DCLM_TEXT": str(tmp_path / "empty")}
    check, tokenize = (lacks(dclm(word, env=env)) for word in ("check", "held-out"))
    assert [line.split(":")[0] for line in tokenize] == [
        "the program no-such-python", f"{tmp_path}/none/tokenizer.json",
        f"{tmp_path}/empty/global-shard_10_of_10/local-shard_9_of_10/*.jsonl.zst",
    ]  # fmt: skip
    assert {*tokenize} < {*check} and any("hugging" in line for line in check)
    packages = lacks(dclm("held-out", env={"PYTHON": "/bin/false"}))
    assert packages == ["the packages megatron_prune and zstandard in /bin/false: pip install -e ."]


def test_room_on_the_disk_is_asked_for_before_a_shard_is_tokenized(dclm, tmp_path) -> None:
    """With a sparse file: long, but without disk space."""
    assert dclm("shards").returncode == 0
    with open(tmp_path / "text" / SHARDS[0] / "shard_00000009_processed.jsonl.zst", "wb") as handle:
        handle.truncate(10**13)
    (room,) = lacks(dclm("tokenize", "0"))
    assert room.startswith("room on the disk of ") and "about 30001 GB" in room
    (room,) = lacks(dclm("check"))
    assert room.startswith("room on the disk of ")


def test_without_a_word_it_says_what_it_can(dclm) -> None:
    ran = dclm()
    assert ran.returncode == 2 and "usage: dclm.sh" in ran.stderr
