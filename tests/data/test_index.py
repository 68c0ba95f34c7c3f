"""``build-index`` builds what a training run opens, and checks ranges."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from megatron_prune.cli.data_commands import build_index_main
from megatron_prune.data import blend, coverage
from megatron_prune.data.streams import Stream
from megatron_prune.errors import DataError, UsageError
from megatron_prune.training.data import unique_tokens
from tests.data.corpora import write_corpus


@pytest.fixture
def corpora(tmp_path):
    for name, documents in (("a", 80), ("b", 20)):
        lengths = np.random.RandomState(documents).randint(1, 60, documents)
        write_corpus(tmp_path / name, map(np.arange, lengths))
    return ["2", f"{tmp_path}/a", "1", f"{tmp_path}/b"]


def test_index_builds_the_caches_that_a_run_finds(corpora, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    flags = ["--seq-length", "16", "--stream-seed", "7", "--stream-epochs", "2", "--data-cache-path", str(cache)]
    assert build_index_main(["--data-path", *corpora, *flags, "--stream-range", "0:20", "--stream-range", "20:40"]) == 0
    printed = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(Stream, "_build_cache", None)  # a run that had to build would fail
    stream = Stream.build(corpora, 16, 7, 2, cache)
    assert printed["id"] == stream.id and printed["samples"] == len(stream)
    assert printed["tokens"] == 16 * len(stream)
    assert printed["ranges"] == [{"range": [0, 20], "unique_tokens": 320}, {"range": [20, 40], "unique_tokens": 320}]
    assert json.loads(next(cache.glob("stream-*/stream.json")).read_text())["id"] == stream.id


def test_index_counts_what_a_run_over_two_epochs_asks_for(corpora, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    flags = ["--seq-length", "16", "--stream-seed", "7", "--stream-epochs", "2", "--data-cache-path", str(cache)]
    size = len(Stream.build(corpora, 16, 7, 2, cache)) // 2
    reach = f"{size - 10}:{size + 20}"
    assert build_index_main(["--data-path", *corpora, *flags, "--stream-range", reach]) == 0
    [printed] = json.loads(capsys.readouterr().out)["ranges"]
    assert 20 * 16 <= printed["unique_tokens"] < 30 * 16
    monkeypatch.setattr(coverage, "unique_tokens", None)  # a run that had to count would fail
    args = argparse.Namespace(
        stream_range=reach, train_data_path=corpora, seq_length=16, stream_seed=7, stream_epochs=2,
        data_cache_path=str(cache), rank=1, world_size=2,
    )  # fmt: skip
    assert unique_tokens(args) == printed["unique_tokens"]


def test_ranges_are_checked(corpora, tmp_path):
    flags = ["--data-path", *corpora, "--seq-length", "16", "--data-cache-path", str(tmp_path / "cache")]
    with pytest.raises(DataError, match="both would see 10:20"):
        build_index_main([*flags, "--stream-range", "0:20", "--stream-range", "10:30"])
    with pytest.raises(UsageError, match="does not wrap"):
        build_index_main([*flags, "--stream-range", "0:100000"])
    with pytest.raises(UsageError, match="--data-path"):
        build_index_main(["--seq-length", "16"])


@pytest.mark.parametrize("weighted", [True, False])
def test_length_is_known_before_anything_is_built(corpora, weighted):
    given = corpora if weighted else corpora[1::2]
    counted = blend.samples_per_epoch(blend.members(blend.parse_blend(given)), 16)
    assert counted == len(Stream.build(given, 16, 7))
