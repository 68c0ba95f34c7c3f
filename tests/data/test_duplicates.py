"""Duplicates between stages, exact and near, against sets of shingles made in the test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_prune import artifacts
from megatron_prune.__main__ import main
from megatron_prune.data import contamination
from megatron_prune.data.contamination import near_duplicates
from megatron_prune.errors import DataError, UsageError
from tests.data.corpora import write_corpus

ROOT = Path(__file__).resolve().parents[2]


def random_documents(seed: int, count: int, low: int = 40, high: int = 160) -> list[np.ndarray]:
    generator = np.random.RandomState(seed)
    return [generator.randint(0, 5000, generator.randint(low, high)) for _ in range(count)]


def changed(document: np.ndarray, share: float, generator: np.random.RandomState) -> np.ndarray:
    """A copy with a run of its tokens replaced."""
    copy, length = document.copy(), int(share * len(document))
    start = generator.randint(0, len(document) - length + 1)
    copy[start : start + length] = generator.randint(5000, 9000, length)
    return copy


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    a_set, b_set = ({tuple(d[i : i + 5].tolist()) for i in range(len(d) - 4)} for d in (a, b))
    return len(a_set & b_set) / len(a_set | b_set)


def test_near_duplicates_are_those_of_all_pairs_in_plain_python(tmp_path):
    generator = np.random.RandomState(0)
    train = random_documents(1, 150)
    # Copies of all degrees of similarity, a few unrelated ones, an exact copy, and one too short to compare.
    held = [changed(train[i], share, generator) for i, share in enumerate(np.linspace(0, 0.5, 60))]
    train[5] = train[5][:12]
    held += [*random_documents(2, 20), train[100], train[3][:7], train[5]]
    pairs = near_duplicates(write_corpus(tmp_path / "train", train), write_corpus(tmp_path / "held", held), 0.6)
    expected = {}
    for j, document in enumerate(held):
        likeness = [similarity(document, other) if len(document) >= 8 else 0 for other in train]
        if max(likeness) >= 0.6:
            expected[j] = (int(np.argmax(likeness)), max(likeness))
    assert {p.held_out: (p.training, pytest.approx(p.similarity)) for p in pairs} == expected
    assert 20 < len(expected) < 60  # the threshold cuts through the copies


def test_hardly_a_pair_at_the_threshold_is_missed(tmp_path):
    generator = np.random.RandomState(3)
    train = random_documents(4, 600, 100, 101)
    held = [changed(document, 0.06, generator) for document in train]  # similarity 0.8 or a little more
    wanted = sum(similarity(a, b) >= 0.8 for a, b in zip(train, held, strict=True))
    found = near_duplicates(write_corpus(tmp_path / "t", train), write_corpus(tmp_path / "h", held), 0.8)
    assert wanted > 400
    assert len(found) >= 0.99 * wanted


def test_sentences_are_joined_to_documents(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = random_documents(5, 4)
    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), np.uint16)
    for document in documents:
        builder.add_document(document, [10, 15, len(document) - 25])
    builder.finalize(str(tmp_path / "s.idx"))
    pairs = near_duplicates(write_corpus(tmp_path / "t", documents[::-1]), tmp_path / "s")
    assert [(p.training, p.held_out, p.similarity) for p in pairs] == [(3 - i, i, 1.0) for i in range(4)]


@pytest.fixture
def stages(tmp_path):
    texts = random_documents(6, 60)
    generator = np.random.RandomState(7)
    near = changed(texts[7], 0.05, generator)
    found = {
        "train": texts[:40],
        "validation": texts[40:50],
        "test": [*texts[50:57], texts[11], texts[11], near],  # ten documents: one exact twice, one near
    }
    return {stage: write_corpus(tmp_path / stage, documents) for stage, documents in found.items()}


def test_the_report_counts_and_the_limits_decide(stages):
    given = {stage: [prefix] for stage, prefix in stages.items()}
    report = contamination.compare_stages(given)
    by_stages = {(found["of"]["stage"], found["in"]["stage"]): found for found in report["pairs"]}
    assert set(by_stages) == {("validation", "train"), ("test", "train")} | (
        {("test", "validation"), ("validation", "test")} & set(by_stages)
    )
    assert len(by_stages) == 3
    test = by_stages["test", "train"]
    assert (test["documents"], test["duplicates"], test["near_duplicates"]) == (10, 2, 1)
    assert test["nearest"][0]["document"] == 9 and test["nearest"][0]["is_like"] == 7
    assert [found["accepted"] for found in report["pairs"]].count(False) == 1 and not report["accepted"]
    says = r"of 10 documents of test .*, 2 are in train .* and 1 nearly so \(document 9 is like its document 7\)"
    with pytest.raises(DataError, match=says):
        contamination.refuse(report)
    for duplicates, near, accepted in ((0.2, 0.1, True), (0.19, 0.1, False), (0.2, 0.09, False)):
        assert contamination.compare_stages(
            given, max_duplicates=duplicates, max_near_duplicates=near)["accepted"] is accepted  # fmt: skip


def test_short_documents_are_equal_or_counted_and_every_duplicate_is_named(tmp_path):
    short, tiny = random_documents(8, 30, 8, 20), random_documents(9, 5, 1, 8)
    train = write_corpus(tmp_path / "train", [*random_documents(10, 50), *short, *tiny])
    test = write_corpus(tmp_path / "test", [*tiny, *short])
    report = contamination.compare_stages({"train": [train], "test": [test]}, max_duplicates=1)
    (found,) = report["pairs"]
    assert (found["documents"], found["duplicates"], found["too_short"]) == (35, 30, 5)
    assert found["exact"] == list(range(5, 35)) and report["shortest"] == 8
    assert "30 are in train" in contamination.line(found)
    assert contamination.line(found).endswith(", 5 are too short to compare (below 8 tokens)")
    nearly = [np.append(document, 7) for document in random_documents(10, 50)]
    report = contamination.compare_stages({"train": [train], "test": [write_corpus(tmp_path / "near", nearly)]})
    assert sorted(pair["document"] for pair in report["pairs"][0]["nearest"]) == list(range(50))


def test_what_cannot_be_compared_is_refused(stages):
    with pytest.raises(UsageError, match="corpora of at least two stages"):
        contamination.compare_stages({"train": [stages["train"], stages["test"]]})
    with pytest.raises(UsageError, match="--similarity: expected .*, got 7"):
        contamination.compare_stages({stage: [prefix] for stage, prefix in stages.items()}, similarity=7)
    with pytest.raises(UsageError, match="--max-near-duplicates: expected .*, got 3"):
        contamination.compare_stages({stage: [prefix] for stage, prefix in stages.items()}, max_near_duplicates=3)
    for number, stage in enumerate(("train", "test")):
        artifacts.write_json(f"{stages[stage]}.json", {"tokenizer": {"fingerprint": str(number)}})
    with pytest.raises(DataError, match="expected the same tokenizer"):
        near_duplicates(stages["train"], stages["test"])


def test_the_tool_reports_and_refuses(stages, tmp_path, capsys):
    flags = ["check-contamination", "--train", stages["train"], "--json", str(tmp_path / "report.json")]
    assert main([*flags, "--validation", stages["validation"]]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["accepted"] is True
    assert main([*flags, "--test", stages["test"]]) == 2
    assert "2 are in train" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["accepted"] is False
