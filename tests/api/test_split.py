"""One source of text, divided by document: which are held out, left out or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_prune.data import split
from megatron_prune.data.contamination import Documents
from megatron_prune.data.tokenizers import Tokenizer, load_tokenizer
from megatron_prune.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer("HuggingFaceTokenizer", tiny_tokenizer)


def texts(documents: Sequence[str]) -> split.Texts:
    def each() -> Iterator[str]:
        return iter(documents)

    return split.Texts("these", "these", each)


def read(folder: Path, part: str) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / f"{part}.jsonl").open(encoding="utf-8")]


def test_what_is_held_out_depends_on_the_text_alone(tmp_path, tokenizer, tiny_documents) -> None:
    everything = {"calibration": 10**9, "held_out": 10**9}
    made = split.prepare(texts(tiny_documents), tmp_path / "all", tokenizer, everything)
    split.prepare(
        texts(tiny_documents[::-1]),
        tmp_path / "back",
        tokenizer,
        {"calibration": 9000, "held_out": 10**9, "train": 5000},
    )
    held = read(tmp_path / "all", "held_out")
    assert sorted(held) == sorted(read(tmp_path / "back", "held_out"))
    assert 0.04 < len(held) / len(tiny_documents) < 0.2  # a tenth of them
    rest = read(tmp_path / "all", "calibration")
    gone = set(tiny_documents) - set(held) - set(rest)  # near duplicates of a document that is not held out
    assert not set(held) & set(rest) and len(gone) == made["left_out"]["held_out_but_alike"] <= 2
    assert rest == [text for text in tiny_documents if text in set(rest)]  # in the order of the source


def test_reading_ends_when_every_part_has_its_tokens(tmp_path, tokenizer, tiny_documents) -> None:
    wanted = {"calibration": 3000, "held_out": 500, "train": 2000}
    made = split.prepare(texts(tiny_documents), tmp_path, tokenizer, wanted)
    found = {part: made["parts"][part]["tokens"] for part in wanted}
    assert all(found[part] >= wanted[part] for part in wanted) and made["read"] < len(tiny_documents)
    assert found["calibration"] < 3000 + 2500 and found["train"] < 2000 + 2500  # except the last document of each
    assert not set(read(tmp_path, "calibration")) & set(read(tmp_path, "train"))
    for part in wanted:  # documents as the tokenizer sees them, each with its end
        corpus = Documents(tmp_path / part)
        expected = [[*tokenizer.encode(text), tokenizer.eod] for text in read(tmp_path, part)]
        assert [corpus.tokens(number).tolist() for number in range(len(corpus))] == expected
        assert found[part] == sum(map(len, expected))


def test_repeated_documents_are_taken_once_and_held_out_ones_that_are_alike_not_at_all(
    tmp_path, tokenizer, tiny_documents
) -> None:
    long = [text for text in tiny_documents if len(text) > 300]
    held = [text for text in long if split.is_held_out(text)][:2]
    assert len(held) == 2
    # A near copy that is not held out: the held-out one must go. A line separator must not cut a document.
    twin = next(f"{held[0]} {word}" for word in map(str, range(1000)) if not split.is_held_out(f"{held[0]} {word}"))
    odd = next(
        f"a\u2028b\x85c {held[1][::-1]} {n}"
        for n in range(1000)
        if split.is_held_out(f"a\u2028b\x85c {held[1][::-1]} {n}")
    )
    others = [text for text in long if not split.is_held_out(text)][:9]
    made = split.prepare(
        texts([odd, held[0], *others, twin, others[0], held[1], held[1]]), tmp_path, tokenizer,
        {"calibration": 10**6, "held_out": 10**6},
    )  # fmt: skip
    assert read(tmp_path, "held_out") == [odd, held[1]]
    assert read(tmp_path, "calibration") == [*others, twin]
    assert made["left_out"] == {"repeated": 2, "held_out_but_alike": 1}
    assert made["parts"]["held_out"]["documents"] == 2 == len(Documents(tmp_path / "held_out"))


def test_too_few_documents_are_refused(tmp_path, tokenizer, tiny_documents) -> None:
    kept = next(text for text in tiny_documents if not split.is_held_out(text))
    with pytest.raises(DataError, match="these: 1 different documents are too few: none is left for held-out"):
        split.prepare(texts([kept, kept]), tmp_path, tokenizer, {"calibration": 10, "held_out": 10})
    assert not (tmp_path / split.DONE).exists()


def test_a_run_that_was_killed_gives_the_same(tmp_path, tokenizer, tiny_documents, monkeypatch) -> None:
    wanted = {"calibration": 3000, "held_out": 500}
    expected = split.prepare(texts(tiny_documents), tmp_path / "at-once", tokenizer, wanted)

    def killed(*_: object) -> set[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(split, "_alike", killed)
        split.prepare(texts(tiny_documents), tmp_path / "killed", tokenizer, wanted)
    assert split.prepare(texts(tiny_documents), tmp_path / "killed", tokenizer, wanted) == expected
    for part in wanted:
        for ending in (".jsonl", ".bin", ".idx"):
            one, two = (tmp_path / name / f"{part}{ending}" for name in ("at-once", "killed"))
            assert one.read_bytes() == two.read_bytes()
    assert split.prepare(texts([]), tmp_path / "killed", tokenizer, wanted) == expected  # nothing is read again


def test_sources_say_their_names_and_what_tells_them_apart(tmp_path, tiny_jsonl) -> None:
    plain = tmp_path / "book.txt"
    plain.write_text("one\n\ntwo\n\nthree\n")
    whole, paragraphs = split.of_files([plain]), split.of_files([plain], text_documents="paragraph")
    assert list(whole.documents()) == ["one\n\ntwo\n\nthree\n"] and len(list(paragraphs.documents())) == 3
    assert whole.identity != paragraphs.identity and whole.name == str(plain)
    both = split.of_files([tiny_jsonl, plain])
    assert len(list(both.documents())) == 301 == len(list(both.documents()))  # from the start each time
    plain.write_text("other\n")
    assert split.of_files([plain]).identity != whole.identity


def test_text_of_this_machine_is_said_by_name(tmp_path, tokenizer) -> None:
    found = split.of_this_machine()
    assert "Python's manual" in found.name
    made = split.prepare(found, tmp_path, tokenizer, {"calibration": 4000, "held_out": 1000})
    assert made["name"] == found.name and made["parts"]["held_out"]["tokens"] >= 1000
