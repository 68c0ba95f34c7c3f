"""Preprocessing: what Megatron reads back, the same bytes for any number of workers, and refusals."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_prune.artifacts import sha256_file
from megatron_prune.data import preprocess as module
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.tokenizers import check_fits, check_fits_checkpoint, load_tokenizer
from megatron_prune.data.train_tokenizer import train_tokenizer
from megatron_prune.errors import DataError, UsageError
from tests import tiny

ROOT = Path(__file__).parents[2]
PROSE = Path(json.__file__).read_text() + Path(os.__file__).read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "prose.txt").write_text(PROSE)
    train_tokenizer([folder / "prose.txt"], folder / "t.model", 400)
    return folder / "t.model"


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(PROSE.splitlines(), trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def jsonl(path, texts, key="text"):
    payload = "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts))
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(payload.encode())
    return path


def read_back(prefix):
    corpus = IndexedDataset(str(prefix))  # keep a reference: its arrays are views of a file that it unmaps
    return [document.tolist() for document in corpus[:]]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=60), min_size=1, max_size=20), st.booleans())
def test_megatron_reads_back_exactly_the_tokens(tmp_path_factory, model, texts, append_eod):
    folder = tmp_path_factory.mktemp("p")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [oracle.encode(t) + [2] * append_eod for t in texts if oracle.encode(t)]
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    run = lambda: preprocess([jsonl(folder / "x.jsonl", texts)], folder / "P", tokenizer, append_eod=append_eod)  # noqa: E731
    if not expected:
        with pytest.raises(DataError, match=f"none of the {len(texts)} documents"):
            run()
        assert not list(folder.glob("P*"))
        return
    made = run().sidecar
    assert read_back(folder / "P") == expected
    assert made["documents"] == len(expected) and made["empty_documents"] == len(texts) - len(expected)
    assert made["tokens"] == sum(map(len, expected))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, model, hf_folder, kind, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 2000)  # many batches
    tokenizer = load_tokenizer(kind, model if kind.startswith("S") else hf_folder)
    paragraphs = PROSE.split("\n\n")
    inputs = [jsonl(tmp_path / "a.jsonl", paragraphs), jsonl(tmp_path / "b.jsonl.gz", paragraphs[::-1] + [""])]
    hashes = set()
    for workers in (1, 2, 3):
        prefix = tmp_path / f"w{workers}"
        preprocess(inputs, prefix, tokenizer, append_eod=True, workers=workers)
        hashes.add(tuple(sha256_file(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")))
    assert len(hashes) == 1
    sidecar = json.loads((tmp_path / "w1.json").read_text())
    assert sidecar["bin_sha256"] == sha256_file(tmp_path / "w1.bin")
    assert sidecar["empty_documents"] >= 1 and sidecar["tokenizer"]["fingerprint"] == tokenizer.fingerprint()


def test_hugging_face_ids_are_transformers_without_special_tokens(tmp_path, hf_folder):
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(hf_folder)
    assert oracle("x")["input_ids"][0] == 0  # it would prepend <s> if asked to
    texts = ["The quick brown fox", "  déjà vu\n\n", "</s> inside"]
    tokenizer = load_tokenizer("HuggingFaceTokenizer", hf_folder)
    preprocess([jsonl(tmp_path / "x.jsonl", texts)], tmp_path / "P", tokenizer, append_eod=True)
    assert read_back(tmp_path / "P") == [oracle(t, add_special_tokens=False)["input_ids"] + [1] for t in texts]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", ["a b\nc\n\n\nd\n"]),
        ("paragraph", ["a b\nc\n", "d\n"]),
        ("line", ["a b", "c", "d"]),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_documents_of_plain_text(tmp_path, model, documents, expected, zipped):
    path = tmp_path / "x.txt"
    path.write_bytes(gzip.compress(b"a b\nc\n\n\nd\n") if zipped else b"a b\nc\n\n\nd\n")
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    preprocess([path], tmp_path / "P", tokenizer, text_documents=documents)
    assert read_back(tmp_path / "P") == [tokenizer.encode(text) for text in expected]


class Bytes:
    """A tokenizer of a chosen size whose ids are the text's bytes, counted from the top."""

    type, model, eod = "Bytes", "none", None

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) + np.int32(self.vocab_size - 256) for text in texts]

    def fingerprint(self):
        return "0" * 64

    def digest(self):
        return f"{self.vocab_size:064x}"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (200_000, "int32")])
def test_token_type_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    made = preprocess([jsonl(tmp_path / "x.jsonl", ["\x00az"])], tmp_path / "P", Bytes(vocab_size))
    assert made.sidecar["dtype"] == np.dtype(IndexedDataset(str(tmp_path / "P")).index.dtype).name == dtype
    assert read_back(tmp_path / "P") == [[vocab_size - 256 + byte for byte in b"\x00az"]]
    with pytest.raises(UsageError, match="--append-eod: expected .*, got .*, which has none"):
        preprocess([tmp_path / "x.jsonl"], tmp_path / "P", Bytes(vocab_size), append_eod=True)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": 3}', r"x.jsonl:2: expected text under 'text', got the keys text"),
        ('{"content": "a"}', r"x.jsonl:2: expected text under 'text', got the keys content; see --json-keys"),
        ("[1]", "x.jsonl:2: .*not an object"),
        ("{broken", "x.jsonl:2: expected JSON"),
        ('{"n": ' + "1" * 5000 + "}", "x.jsonl:2: expected JSON"),
        ("[" * 100_000, "x.jsonl:2: expected JSON"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_is_named_and_leaves_nothing(tmp_path, model, line, says, workers):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=says):
        preprocess([tmp_path / "x.jsonl"], tmp_path / "out" / "P", load_tokenizer("SentencePieceTokenizer", model),
                   workers=workers)  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


def test_a_failed_run_leaves_the_earlier_corpus_alone(tmp_path, model):
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    preprocess([jsonl(tmp_path / "x.jsonl", ["first"])], tmp_path / "P", tokenizer)
    (tmp_path / "y.jsonl").write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(DataError):
        preprocess([tmp_path / "y.jsonl"], tmp_path / "P", tokenizer)
    assert read_back(tmp_path / "P") == [tokenizer.encode("first")]
    preprocess([jsonl(tmp_path / "x.jsonl", ["second"])], tmp_path / "P", tokenizer)
    assert read_back(tmp_path / "P") == [tokenizer.encode("second")]


def test_truncated_gzip_and_foreign_encodings_are_refused(tmp_path, model):
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(PROSE.encode())[:-100])
    with pytest.raises(DataError, match="cannot read .*x.txt.gz to its end"):
        preprocess([path], tmp_path / "P", tokenizer)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt:1: expected UTF-8"):
        preprocess([tmp_path / "latin.txt"], tmp_path / "P", tokenizer)
    with pytest.raises(UsageError, match="--input: expected .*, got .*absent"):
        preprocess([tmp_path / "absent.txt"], tmp_path / "P", tokenizer)


def test_half_a_surrogate_pair_does_not_stop_a_corpus(tmp_path, model, hf_folder):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    for kind, source in (("SentencePieceTokenizer", model), ("HuggingFaceTokenizer", hf_folder)):
        tokenizer = load_tokenizer(kind, source)
        preprocess([tmp_path / "x.jsonl"], tmp_path / "P", tokenizer)
        assert read_back(tmp_path / "P") == [tokenizer.encode("a\ufffd b \U0001f600")]


class Checkpoint:
    """The part of a checkpoint that the check reads."""

    def __init__(self, huggingface=None):
        self.huggingface, self.root = huggingface, Path("/checkpoints/parent")


def test_a_tokenizer_that_does_not_fit_the_checkpoint_is_refused(model, hf_folder):
    small, own = load_tokenizer("SentencePieceTokenizer", model), load_tokenizer("HuggingFaceTokenizer", hf_folder)
    check_fits_checkpoint(own, Checkpoint(hf_folder), 500)
    check_fits(small, 400)
    with pytest.raises(DataError, match="t.model: expected the checkpoint's vocabulary of 399, got 400"):
        check_fits_checkpoint(small, Checkpoint(), 399)
    with pytest.raises(DataError, match="is not the tokenizer of checkpoint /checkpoints/parent"):
        check_fits_checkpoint(small, Checkpoint(hf_folder), 500)  # small enough, but its ids stand for other text


@pytest.mark.parametrize(
    ("kind", "path", "error", "says"),
    [
        ("GPT2BPETokenizer", "x", UsageError, "--tokenizer-type: expected .*, got GPT2BPETokenizer"),
        ("SentencePieceTokenizer", "absent.model", DataError, "absent.model, which does not exist"),
        ("SentencePieceTokenizer", __file__, DataError, "expected a SentencePiece model"),
        ("HuggingFaceTokenizer", str(ROOT / "tests" / "data"), DataError, "cannot load a Hugging Face tokenizer"),
    ],
)
def test_tokenizers_that_cannot_be_loaded(kind, path, error, says):
    with pytest.raises(error, match=says):
        load_tokenizer(kind, path)


@pytest.mark.parametrize("name", ["nothere", "./nothere", "/no/where", "a/b/c", "owner/nothere"])
@pytest.mark.parametrize("offline", [True, False])
def test_a_tokenizer_that_is_not_there_costs_one_short_question_at_most(monkeypatch, tmp_path, name, offline):
    """Transformers asks the Hub for each file of a tokenizer, several times, which takes a minute."""
    import huggingface_hub
    import transformers

    asked = []

    def model_info(self, repo_id, timeout=None, **_):
        asked.append((repo_id, timeout))
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.chdir(tmp_path)
    says = f"--tokenizer-model: expected .*, got {name} .no directory {name}"
    with pytest.raises(UsageError, match=says) as refused:
        load_tokenizer("HuggingFaceTokenizer", name)
    can_be_a_name = name in ("nothere", "owner/nothere")
    if can_be_a_name and not offline:
        assert len(asked) == 1 and asked[0][0] == name and asked[0][1] <= 10
        assert "Name or service not known" in str(refused.value)
    else:
        assert asked == [] and ("HF_HUB_OFFLINE" in str(refused.value)) == can_be_a_name


def test_training_a_tokenizer_is_deterministic_and_lossless(tmp_path):
    (tmp_path / "p.txt").write_text(PROSE)
    jsonl(tmp_path / "p.jsonl.gz", [PROSE])
    for kind in ("bpe", "unigram"):
        for name, source in (("a", "p.txt"), ("b", "p.txt"), ("c", "p.jsonl.gz")):
            train_tokenizer([tmp_path / source], tmp_path / f"{kind}.{name}", 500, model_type=kind)
        made = {(tmp_path / f"{kind}.{name}").read_bytes() for name in "abc"}
        assert len(made) == 1
        processor = sentencepiece.SentencePieceProcessor(model_proto=made.pop())
        assert processor.get_piece_size() == 500
        assert [processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()] == [0, 1, 2, 3]
        text = "def f():\n    return 1234  # déjà\t☃\n\n"
        assert processor.decode(processor.encode(text)) == text


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a few words only")
    with pytest.raises(DataError, match="cannot learn 4000 pieces"):
        train_tokenizer([tmp_path / "p.txt"], tmp_path / "t.model", 4000)
    with pytest.raises(UsageError, match="--vocab-size: expected .*, got 260"):
        train_tokenizer([tmp_path / "p.txt"], tmp_path / "t.model", 260)
    assert not (tmp_path / "t.model").exists()


def test_the_tools_run_as_their_users_run_them(tmp_path):
    (tmp_path / "p.txt").write_text(PROSE)

    def tool(*words):
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)

    made = tool(
        "-m", "megatron_prune", "train-tokenizer", "--input", "p.txt", "--output", "t.model", "--vocab-size", "400"
    )
    assert made.returncode == 0, made.stderr
    flags = ["--input", "p.txt", "--output-prefix", "P", "--tokenizer-model", "t.model", "--workers", "2"]
    made = tool(
        ROOT / "tools" / "preprocess_data.py", *flags, "--tokenizer-type", "SentencePieceTokenizer", "--append-eod"
    )
    assert made.returncode == 0, made.stderr
    assert "1 documents" in made.stdout and read_back(tmp_path / "P")[0][-1] == 2
    refused = tool(ROOT / "tools" / "preprocess_data.py", *flags, "--tokenizer-type", "NullTokenizer")
    assert refused.returncode == 2 and "got NullTokenizer" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_checkpoint_flag_knows_its_own_tokenizer(tmp_path, tiny_parent, tiny_tokenizer, tiny_jsonl, model):
    def tool(kind, source):
        command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tiny_jsonl]
        command += ["--output-prefix", tmp_path / kind, "--checkpoint", tiny_parent]
        command += ["--tokenizer-type", kind, "--tokenizer-model", source]
        return subprocess.run(command, text=True, capture_output=True)

    accepted = tool("HuggingFaceTokenizer", tiny_tokenizer)
    assert accepted.returncode == 0, accepted.stderr
    refused = tool("SentencePieceTokenizer", model)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"t.model: expected the checkpoint's vocabulary of {tiny.VOCABULARY}, got 400" in refused.stderr
    assert not list(tmp_path.glob("SentencePieceTokenizer*"))


def test_a_killed_run_leaves_no_corpus_and_the_next_one_cleans_up(tmp_path, model):
    jsonl(tmp_path / "x.jsonl", [PROSE] * 3000)
    (tmp_path / "out").mkdir()
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", tmp_path / "x.jsonl"]
    command += ["--output-prefix", tmp_path / "out" / "P", "--tokenizer-type", "SentencePieceTokenizer"]
    with subprocess.Popen([*command, "--tokenizer-model", model], stderr=subprocess.DEVNULL) as running:
        while not any(path.stat().st_size for path in (tmp_path / "out").glob(".P*/*.bin")):
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        running.kill()
    assert not list((tmp_path / "out").glob("P*")) and list((tmp_path / "out").glob(".P*"))
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    preprocess([jsonl(tmp_path / "y.jsonl", ["short"])], tmp_path / "out" / "P", tokenizer)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["P.bin", "P.idx", "P.json"]
    assert read_back(tmp_path / "out" / "P") == [tokenizer.encode("short")]
