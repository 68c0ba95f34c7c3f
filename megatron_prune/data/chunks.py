r"""Faster tokenizing by caching: text is tokenized in chunks, and the tokens of frequent chunks are reused.

A text is split before whitespace into chunks (a word with the blanks before it), where the tokenizer is
known neither to form a token across the split nor to look across it. The tokens of the text are then the
concatenated tokens of its chunks. This is used only for tokenizers whose rules are known here and that
pass ``TRIALS``; all others get whole texts.

What makes a split safe:

* byte-level BPE with the patterns of GPT-2, Llama 3, Qwen 2 or Megatron's tiktoken: no alternative of
  these patterns continues from a non-blank to a blank (except line ends after punctuation, which are not
  split) or from ASCII letters to other ASCII; and ``\s+(?!\S)`` looks no further than the blanks that it
  matches and the next character;
* SentencePiece BPE with byte fallback: two symbols are merged only if their union is a piece, and no
  piece of the vocabulary contains a pair of characters at which the text is split.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.artifacts import sha256_json
from megatron_prune.errors import DataError, UsageError

LIMIT = 1 << 18  # chunks cached, about 50 MB per process
LONGEST = 64  # longest chunk to cache, in characters

_BLANK, _PUNCTUATION = r" \t\n\r\x0b\x0c", r"!-/:-@\[-`{-~"
# Characters that only some tokenizers treat as blanks, or blanks without a split: a chunk continues after them.
_ODD = r"\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_END = rf"(?=[!-~{_BLANK}]|\Z)"  # the next character is ASCII, not a letter, mark or digit of another script


def _rest(line_ends: str = "") -> str:
    """Pattern for everything up to a blank before which a split is safe, and for blanks at the end of the text."""
    on = rf"(?:(?<=[{_ODD}])[{_BLANK}]++" + (rf"|(?<![A-Za-z0-9])[\r\n][{_BLANK}]*+" if line_ends else "") + ")"
    return rf"[{_BLANK}]*+[^{_BLANK}]++(?:{on}[^{_BLANK}]++)*+(?:{on})?|[{_BLANK}]++"


# GPT-2: runs of letters, digits and punctuation never share a token with the next run (except "'s").
GPT2 = re.compile(
    rf"[{_BLANK}]*+(?:(?:[A-Za-z]++|[0-9]++){_END}|[!-&(-/:-@\[-`{{-~]++(?=[A-Za-z0-9{_BLANK}]|\Z))|{_rest()}"
)
# Llama 3 and similar: punctuation joins the letters or line ends that follow it.
LLAMA3 = re.compile(rf"[{_BLANK}]*+(?:[{_PUNCTUATION}]*+[A-Za-z]++|[0-9]++){_END}|{_rest('line ends')}")
# SentencePiece, if no piece mixes letters, digits and punctuation: runs of each, with leading blanks.
RUNS = re.compile(rf"\n++|▁*+(?:[A-Za-z]++|[0-9]++|[{_PUNCTUATION}]++)(?=[!-~▁\n]|\Z)|▁*+[^▁\n]++|▁++")
MIXED = re.compile(
    rf"[A-Za-z][0-9{_PUNCTUATION}]|[0-9][A-Za-z{_PUNCTUATION}]|[{_PUNCTUATION}][A-Za-z0-9]|[^\n]\n|\n[^\n]|[^▁]▁"
)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_LETTERS + r"\p{N}{1,3}" + _REST, _LETTERS + r"\p{N}" + _REST}  # Llama 3; Qwen 2

NFC_TO_ASCII = "\u037e\u1fef\u212a"  # NFC maps these to ASCII, where they could become part of a special token

# A second ModelProto.normalizer_spec, which overrides the first when appended to a serialized model:
# no character map (2), no dummy prefix (3), blanks kept (4) and not escaped (5).
NOT_NORMALISED = b"\x1a\x08\x12\x00\x18\x00\x20\x00\x28\x00"

TRIALS = (
    "The quick brown fox, 12345 times;\n\n    jumps over\tthe  lazy dog's   back!\r\n\r\n(see 3.14)  \n",
    " a\n b\n\n\n  c \t\n d.\n\ne,\n f  \u00a0 g\u2003h \u3000 i\u0085j\x1ck  ",
    "d\u00e9j\u00e0 vu \u2014 \u201cquoted\u201d \u4f60\u597d \u4e16\u754c \U0001f600 \u0663 \u00bd",
    "it's WE'LL  x\u0301 \u0301y\n a\u0301b1\u0663 (\x1c \x1c) .\x85 \u3000 \x00\x01a .\n/x",
    "def f(x):\n\treturn [x**2 for _ in range(10)]  # squares\n\n\nclass A(B):\n    pass\n",
)


class Chunks(dict[str, bytes]):
    """A cache of chunk → ids (int32, as bytes); ``encode(text)`` uses it, ``whole`` encodes new chunks.

    A text that matches ``special`` (the name of a special token, which a split could divide) is encoded whole.
    """

    def __init__(
        self,
        whole: Callable[[str], Iterable[int]],
        pattern: re.Pattern[str],
        special: re.Pattern[str] | None = None,
    ):
        super().__init__()
        self._whole, self._findall = whole, pattern.findall
        self._special = special.search if special else None

    def __missing__(self, chunk: str) -> bytes:
        ids = array("i", self._whole(chunk)).tobytes()
        if len(self) < LIMIT and len(chunk) <= LONGEST:
            self[chunk] = ids
        return ids

    def encode(self, text: str) -> np.ndarray:
        if self._special is not None and self._special(text):
            return np.array(list(self._whole(text)), dtype=np.int32)
        return np.frombuffer(b"".join(map(self.__getitem__, self._findall(text))), dtype=np.int32)

    def agrees(self, trials: Iterable[str] = TRIALS) -> bool:
        """Whether chunks and whole texts give the same ids on difficult texts."""
        return all(self.encode(trial).tolist() == list(self._whole(trial)) for trial in trials)


def of_hugging_face(backend: Any) -> Chunks | None:
    """Chunks for a ``tokenizers.Tokenizer``, or None if splitting is not known to be safe."""
    rules = json.loads(backend.to_str())
    pattern = hugging_face_pattern(rules)
    if pattern is None:
        return None
    names = [re.escape(token["content"]) for token in rules.get("added_tokens") or []]
    special = re.compile("|".join([*names, f"[{NFC_TO_ASCII}]"]))
    chunks = Chunks(lambda text: backend.encode(text, add_special_tokens=False).ids, pattern, special)
    return chunks if chunks.agrees() else None


def hugging_face_pattern(rules: dict[str, Any]) -> re.Pattern[str] | None:
    """The chunk pattern for a ``tokenizer.json``, or None."""
    normalizer = (rules.get("normalizer") or {"type": None})["type"]
    if normalizer not in (None, "NFC") or rules["model"]["type"] != "BPE":
        return None
    if normalizer and not all(token["content"].isascii() for token in rules.get("added_tokens") or []):
        return None
    before = rules.get("pre_tokenizer") or {"type": None}
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if steps[-1].get("use_regex", True):
        local = all(step["type"] == "Digits" and step["individual_digits"] for step in steps[:-1])
        return GPT2 if local else None
    if len(steps) == 2 and steps[0]["type"] == "Split" and steps[0]["pattern"].get("Regex") in SPLITS:
        return LLAMA3 if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] else None
    return None


def of_tiktoken(whole: Callable[[str], Iterable[int]], special: re.Pattern[str]) -> Chunks | None:
    """Chunks for an encoder with one of Megatron's two tiktoken patterns."""
    chunks = Chunks(whole, LLAMA3, special)
    return chunks if chunks.agrees() else None


def of_sentencepiece(processor: Any) -> Chunks | None:
    """Chunks of *normalized* text (``processor.normalize``), or None if pieces can cross a split."""
    import sentencepiece

    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    known = [i for i in range(size) if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))]
    # BPE scores are ranks. Other models have log-probabilities, whose sums round differently per chunk.
    ranks = all(float(processor.get_score(i)).is_integer() for i in known)
    if not ranks or not any(map(processor.is_byte, range(size))):
        return None
    texts = [pieces[i] for i in known]
    if not any(map(MIXED.search, texts)):
        pattern = RUNS
    elif not any(re.search("[^▁]▁", piece) for piece in texts):
        pattern = re.compile("▁*[^▁]+|▁+")
    else:
        return None
    raw = sentencepiece.SentencePieceProcessor()
    try:
        raw.LoadFromSerializedProto(processor.serialized_model_proto() + NOT_NORMALISED)
    except (RuntimeError, OSError):
        return None
    chunks = Chunks(raw.encode, pattern)
    agrees = all(chunks.encode(processor.normalize(trial)).tolist() == processor.encode(trial) for trial in TRIALS)
    return chunks if agrees else None


# Sentence splitting with NLTK's Punkt, like Megatron's ``--split-sentences``. A document's sentences become its
# sequences in the ``.idx``, as BERT-like objectives need. Megatron's GPT datasets shuffle *sequences*, so a GPT sees
# such a corpus with its sentences out of order. Models are ``punkt_tab`` data, never pickles, which can run code.


# As in Megatron: Punkt gets slices of this many characters, and the end of a slice ends a sentence.
LONGEST_SLICE = 1_000_000


class SentenceSplitter:
    """``split(text)`` returns the sentences of a text in order.

    Whitespace between sentences is dropped. With ``keep_newlines`` it stays at the end of the preceding
    sentence, so that the joined sentences equal the text.
    """

    def __init__(self, punkt: Any, name: str, keep_newlines: bool = False):
        self.name, self.keep_newlines, self._punkt = name, keep_newlines, punkt

    def split(self, text: str) -> list[str]:
        found: list[str] = []
        for begin in range(0, len(text), LONGEST_SLICE):
            part = text[begin : begin + LONGEST_SLICE]
            if not self.keep_newlines:
                found += self._punkt.tokenize(part)
            elif starts := [start for start, _ in self._punkt.span_tokenize(part)]:
                ends = [*starts[1:], len(part)]
                starts[0] = 0
                found += [part[start:end] for start, end in zip(starts, ends, strict=True)]
            else:
                found.append(part)
        return found

    def digest(self) -> str:
        """Identity of the splitter's settings and model, 64 hex digits."""
        parameters = self._punkt._params
        return sha256_json(
            {
                "sentences": 1,
                "keep_newlines": self.keep_newlines,
                "abbreviations": sorted(parameters.abbrev_types),
                "collocations": sorted(map(list, parameters.collocations)),
                "starters": sorted(parameters.sent_starters),
                "orthography": sorted(parameters.ortho_context.items()),
            }
        )


def load_splitter(
    language: str = "english", nltk_data: str | Path | None = None, keep_newlines: bool = False
) -> SentenceSplitter:
    """The Punkt model of a language from ``nltk_data`` or NLTK's search path ($NLTK_DATA, ~/nltk_data, …).

    Raises UsageError (no such folder or language) and DataError, which says what to download.
    """
    import nltk.data
    from nltk.tokenize.punkt import PunktTokenizer

    if nltk_data is not None:
        folder = Path(nltk_data).absolute()
        if not folder.is_dir():
            raise UsageError("--nltk-data", got=nltk_data, expected="a directory that holds tokenizers/punkt_tab")
        if str(folder) not in nltk.data.path:
            nltk.data.path.insert(0, str(folder))
    try:
        punkt = PunktTokenizer(language)
    except (LookupError, OSError) as error:
        raise DataError(
            f"NLTK has no Punkt model for '{language}' (looked for tokenizers/punkt_tab/{language} in "
            f"{', '.join(map(str, nltk.data.path))}). On a machine with the network: "
            f"python -m nltk.downloader -d DIR punkt_tab; then give --nltk-data DIR or set NLTK_DATA=DIR"
        ) from error
    except ValueError as error:
        raise UsageError("--lang", got=language, expected="the name of a Punkt model, such as english") from error
    return SentenceSplitter(punkt, language, keep_newlines)
