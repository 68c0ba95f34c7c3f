"""Questions quoted in a corpus: found by their token ids wherever they are, and by no shorter overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune.study import questions as searched
from megatron_prune.study.questions import RUN, quoted


class Words:
    """Every word is a number, its own id."""

    model, bos, eod, vocab_size = "words", None, None, 60_000

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], dtype=np.int32) for text in texts]

    def fingerprint(self) -> str:
        return "words"


def corpus(prefix: Path, documents: list[list[int]]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def naive(question: list[int], documents: list[list[int]]) -> bool:
    whole = [token for document in documents for token in document]
    runs = {tuple(whole[place : place + RUN]) for place in range(len(whole) - RUN + 1)}
    return any(tuple(question[place : place + RUN]) in runs for place in range(len(question) - RUN + 1))


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_found_are_those_that_a_plain_search_finds(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searched, "CHUNK", chunk)
    draw = np.random.default_rng(chunk)
    documents = [draw.integers(0, 50_000, size).tolist() for size in (5, 40, 90, 131)]
    other = [1] + draw.integers(0, 50_000, 30).tolist()
    questions = [
        [9, 9, *documents[1][20:33], 9],  # thirteen in a row
        [9, 9, *documents[1][20:32], 9],  # twelve
        documents[3][-RUN:],  # the end of the corpus
        [*other[:20]],
        documents[2][:12],  # too short to compare
        draw.integers(0, 50_000, 300).tolist(),
    ]
    tokenizer: Any = Words()
    prefixes = [corpus(tmp_path / "a", documents), corpus(tmp_path / "b", [other])]
    found = quoted({"t": [text(one) for one in questions], "none": []}, prefixes, tokenizer)
    expected = [number for number, one in enumerate(questions) if naive(one, documents) or naive(one, [other])]
    assert expected == [0, 2, 3]
    assert (found["t"].texts, found["t"].too_short, found["t"].quoted, found["t"].example) == (6, 1, 3, 0)
    assert (found["none"].texts, found["none"].quoted) == (0, 0)
    only = quoted({"t": [text(one) for one in questions]}, prefixes[:1], tokenizer)
    assert only["t"].quoted == 2
