"""Unique tokens against a count that gives every token of the corpus its own number; who counts, and who waits."""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.data import coverage
from megatron_prune.data.streams import Stream, StreamRange
from megatron_prune.errors import DataError
from megatron_prune.training import data
from tests.data.corpora import write_corpus


@pytest.mark.parametrize("members", [1, 2])
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.floats(0, 0.99), st.floats(0, 1), st.integers(0, 99))
def test_unique_tokens_are_the_set_of_tokens_seen(tmp_path_factory, members, seq_length, epochs, low, share, seed):
    folder = tmp_path_factory.mktemp("coverage")
    blend, first = [], 0
    for member in range(members):
        ends = first + np.cumsum(np.random.RandomState(seed + member).randint(1, 30, 25))
        documents = np.split(np.arange(first, ends[-1]), ends[:-1] - first)
        first = int(ends[-1])
        prefix = write_corpus(folder / str(member), documents, np.int32)
        blend += ([] if members == 1 else [str(member + 1)]) + [prefix]
    stream = Stream.build(blend, seq_length, seed, epochs)
    start = int(low * len(stream))
    samples = StreamRange(stream, start, start + 1 + int(share * (len(stream) - start - 1)))
    seen = {token for i in range(len(samples)) for token in samples[i]["tokens"].tolist()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "TOKENS", 64)  # several blocks of documents
        patch.setattr(coverage, "DOCUMENTS", 7)
        assert coverage.unique_tokens(samples) == len(seen)


@pytest.fixture
def corpus(tmp_path) -> tuple[str, int]:
    """A corpus in which every token has its own number, and how many there are."""
    ends = np.cumsum(np.random.RandomState(3).randint(1, 40, 60))
    documents = np.split(np.arange(ends[-1]), ends[:-1])
    return write_corpus(tmp_path / "numbered", documents, np.int32), int(ends[-1])


def arguments(corpus: str, **changes: object) -> argparse.Namespace:
    """The arguments of a run that ``unique_tokens`` reads."""
    given = dict(
        stream_range="40:90", train_data_path=[corpus], data_path=None, seq_length=16, stream_seed=5, stream_epochs=2,
        data_cache_path=None, rank=0, world_size=2, distributed_timeout_minutes=10, train_iters=5, global_batch_size=10,
    )  # fmt: skip
    return argparse.Namespace(**(given | changes))


def seen(corpus: str, start: int, end: int, seed: int = 5) -> int:
    """The oracle: different numbers among the inputs of these samples."""
    stream = Stream.build(corpus, 16, seed, 2)
    return len({token for i in range(start, end) for token in stream[i]["tokens"].tolist()})


def test_a_number_is_kept_for_its_range_and_its_stream_alone(corpus, monkeypatch) -> None:
    prefix, _ = corpus
    counted = data.unique_tokens(arguments(prefix))
    assert counted == seen(prefix, 40, 90) < 50 * 16
    monkeypatch.setattr(coverage, "unique_tokens", None)  # counting now would fail
    assert data.unique_tokens(arguments(prefix)) == counted
    assert data.unique_tokens(arguments(prefix, rank=1)) == counted
    assert data.unique_tokens(arguments(prefix, stream_range="0:20")) == 20 * 16  # one epoch: nothing to count
    assert data.unique_tokens(arguments(prefix, stream_range=None)) == 5 * 10 * 16
    for other in ({"stream_range": "40:100"}, {"stream_seed": 6}):
        with pytest.raises(TypeError):
            data.unique_tokens(arguments(prefix, **other))


def test_a_number_of_another_stream_is_counted_again(corpus) -> None:
    """The file's name has part of the stream's id; the file has all of it."""
    prefix, _ = corpus
    stream = Stream.build(prefix, 16, 5, 2)
    file = coverage.path(stream, 40, 90, None)
    right = seen(prefix, 40, 90)
    for text in ('{"stream": "x", "range": [40, 90], "unique_tokens": 7}', "{", ""):
        file.write_text(text)
        assert data.unique_tokens(arguments(prefix)) == right
    assert f'"unique_tokens": {right}' in file.read_text()


def test_others_wait_as_long_as_there_is_a_sign_of_life(corpus, monkeypatch) -> None:
    prefix, _ = corpus
    clock, signs = itertools.count(), itertools.count()
    monkeypatch.setattr(coverage, "monotonic", lambda: float(next(clock)))  # a second from one call to the next
    monkeypatch.setattr(coverage, "BEAT", 0.0)
    stream = Stream.build(prefix, 16, 5, 2)
    with pytest.raises(DataError, match="sees nothing of it in .*--data-cache-path"):
        coverage.wait(stream, 40, 90, None, patience=5)

    def sign(_: object) -> int:
        """A count that takes far longer than the others wait without a sign of progress."""
        if (number := next(signs)) == 100:
            coverage.count(stream, 40, 90, None)
        return number

    monkeypatch.setattr(coverage, "_last_sign", sign)
    assert coverage.wait(stream, 40, 90, None, patience=5) == seen(prefix, 40, 90)
    assert next(signs) == 101


def test_who_counts_gives_signs_of_life_until_the_end(corpus, monkeypatch) -> None:
    prefix, _ = corpus
    monkeypatch.setattr(coverage, "BEAT", 0.01)
    stream = Stream.build(prefix, 16, 5, 2)
    file = coverage._sign(stream, None)
    with coverage.alive(stream, None):
        signs = set[int]()
        while len(signs) < 3:  # until it has been touched several times
            signs.add(coverage._last_sign(file))
    assert coverage._last_sign(file) == -1


def test_caches_of_another_user_are_read_and_not_waited_for(corpus, monkeypatch) -> None:
    prefix, _ = corpus
    stream = Stream.build(prefix, 16, 5, 2)
    monkeypatch.setattr(coverage, "is_shared", lambda *_: False)
    monkeypatch.setattr(coverage.artifacts, "write_json", _refuse)
    assert [data.unique_tokens(arguments(prefix, rank=rank)) for rank in (0, 1)] == [0, seen(prefix, 40, 90)]
    assert not coverage.path(stream, 40, 90, None).exists()


def _refuse(*_: object) -> None:
    raise PermissionError("read-only")


def count_in_a_group(prefix: str) -> str:
    import torch

    stream = Stream.build(prefix, 16, 5, 2)
    torch.distributed.init_process_group("gloo")
    try:
        return str(coverage.count(stream, 40, 90, None))
    except RuntimeError as error:
        return str(error)


def test_nothing_is_counted_while_a_process_group_exists(corpus, distributed) -> None:
    """Other ranks would wait in a collective and time out, so a training loop that counts fails at its first step."""
    assert "before a process group" in distributed(count_in_a_group, 1, corpus[0])[0]
