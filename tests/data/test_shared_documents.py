"""Shared documents against a plain comparison of all pairs; the verb refuses them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune.cli.data_commands import build_index_main
from megatron_prune.data import contamination
from megatron_prune.data import contamination as documents_module
from megatron_prune.errors import DataError
from tests.data.corpora import write_corpus

# Few values, so that equal lengths, equal heads and equal documents all happen.
documents = st.lists(
    st.tuples(st.sampled_from([1, 7, 8, 9, 16, 30, 31]), st.integers(0, 2), st.integers(0, 1)).map(
        lambda d: np.concatenate([np.full(d[0] - d[0] // 3, d[1]), np.full(d[0] // 3, d[2])])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(documents, documents, st.sampled_from([np.uint16, np.int32]))
def test_shared_documents_are_the_equal_ones(tmp_path_factory, train, held, dtype):
    folder = tmp_path_factory.mktemp("held")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "BLOCK", 5)
        training = write_corpus(folder / "train", train)
        found = contamination.shared_documents(training, write_corpus(folder / "held", held, dtype))
    texts = [d.tolist() for d in train]
    assert {twin for _, twin in found} == {i for i, d in enumerate(held) if len(d) >= 8 and d.tolist() in texts}
    assert len(found) == len({twin for _, twin in found})
    assert all(train[row].tolist() == held[twin].tolist() for row, twin in found)


def write_sentences(prefix, documents) -> str:
    """Documents of several sequences, as with --split-sentences; an empty one among them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for sentences in documents:
        builder.add_document(np.concatenate([np.empty(0, np.int64), *sentences]), [len(s) for s in sentences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_a_document_is_all_of_its_sentences(tmp_path):
    generator = np.random.RandomState(0)
    a, b, c, d = (generator.randint(0, 900, 40) for _ in range(4))
    train = write_sentences(tmp_path / "train", [[a, b], [], [c], [a, d]])
    held = write_sentences(tmp_path / "held", [[], [a, c], [b], [a[:9], a[9:], d], []])
    assert contamination.shared_documents(train, held) == [(3, 3)]  # a, b and c alone are sentences that both hold


def test_the_verb_refuses_a_stream_that_holds_held_out_documents(tmp_path, capsys):
    generator = np.random.RandomState(0)
    texts = [generator.randint(0, 900, 80) for _ in range(40)]
    train, clean = write_corpus(tmp_path / "train", texts[:30]), write_corpus(tmp_path / "clean", texts[30:])
    leaky = write_corpus(tmp_path / "leaky", [*texts[30:], texts[17]])
    flags = ["--data-path", train, "--seq-length", "16", "--data-cache-path", str(tmp_path / "cache"), "--held-out"]
    assert build_index_main([*flags, clean]) == 0
    says = r"1 document\(s\) of .*leaky are in .*train too .document 10 is its document 17"
    with pytest.raises(DataError, match=says):
        build_index_main([*flags, clean, leaky])
