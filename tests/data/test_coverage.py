"""Unique tokens against a count that gives every token of the corpus its own number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.data import coverage
from megatron_prune.data.streams import SampleRange, Stream
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
    samples = SampleRange(stream, start, start + 1 + int(share * (len(stream) - start - 1)))
    seen = {token for i in range(len(samples)) for token in samples[i]["tokens"].tolist()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "BLOCK", 64)  # several blocks
        assert coverage.unique_tokens(samples) == len(seen)
