"""Every kind of input gives the tokens of its plain JSON lines; tiktoken and sentences agree with Megatron and NLTK."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_prune.__main__ import main
from megatron_prune.artifacts import read_json, sha256_file
from megatron_prune.data import hub, indexed
from megatron_prune.data import readers as text
from megatron_prune.data.chunks import load_splitter
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.data.train_tokenizer import train_tokenizer
from megatron_prune.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer("HuggingFaceTokenizer", tiny_tokenizer)


def hashes(prefix):
    return sha256_file(f"{prefix}.bin"), sha256_file(f"{prefix}.idx")


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(path, texts, kind=None, **options):
    columns = {"id": list(range(len(texts))), "text": pa.array(texts, pa.string()).cast(kind or pa.string())}
    pq.write_table(pa.table(columns), path, **options)
    return path


def as_pzstd(content):
    """A skippable frame with the size of the next, then that."""
    frame = zstandard.compress(content)
    return struct.pack("<III", 0x184D2A50, 4, len(frame)) + frame


def writers(texts):
    """name -> bytes or a function that writes the file."""
    lines = json_lines(texts)
    half = len(lines) // 2
    frames = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:], level=19)
    far = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=False)
    streamed = zstandard.ZstdCompressor(compression_params=far).compressobj()
    return {
        "x.jsonl": lines,
        "x.jsonl.gz": gzip.compress(lines),
        "x.jsonl.zst": frames,
        "X.JSONL.Zstd": frames,
        "pzstd.jsonl.zst": b"".join(map(as_pzstd, (lines[:half], lines[half:]))),
        "x.json.zst": zstandard.ZstdCompressor(write_content_size=False).compress(lines),
        "long.jsonl.zst": streamed.compress(lines) + streamed.flush(),  # zstd --long=28
        "misnamed.jsonl": zstandard.compress(lines),
        "x.parquet": lambda path: parquet(path, texts, row_group_size=7, compression="zstd"),
        "large.pq": lambda path: parquet(path, texts, pa.large_string()),
        "dictionary.parquet": lambda path: parquet(path, texts, pa.dictionary(pa.int32(), pa.string())),
    }


@pytest.mark.parametrize("name", list(writers(["a"])))
def test_every_format_gives_the_same_corpus(tmp_path, tokenizer, tiny_documents, name, monkeypatch):
    monkeypatch.setattr(text, "PARQUET_ROWS", 5)
    texts = [*tiny_documents[:40], "déjà vu ☃ \U0001f600", ""]
    (tmp_path / "plain.jsonl").write_bytes(json_lines(texts))
    preprocess([tmp_path / "plain.jsonl"], tmp_path / "P", tokenizer, append_eod=True)
    content = writers(texts)[name]
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    made = preprocess([tmp_path / name], tmp_path / "Q", tokenizer, append_eod=True, workers=2)
    assert hashes(tmp_path / "Q") == hashes(tmp_path / "P")
    assert made.sidecar["empty_documents"] == 1 and made.sidecar["documents"] == made.sidecar["sequences"] == 41


def test_the_format_can_be_said_where_the_name_does_not(tmp_path, tokenizer):
    parquet(tmp_path / "shard", ["one", "two"])
    (tmp_path / "lines").write_bytes(zstandard.compress(json_lines(["one", "two"])))
    (tmp_path / "x.jsonl").write_text("one\ntwo\n")
    for name, kind in (("shard", "parquet"), ("lines", "jsonl"), ("x.jsonl", "text")):
        preprocess([tmp_path / name], tmp_path / kind, tokenizer, input_format=kind, text_documents="line")
    assert hashes(tmp_path / "parquet") == hashes(tmp_path / "jsonl") == hashes(tmp_path / "text")


@pytest.mark.parametrize("name", ["x.jsonl.gz.part", "part-00000", "x.jsonl.xz", "x.csv.gz", "zst", "x.jsonl.gz.zst"])
def test_a_name_that_says_no_format_is_refused_before_anything_is_read(tmp_path, tokenizer, name):
    for found in ("good.jsonl", name):
        (tmp_path / found).write_bytes(json_lines(["one", "two"]))
    formats = "jsonl, parquet, array_record or text"
    says = rf"--input-format: expected {formats}, got auto for .*/{name} .*\.jsonl.*\.txt.*\.zstd"
    with pytest.raises(UsageError, match=says):
        preprocess([tmp_path / "good.jsonl", tmp_path / name], tmp_path / "P", tokenizer)
    with pytest.raises(UsageError, match=says):
        train_tokenizer([tmp_path / name], tmp_path / "t.model", 400)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["good.jsonl", name])
    preprocess([tmp_path / "good.jsonl", tmp_path / name], tmp_path / "P", tokenizer, input_format="jsonl")


def test_text_is_what_is_named_so():
    for name in ("a.txt", "a.TXT.GZ", "a.text", "README.md", "a.rst.zst"):
        assert text.format_of(Path(name)) == "text"


def test_broken_files_are_named(tmp_path, tokenizer):
    lines = json_lines([f"number {i} " * 50 for i in range(500)])
    compressed = zstandard.compress(lines)
    parquet(tmp_path / "good.parquet", ["a", "b"])
    cases = {
        "cut.jsonl.zst": (compressed[:-9], "cannot read .*cut.jsonl.zst to its end"),
        "torn.jsonl.zst": (compressed[:40] + b"\x00" * 40 + compressed[80:], "cannot read .*torn.jsonl.zst to its end"),
        "cut.pzstd.jsonl.zst": (as_pzstd(lines)[:10], "cannot read .*cut.pzstd.jsonl.zst to its end"),
        "cut.parquet": ((tmp_path / "good.parquet").read_bytes()[:-5], "cannot read .*cut.parquet to its end"),
    }
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            preprocess([tmp_path / name], tmp_path / "P", tokenizer)
    with pytest.raises(DataError, match=r"expected the column 'body' of --json-keys, got id, text"):
        preprocess([tmp_path / "good.parquet"], tmp_path / "P", tokenizer, json_key="body")
    with pytest.raises(DataError, match="column 'id': expected strings, got int64"):
        preprocess([tmp_path / "good.parquet"], tmp_path / "P", tokenizer, json_key="id")
    assert not list(tmp_path.glob("P*")) and not list(tmp_path.glob(".P*"))


def test_null_is_an_empty_document(tmp_path, tokenizer):
    (tmp_path / "plain.jsonl").write_bytes(json_lines(["one", "two"]))
    preprocess([tmp_path / "plain.jsonl"], tmp_path / "P", tokenizer)
    (tmp_path / "null.jsonl").write_bytes(json_lines(["one", None, "two", None]))
    parquet(tmp_path / "null.parquet", ["one", None, "two"])
    pq.write_table(pa.table({"text": pa.nulls(1)}), tmp_path / "only.parquet")
    for inputs in (["null.jsonl"], ["null.parquet", "only.parquet"]):
        made = preprocess([tmp_path / name for name in inputs], tmp_path / "Q", tokenizer)
        assert hashes(tmp_path / "Q") == hashes(tmp_path / "P") and made.sidecar["empty_documents"] == 2


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=8), st.sampled_from(["uint16", "int32"]))
def test_the_index_is_megatrons_byte_for_byte(tmp_path_factory, documents, dtype):
    folder = tmp_path_factory.mktemp("index")
    builder = IndexedDatasetBuilder(str(folder / "m.bin"), np.dtype(dtype).type)
    for lengths in documents:
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(folder / "m.idx"))
    pieces = [np.array(lengths, dtype=np.int32) for lengths in documents]
    indexed.write_index(folder / "o.idx", pieces, [np.array([len(p) for p in pieces])], dtype)
    assert (folder / "o.idx").read_bytes() == (folder / "m.idx").read_bytes()


def test_token_types_are_megatrons():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (None, 10, 65499, 65500, 200_000):
        assert np.dtype(indexed.token_type(size)) == np.dtype(DType.optimal_dtype(size))
    assert {name: DType.code_from_dtype(np.dtype(name).type) for name in indexed.TOKEN_TYPES} == (indexed.TOKEN_TYPES)


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory, tiny_documents):
    """A vocabulary in Megatron's format: the 256 bytes, then words and pairs that occur."""
    tokens = [bytes([i]) for i in range(256)]
    joined = " ".join(tiny_documents).encode()
    for length in (2, 3, 4):
        tokens += sorted({joined[i : i + length] for i in range(0, 4000, length)} - set(tokens))[:150]
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": t.decode("utf-8", "replace")}
        for i, t in enumerate(tokens)
    ]
    path = tmp_path_factory.mktemp("tiktoken") / "vocab.json"
    path.write_text(json.dumps(entries))
    return path


def megatron_tiktoken(path, **settings):
    """Megatron's tokenizer, built as in a training run."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    given = {
        "tokenizer_type": "TikTokenizer", "tokenizer_model": str(path), "chat_template": None,
        "tiktoken_pattern": None, "tiktoken_num_special_tokens": 1000, "vocab_size": None, "special_tokens": None,
        "metadata_path": None, "rank": 1, "make_vocab_size_divisible_by": 1, "tensor_model_parallel_size": 1,
        "pad_vocab_size": False, "padded_vocab_size": None,
    }  # fmt: skip
    return build_tokenizer(Namespace(**{**given, **settings}))


@pytest.mark.parametrize("pattern", [None, "v1", "v2"])
def test_tiktoken_ids_are_megatrons(tiktoken_file, tiny_documents, pattern):
    given = {"pattern": pattern} if pattern else {}
    ours = load_tokenizer("TikTokenizer", tiktoken_file, vocab_size=600, num_special_tokens=20, **given)
    oracle = megatron_tiktoken(tiktoken_file, vocab_size=600, tiktoken_num_special_tokens=20, tiktoken_pattern=pattern)
    texts = [*tiny_documents[:20], "", "a </s> b<s>", "<SPECIAL_19><SPECIAL_20>", "X2025  Ünïcode\r\n\n12 ☃'s"]
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == [oracle.tokenize(text) for text in texts]
    assert (ours.eod, ours.vocab_size) == (oracle.eod, oracle.vocab_size) == (2, 600)
    assert ours.encode("</s>") == [2]


def test_a_tiktoken_file_that_does_not_fit_is_refused(tiktoken_file, tmp_path):
    with pytest.raises(UsageError, match=r"--vocab-size: expected at most 1[67]\d\d, got 131072 \(the default\)"):
        load_tokenizer("TikTokenizer", tiktoken_file)
    with pytest.raises(DataError, match="absent.json, which does not exist"):
        load_tokenizer("TikTokenizer", tmp_path / "absent.json")
    (tmp_path / "t.json").write_text('[{"rank": 0}]')
    with pytest.raises(DataError, match="is not a tiktoken vocabulary as Megatron reads it"):
        load_tokenizer("TikTokenizer", tmp_path / "t.json")
    with pytest.raises(DataError, match="cannot make a tiktoken tokenizer"):
        load_tokenizer("TikTokenizer", tiktoken_file, vocab_size=300, num_special_tokens=3)
    with pytest.raises(UsageError, match="--vocab-size: expected --tokenizer-type TikTokenizer with them"):
        load_tokenizer("HuggingFaceTokenizer", "x", vocab_size=3)


@pytest.fixture(scope="module")
def nltk_data(tmp_path_factory, tiny_documents):
    """A Punkt model trained on the tests' text, as NLTK lays it out."""
    import nltk.data
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    trainer = PunktTrainer()
    trainer.INCLUDE_ALL_COLLOCS = True
    trainer.train("\n".join(tiny_documents) + " Dr. No met Mr. Bond. Mr. Bond met Dr. No. Mr. Ed saw Dr. Ed." * 9)
    folder = tmp_path_factory.mktemp("nltk_data")
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    nltk.data.path.insert(0, str(folder))
    save_punkt_params(trainer.get_params(), dir=str(folder / "tokenizers" / "punkt_tab" / "english"))
    nltk.data.path.remove(str(folder))
    return folder


SENTENCES = ["Mr. Bond is here. He left!  Did he?", "", "One\n\nonly", "  Indented. Twice.  \n", "Dr. No. said 3.14."]


def test_sentences_are_the_sequences_of_a_document(tmp_path, tokenizer, nltk_data, tiny_documents):
    import nltk.data
    from nltk.tokenize.punkt import PunktSentenceTokenizer, load_punkt_params

    splitter = load_splitter("english", nltk_data)
    oracle = PunktSentenceTokenizer(load_punkt_params(nltk.data.find("tokenizers/punkt_tab/english/")))
    texts = [*SENTENCES, *tiny_documents[:30]]
    (tmp_path / "x.jsonl").write_bytes(json_lines(texts))
    made = preprocess([tmp_path / "x.jsonl"], tmp_path / "P", tokenizer, append_eod=True, splitter=splitter, workers=2)
    expected = []
    for document in texts:  # as Megatron's Encoder.encode
        sentences = [ids for ids in map(tokenizer.encode, oracle.tokenize(document)) if ids]
        if sentences:
            sentences[-1].append(tokenizer.eod)
            expected.append(sentences)
    corpus = IndexedDataset(str(tmp_path / "P"))
    ends = corpus.document_indices
    found = [[corpus[i].tolist() for i in range(a, b)] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    assert found == expected
    assert made.sidecar["documents"] == len(expected) < made.sidecar["sequences"] == sum(map(len, expected))
    assert made.sidecar["sentences"] == {"language": "english", "keep_newlines": False}
    assert len(found[0]) == 3, "Mr. does not end a sentence"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab. !?\n\t\"'A"), max_size=60))
@example("  \n")
def test_kept_newlines_lose_no_character(nltk_data, text):
    kept, plain = load_splitter("english", nltk_data, keep_newlines=True), load_splitter("english", nltk_data)
    assert "".join(kept.split(text)) == text
    assert [s.strip() for s in kept.split(text) if s.strip()] == [s.strip() for s in plain.split(text) if s.strip()]


def test_a_missing_punkt_model_says_what_to_download(tmp_path):
    with pytest.raises(DataError, match=r"no Punkt model for 'klingon'.*nltk.downloader -d DIR punkt_tab.*--nltk-data"):
        load_splitter("klingon", tmp_path)
    with pytest.raises(UsageError, match="--nltk-data: expected .*, got .*absent"):
        load_splitter("english", tmp_path / "absent")
    with pytest.raises(UsageError, match="--lang"):
        load_splitter("../english", tmp_path)


@pytest.fixture
def dataset(tmp_path, tiny_documents):
    """A folder that ``datasets`` can load, three shards; and its texts."""
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for number in range(3):
        parquet(folder / f"train-{number:05d}-of-00003.parquet", tiny_documents[number * 20 : number * 20 + 20])
    return tmp_path / "dataset", tiny_documents[:60]


def test_a_data_set_is_streamed_by_shard(tmp_path, tokenizer, dataset):
    folder, texts = dataset
    (tmp_path / "x.jsonl").write_bytes(json_lines(texts))
    preprocess([tmp_path / "x.jsonl"], tmp_path / "P", tokenizer, append_eod=True)
    shards = hub.shards(str(folder))
    assert len(shards) == 3
    made = preprocess(shards, tmp_path / "Q", tokenizer, append_eod=True, workers=2)
    assert hashes(tmp_path / "Q") == hashes(tmp_path / "P")
    assert [found["shard"] for found in made.sidecar["inputs"]] == [[0, 3], [1, 3], [2, 3]]


def test_null_in_a_data_set_is_an_empty_document(tmp_path, tokenizer):
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    (tmp_path / "dataset").mkdir()
    parquet(tmp_path / "dataset" / "train.parquet", ["one", None])
    made = preprocess(hub.shards(str(tmp_path / "dataset")), tmp_path / "P", tokenizer)
    assert (made.sidecar["documents"], made.sidecar["empty_documents"]) == (1, 1)


def test_data_sets_that_cannot_be_had_are_refused(dataset, monkeypatch):
    folder, _ = dataset
    with pytest.raises(DataError, match=r"expected the column 'body' of --json-keys, got id, text"):
        hub.shards(str(folder), column="body")
    with pytest.raises(UsageError, match="--dataset, --dataset-split: expected .*, got .*, dev .*train"):
        hub.shards(str(folder), split="dev")
    with pytest.raises(UsageError, match="--dataset, --dataset-split"):
        hub.shards(f"{folder}:other")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'megatron-prune\[datasets\]'"):
        hub.shards(str(folder))


def test_the_tool_takes_every_input_and_a_blend_of_its_outputs_is_a_stream(
    tmp_path, dataset, tiktoken_file, nltk_data, tiny_documents, capsys
):
    from megatron_prune.data.streams import Stream

    folder, _ = dataset
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(json_lines(tiny_documents[60:160])))

    def tool(*flags):
        fixed = ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", tiktoken_file, "--vocab-size", "700"]
        return main(["preprocess", *(str(word) for word in [*fixed, "--tiktoken-num-special-tokens", "50", *flags])])

    assert tool("--dataset", folder, "--output-prefix", tmp_path / "A", "--append-eod") == 0
    zipped = tmp_path / "x.jsonl.zst"
    assert tool("--input", zipped, "--output-prefix", tmp_path / "B", "--append-eod", "--workers", "2") == 0
    stream = Stream.build(["30", str(tmp_path / "A"), "70", str(tmp_path / "B")], 32, seed=1)
    members = [stream[i]["dataset_id"] for i in range(len(stream))]
    assert abs(np.mean(members) - 0.7) < 0.02 and len(members) > 100
    oracle = megatron_tiktoken(tiktoken_file, vocab_size=700, tiktoken_num_special_tokens=50)
    corpus = IndexedDataset(str(tmp_path / "B"))  # keep a reference: its arrays are views of a file that it unmaps
    assert corpus[0].tolist() == [*oracle.tokenize(tiny_documents[60]), oracle.eod]
    assert tool("--dataset", folder, "--input", zipped, "--output-prefix", tmp_path / "C") == 2
    assert "--input, --dataset: expected exactly one of them, got both" in capsys.readouterr().err
    sentences = ["--split-sentences", "--nltk-data", nltk_data, "--keep-newlines"]
    assert tool("--input", zipped, "--output-prefix", tmp_path / "D", *sentences) == 0
    assert read_json(tmp_path / "D.json")["sentences"]["keep_newlines"] is True
    assert tool("--input", zipped, "--output-prefix", tmp_path / "E", "--keep-newlines") == 2
    assert "expected --split-sentences with them" in capsys.readouterr().err
