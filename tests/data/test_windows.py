"""Windows against plain slicing of the concatenated documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import _IndexWriter

from megatron_prune.data import indexed
from megatron_prune.data.contamination import Documents
from megatron_prune.data.windows import windows
from megatron_prune.errors import DataError, UsageError
from tests.data.corpora import write_corpus


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 50), st.sampled_from([np.uint16, np.int32]))
def test_window_k_is_a_slice_of_the_joined_documents(tmp_path_factory, lengths, seq_length, dtype):
    prefix = tmp_path_factory.mktemp("windows") / "c"
    documents = [np.random.RandomState(n).randint(0, 60000, n) for n in lengths]
    write_corpus(prefix, documents, dtype)
    joined = np.concatenate(documents)
    expected = (len(joined) - 1) // seq_length
    if not expected:
        with pytest.raises(DataError, match=f"expected at least the {seq_length + 1} tokens of one window"):
            windows(prefix, seq_length)
        return
    found = windows(prefix, seq_length)
    assert len(found) == expected and found.predictions == expected * seq_length
    for k, window in enumerate(found):
        assert window.dtype == torch.int64
        np.testing.assert_array_equal(window, joined[k * seq_length : (k + 1) * seq_length + 1])
    np.testing.assert_array_equal(found[-1], found[expected - 1])
    assert [w.tolist() for w in found[1:3]] == [found[k].tolist() for k in range(1, min(3, expected))]


def test_count_takes_the_first_and_seed_chooses_without_repeats(tmp_path):
    write_corpus(tmp_path / "c", [np.arange(1001)])
    first = [w[0].item() for w in windows(tmp_path / "c", 10, count=7)]
    assert first == [0, 10, 20, 30, 40, 50, 60]
    chosen = [[w[0].item() for w in windows(tmp_path / "c", 10, count=50, seed=s)] for s in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 50 and all(start % 10 == 0 for start in chosen[0])
    assert sorted(w[0].item() for w in windows(tmp_path / "c", 10, seed=1)) == list(range(0, 1000, 10))


def test_more_windows_than_there_are_is_refused(tmp_path):
    write_corpus(tmp_path / "c", [np.arange(1001)])
    with pytest.raises(UsageError, match="--calibration-sequences: expected 1 to 100, got 101"):
        windows(tmp_path / "c", 10, 101, flag="--calibration-sequences")
    with pytest.raises(UsageError, match="--windows: expected .*, got 0"):
        windows(tmp_path / "c", 10, 0)
    with pytest.raises(UsageError, match="--seq-length: expected .*, got 0"):
        windows(tmp_path / "c", 0)


def test_a_document_may_be_longer_than_two_gigabytes(tmp_path):
    """Megatron's index has lengths in int32, too small for their bytes. The file is sparse except for its ends."""
    lengths = [3, 2**29 + 4094]
    with _IndexWriter(f"{tmp_path}/c.idx", np.int32) as writer:
        writer.write(lengths, None, [0, 1, 2])
    with open(tmp_path / "c.bin", "wb") as handle:
        handle.write(np.array([7, 8, 9, 10], np.int32).tobytes())
        handle.seek(4 * sum(lengths) - 8)
        handle.write(np.array([11, 12], np.int32).tobytes())
    corpus = indexed.open_indexed(tmp_path / "c")
    assert indexed.tokens(corpus) == sum(lengths) and corpus[1][-1] == 12
    assert windows(tmp_path / "c", 4096)[-1][-3:].tolist() == [0, 11, 12]
    assert Documents(tmp_path / "c").tokens(1)[[0, -1]].tolist() == [10, 12]
