"""Cached chunks give the ids of whole texts, for every kind of tokenizer and any text."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_prune.data import chunks
from megatron_prune.data.train_tokenizer import train_tokenizer
from tests import tiny

# Characters that the rules distinguish: letters of several scripts and cases, marks, digits, punctuation,
# every kind of blank, controls, characters that NFC makes ASCII, names of special tokens.
ALPHABET = st.one_of(
    st.sampled_from([*"aZsStTdlé'\"(.)_/-09 \t\n\r\x0b\x0c", " ", "\n", "'s", "'LL", "<|end|>", "</s>", "<SPECIAL_9>"]),
    st.sampled_from([*"\x00\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000\u200b\ufeff\u0301\u0345\u037e\u1fef\u212a\u2581"]),
    st.sampled_from([*"ßǅʰ你好あЖ٣½Ⅷ²€“”—☃😀\U0001d7d8"]),
    st.characters(exclude_categories=["Cs"]),
)
TEXTS = st.lists(ALPHABET, max_size=40).map("".join)

SPLIT = {name: pattern for name, pattern in zip(("llama3", "qwen2"), sorted(chunks.SPLITS), strict=True)}


def byte_level(kind, texts):
    if kind in ("gpt2", "smollm2"):
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if kind == "smollm2":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        steps = [
            pre_tokenizers.Split(Regex(SPLIT[kind]), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(["<|end|>", AddedToken("</s>", lstrip=True, rstrip=True)])
    made.add_tokens([AddedToken("a Z"), AddedToken("K;")])
    return made


def unequal(whole, cut, text):
    found, expected = cut.encode(text).tolist(), list(whole(text))
    assert found == expected, repr(text)


@pytest.fixture(scope="module")
def backends():
    texts = [*tiny.documents(100), 'a\n\n b\n  c.\n\nd (e) it\'s "f"' * 20]
    return {kind: byte_level(kind, texts) for kind in ("gpt2", "smollm2", "llama3", "qwen2")}


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3", "qwen2"])
def test_byte_level_tokenizers(kind, backends):
    backend = backends[kind]
    cut = chunks.of_hugging_face(backend)
    assert cut is not None

    @settings(max_examples=600, deadline=None)
    @given(TEXTS)
    @example("(\x1c \x1cx.\n/x\u3000 y\xa0 z")
    @example("a\u212a; \u212a; <|end|>  x")
    @example("x\n\n\n  12345y.\n\n  z'sa'' 's")
    def check(text):
        unequal(lambda t: backend.encode(t, add_special_tokens=False).ids, cut, text)

    check()
    for text in [*tiny.documents(300), open(chunks.__file__, encoding="utf-8").read(), open(__file__).read()]:
        unequal(lambda t: backend.encode(t, add_special_tokens=False).ids, cut, text)
    assert len(cut) > 1000, "nothing was remembered"


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken_patterns(pattern, tiny_documents):
    import tiktoken
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as megatron

    joined = " ".join(tiny_documents).encode()
    tokens = [bytes([i]) for i in range(256)]
    for length in (2, 3, 4, 6):
        tokens += sorted({joined[i : i + length] for i in range(3000)} - set(tokens))[:200]
    encoding = tiktoken.Encoding(
        name="test",
        pat_str=megatron._PATTERN_TIKTOKEN_V1 if pattern == "v1" else megatron._PATTERN_TIKTOKEN_V2,
        mergeable_ranks={token: i + 10 for i, token in enumerate(tokens)},
        special_tokens={"</s>": 0, "<SPECIAL_9>": 9},
    )
    whole = lambda text: encoding.encode(text, allowed_special="all")  # noqa: E731
    cut = chunks.of_tiktoken(whole, re.compile("</s>|<SPECIAL_9>"))
    assert cut is not None

    @settings(max_examples=600, deadline=None)
    @given(TEXTS)
    @example("x.\n/y \n/ (\n\n\n a</s>b")
    def check(text):
        unequal(whole, cut, text)

    check()
    for text in tiny_documents:
        unequal(whole, cut, text)


@pytest.mark.parametrize("mixed", [False, True])
def test_sentencepiece_bpe(mixed, tmp_path, tiny_documents):
    """As this project trains it, and with pieces that mix letters and punctuation."""
    import sentencepiece

    (tmp_path / "t.txt").write_text("\n".join(tiny_documents))
    if mixed:
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "t"), vocab_size=900, model_type="bpe",
            byte_fallback=True, split_by_unicode_script=False, split_by_number=False, minloglevel=2,
            user_defined_symbols=["<|end|>", "a."],
        )  # fmt: skip
    else:
        train_tokenizer([tmp_path / "t.txt"], tmp_path / "t.model", 900)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    cut = chunks.of_sentencepiece(processor)
    assert cut is not None and (cut._findall.__self__ is chunks.RUNS) is not mixed

    def same(text):
        assert cut.encode(processor.normalize(text)).tolist() == processor.encode(text), repr(text)

    @settings(max_examples=600, deadline=None)
    @given(TEXTS)
    @example(" \u2581 a\u2581 b\n\n c. d\n")
    def check(text):
        same(text)

    check()
    for text in tiny_documents:
        same(text)


def test_what_is_not_known_to_be_local_is_left_alone(backends, tmp_path, tiny_documents):
    rules = json.loads(backends["gpt2"].to_str())
    assert chunks.hugging_face_pattern(rules) is chunks.GPT2
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": rules["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": rules["pre_tokenizer"] | {"use_regex": False}},
        {"model": {"type": "Unigram"}},
    ):
        assert chunks.hugging_face_pattern(rules | change) is None, change
    import sentencepiece

    (tmp_path / "t.txt").write_text("\n".join(tiny_documents))
    train_tokenizer([tmp_path / "t.txt"], tmp_path / "u.model", 500, model_type="unigram")
    assert chunks.of_sentencepiece(sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "u.model"))) is None


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(chunks, "LIMIT", 3)
    cut = chunks.Chunks(lambda text: list(text.encode()), re.compile(r"\S+|\s+"))
    text = "a b c d e " + "f" * 99
    assert bytes(cut.encode(text).astype("uint8")) == text.encode() and len(cut) == 3
