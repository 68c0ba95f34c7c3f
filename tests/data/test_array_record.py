"""array_record files, written by their own library: texts, and token ids as they are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.__main__ import main
from megatron_prune.data.indexed import open_indexed
from megatron_prune.data.readers import RECORDS, records

module = pytest.importorskip("array_record.python.array_record_module", reason="pip install array_record")


def write(path: Path, payloads: list[bytes]) -> Path:
    writer = module.ArrayRecordWriter(str(path), "group_size:3")
    for payload in payloads:
        writer.write(payload)
    writer.close()
    return path


def preprocess(path: Path, tokenizer: Path, output: Path, *more: str) -> int:
    words = ["preprocess", "--input", str(path), "--output-prefix", str(output), "--append-eod"]
    return main([*words, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), *more])


def sequences(prefix: Path) -> list[list[int]]:
    found = open_indexed(str(prefix))
    tokens = np.fromfile(f"{prefix}.bin", found.index.dtype)
    lengths = found.sequence_lengths
    return [tokens[end - length : end].tolist() for end, length in zip(np.cumsum(lengths), lengths, strict=True)]


def test_records_are_read_in_order(tmp_path) -> None:
    payloads = [f"text {number}".encode() for number in range(2 * RECORDS + 3)]
    path = write(tmp_path / "texts.array_record", payloads)
    found = list(records([path]))
    assert [one.payload for one in found] == payloads and found[-1].origin == f"{path}:{len(payloads)}"


@pytest.mark.parametrize("kind", ["uint16", "int32", "uint32", "int64"])
def test_token_ids_are_kept(kind, tiny_tokenizer, tmp_path) -> None:
    draw = np.random.default_rng(3)
    ids = [draw.integers(1, 379, size=length).tolist() for length in (5, 0, 17, 1)]
    path = write(
        tmp_path / "ids.array_record", [np.array(one, np.dtype(kind).newbyteorder("<")).tobytes() for one in ids]
    )
    assert preprocess(path, tiny_tokenizer, tmp_path / "out", "--input-tokens", kind) == 0
    assert sequences(tmp_path / "out") == [[*one, 0] for one in ids if one]


def test_texts_are_tokenized(tiny_tokenizer, tiny_documents, tmp_path) -> None:
    from megatron_prune.data.tokenizers import load_tokenizer

    tokenizer, texts = load_tokenizer("HuggingFaceTokenizer", tiny_tokenizer), tiny_documents[:4]
    path = write(tmp_path / "texts.array_record", [text.encode() for text in texts])
    assert preprocess(path, tiny_tokenizer, tmp_path / "out") == 0
    assert sequences(tmp_path / "out") == [[*tokenizer.encode(text), 0] for text in texts]


def test_what_cannot_be_read_is_refused(tiny_tokenizer, tiny_jsonl, tmp_path, capsys) -> None:
    whole = write(tmp_path / "whole.array_record", [bytes(6)])
    cut = tmp_path / "cut.array_record"
    cut.write_bytes(whole.read_bytes()[:-70_000])
    large = write(tmp_path / "large.array_record", [np.array([379], "<i4").tobytes()])
    for path, more, says in (
        (cut, [], "cannot read .*cut.array_record to its end"),
        (whole, ["--input-tokens", "int32"], "has 6 bytes, expected whole ids of type int32"),
        (large, ["--input-tokens", "int32"], "the input holds, as int32, an id outside the .* of 379"),
        (tiny_jsonl, ["--input-tokens", "int32"], "--input-tokens: expected whole records of array_record files, got"),
    ):  # fmt: skip
        assert preprocess(path, tiny_tokenizer, tmp_path / "out", *more) == 2
        assert re.search(says, capsys.readouterr().err), says
