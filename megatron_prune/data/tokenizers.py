"""Tokenizers by Megatron's names, and checks that a tokenizer fits a model.

The interface covers ids, vocabulary size, the ids that begin and end a document, and an identity. Only
``encode_whole`` adds special tokens to a text.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_prune.artifacts import sha256_file, sha256_json
from megatron_prune.data import chunks
from megatron_prune.errors import DataError, UsageError
from megatron_prune.untrusted import explain_machine, read_json, refuse_irregular

if TYPE_CHECKING:
    from megatron_prune.checkpoint.reader import Checkpoint


class Tokenizer(Protocol):
    """The interface of a tokenizer. ``vocab_size`` includes added tokens; ``bos`` and ``eod`` are None if undefined."""

    type: str
    model: str
    vocab_size: int
    bos: int | None
    eod: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_whole(self, text: str) -> list[int]:
        """Encode with the special tokens that the tokenizer adds (such as BOS), unless the text begins with them."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Encode many texts, faster than ``encode``, as int32 arrays."""
        ...

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``; special tokens are shown by name, or else left out."""
        ...

    def fingerprint(self) -> str:
        """Identity of the vocabulary (the meaning of each id), 64 hex digits."""
        ...

    def digest(self) -> str:
        """Identity of everything that affects the ids of a text (also merges, normalization), 64 hex digits."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file; the end of a document is its ``</s>``."""

    type = "SentencePieceTokenizer"

    def __init__(self, model: str | Path):
        import sentencepiece

        path = Path(model)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise DataError(
                f"--tokenizer-model: expected a SentencePiece .model file, got {path}, which does not exist"
            )
        self.model = str(path)
        refuse_irregular(path, _MOST_BYTES)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=self.model)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{path}: expected a SentencePiece model, got something else: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        self._chunks = chunks.of_sentencepiece(self._processor)
        self.eod = self._processor.eos_id() if self._processor.eos_id() >= 0 else None
        self.bos: int | None = None  # a .model file can define BOS, but does not say that texts begin with it

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    encode_whole = encode

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._chunks is None:
            return [np.array(ids, dtype=np.int32) for ids in self._processor.encode(texts, num_threads=1)]
        return [self._chunks.encode(text) for text in self._processor.normalize(texts)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        parts = []
        for control, run in itertools.groupby(ids, self._processor.is_control):
            if not control:
                parts.append(self._processor.decode(list(run)))
            elif special:
                parts += [self._processor.id_to_piece(i) for i in run]
        return "".join(parts)

    def fingerprint(self) -> str:
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        return _identity({piece: i for i, piece in enumerate(pieces)}, self.eod)

    def digest(self) -> str:
        return hashlib.sha256(self._processor.serialized_model_proto()).hexdigest()


_MOST_BYTES = 256 << 20  # of a file of a tokenizer
_MOST_PARTS = 3_000_000  # a vocabulary of 262,144 tokens has 600,000
HUB_SECONDS = 10.0  # timeout for asking the Hub whether it has a model
_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


def refuse_absent(model: str) -> bool:
    """Whether the Hugging Face tokenizer ``model`` is local: a directory, or a name in the Hub's cache.

    False if only the Hub has it; the Hub is asked once, for at most ``HUB_SECONDS``. Raises UsageError if it is not
    found: transformers would request every file several times, which takes a minute without a network.
    """
    import huggingface_hub
    from huggingface_hub.utils._validators import validate_repo_id

    if Path(model).exists():
        return True
    looked = [f"no directory {model}"]
    try:
        validate_repo_id(model)
    except ValueError:
        pass  # not a valid name: no need to ask the Hub
    else:
        constants = huggingface_hub.constants
        if any(isinstance(huggingface_hub.try_to_load_from_cache(model, name), str) for name in _OF_A_TOKENIZER):
            return True
        looked.append(f"nothing in the Hub's cache {constants.HF_HUB_CACHE}")
        if constants.HF_HUB_OFFLINE:
            looked.append("HF_HUB_OFFLINE is set")
        else:
            try:
                huggingface_hub.HfApi().model_info(model, timeout=HUB_SECONDS)
                return False
            except Exception as error:  # depends on huggingface_hub's HTTP library
                looked.append(f"no answer of the Hub: {' '.join(str(error).split())[:200]}")
    raise UsageError(
        "--tokenizer-model", expected="a directory with a tokenizer, or the name of a model on the Hugging Face Hub",
        got=model, why=", ".join(looked),
    )  # fmt: skip


def _refuse_many_values(file: Path) -> None:
    """Raise DataError for a JSON file of more lists and objects than merges and tokens: the libraries read it whole."""
    if file.suffix != ".json" or not file.is_file() or file.stat().st_size < _MOST_PARTS:
        return
    with open(file, "rb") as handle:
        parts = sum(block.count(b"[") + block.count(b"{") for block in iter(lambda: handle.read(1 << 20), b""))
    if parts > _MOST_PARTS:
        raise DataError(f"{file}: expected at most {_MOST_PARTS:,} lists and objects, got {parts:,}")


class HuggingFaceTokenizer:
    """The fast tokenizer of a Hugging Face directory (or Hub name), loaded without running its code."""

    type = "HuggingFaceTokenizer"

    def __init__(self, model: str | Path):
        # One thread per process: preprocess runs its own worker processes.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from transformers import AutoTokenizer

        self.model = str(model)
        here = refuse_absent(self.model)
        if Path(self.model).is_dir():
            for file in Path(self.model).iterdir():
                if file.suffix in (".json", ".model", ".txt", ".jinja"):
                    refuse_irregular(file, _MOST_BYTES)
                    _refuse_many_values(file)
        try:
            loaded = AutoTokenizer.from_pretrained(
                self.model, use_fast=True, trust_remote_code=False, local_files_only=here
            )
        except BaseException as error:  # the libraries raise anything for a damaged file, Rust's panics too
            if isinstance(error, KeyboardInterrupt | SystemExit) or explain_machine(error) is not None:
                raise
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"cannot load a Hugging Face tokenizer from {self.model}: {why}") from error
        if not loaded.is_fast:
            raise DataError(f"{self.model}: expected a fast tokenizer, got none: save it with a tokenizer.json first")
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._chunks = chunks.of_hugging_face(self._backend)
        # The largest id, not the number of entries: a vocabulary can have gaps.
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=0) + 1
        self.bos, self.eod = loaded.bos_token_id, loaded.eos_token_id
        self._start = loaded.bos_token or loaded.eos_token
        self._decode = loaded.decode

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_whole(self, text: str) -> list[int]:
        begun = self._start is not None and text.startswith(self._start)
        ids: list[int] = self._backend.encode(text, add_special_tokens=not begun).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._chunks is not None:
            return [self._chunks.encode(text) for text in texts]
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in found]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        text: str = self._decode(list(ids), skip_special_tokens=not special)
        return text

    def fingerprint(self) -> str:
        return _identity(self._backend.get_vocab(with_added_tokens=True), self.eod)

    def digest(self) -> str:
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()


class TikTokenizer:
    """Megatron's own tiktoken tokenizer: a ``.json`` list of ``{"rank", "token_bytes", "token_str"}``.

    The first ``num_special_tokens`` ids are special, followed by the file's tokens up to ``vocab_size`` ids.
    The end of a document is ``</s>``. The settings are Megatron's flags, which a training run needs too. As
    in Megatron, a special token's name in a text becomes its id.
    """

    type = "TikTokenizer"

    def __init__(
        self,
        model: str | Path,
        *,
        vocab_size: int | None = None,
        pattern: str | None = None,
        num_special_tokens: int = 1000,
        special_tokens: Sequence[str] | None = None,
    ):
        self.model = str(model)
        ranks = _tiktoken_ranks(Path(model))
        from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as megatron

        self.vocab_size = megatron.DEFAULT_TIKTOKEN_MAX_VOCAB if vocab_size is None else vocab_size
        if ranks + num_special_tokens < self.vocab_size:
            raise UsageError(
                "--vocab-size",
                got=f"{self.vocab_size}{' (the default)' if vocab_size is None else ''}",
                expected=f"at most {ranks + num_special_tokens}",
                why=f"{model} holds {ranks} tokens, --tiktoken-num-special-tokens is {num_special_tokens}",
            )
        chosen = list(special_tokens) if special_tokens else None
        try:
            self._tokenizer = megatron.TikTokenTokenizer(
                self.model, chosen, num_special_tokens, pattern=pattern or "v2", vocab_size=self.vocab_size
            )
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"cannot make a tiktoken tokenizer of {model} with {num_special_tokens} special tokens "
                f"and pattern {pattern or 'v2'}: {error or 'its entries or the special tokens do not fit'}"
            ) from error
        self.bos: int | None = None
        self.eod = self._tokenizer.eod
        self._encoding = self._tokenizer.tokenizer
        self._any_special = re.compile("|".join(map(re.escape, self._tokenizer.special_tokens)))
        self._chunks = chunks.of_tiktoken(self.encode, self._any_special)
        self._settings = [self.vocab_size, pattern or "v2", num_special_tokens, self._tokenizer.special_tokens]

    def encode(self, text: str) -> list[int]:
        # Most texts have no special token, and tiktoken is slow at searching for a thousand of them.
        ids: list[int]
        if self._any_special.search(text):
            ids = self._encoding.encode(text, allowed_special="all")
        else:
            ids = self._encoding.encode_ordinary(text)
        return ids

    encode_whole = encode

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._chunks is not None:
            return [self._chunks.encode(text) for text in texts]
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self._tokenizer.ids_to_text(list(ids), remove_special_tokens=not special) or "")

    def fingerprint(self) -> str:
        vocabulary = self._tokenizer.vocab
        return _identity({t if isinstance(t, str) else t.hex(): i for t, i in vocabulary.items()}, self.eod)

    def digest(self) -> str:
        return sha256_json({"file": sha256_file(self.model), "settings": self._settings})


def _tiktoken_ranks(path: Path) -> int:
    """Number of tokens in a file of Megatron's tiktoken format. Raises DataError for any other file."""
    if not path.is_file():
        raise DataError(
            f"--tokenizer-model: expected a tiktoken vocabulary, a .json file, got {path}, which does not exist"
        )
    entries = read_json(path)
    wanted = {"rank", "token_bytes", "token_str"}
    if (
        path.suffix != ".json"
        or not isinstance(entries, list)
        or any(not isinstance(entry, dict) or set(entry) != wanted for entry in entries)
        or any(entry["rank"] != rank or not isinstance(entry["token_bytes"], str) for rank, entry in enumerate(entries))
    ):
        raise DataError(
            f"{path} is not a tiktoken vocabulary as Megatron reads it: a .json file with a list of "
            '{"rank", "token_bytes" (base64), "token_str"} in the order of the ranks'
        )
    return len(entries)


def _identity(vocabulary: dict[str, int], eod: int | None) -> str:
    digest = hashlib.sha256()
    for token in sorted(vocabulary):
        digest.update(f"{vocabulary[token]}\t{token}\n".encode(errors="surrogatepass"))
    return sha256_json({"vocabulary": digest.hexdigest(), "eod": eod})


TYPES: tuple[str, ...] = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer")


def load_tokenizer(type: str, model: str | Path, **settings: Any) -> Tokenizer:
    """Load a tokenizer by Megatron's ``--tokenizer-type`` and ``--tokenizer-model``.

    ``settings`` are for TikTokenizer only. Raises UsageError and DataError.
    """
    if type not in TYPES:
        raise UsageError("--tokenizer-type", got=type, expected="one of " + ", ".join(TYPES))
    if type == "TikTokenizer":
        return TikTokenizer(model, **settings)
    if settings:
        names = ", ".join("--" + name.replace("_", "-") for name in settings)
        raise UsageError(names, got=type, expected="--tokenizer-type TikTokenizer with them")
    return SentencePieceTokenizer(model) if type == "SentencePieceTokenizer" else HuggingFaceTokenizer(model)


def check_fits(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Raise DataError if a tokenizer has ids outside a model's ``vocabulary`` (size without padding)."""
    if tokenizer.vocab_size > vocabulary:
        raise DataError(
            f"{tokenizer.model}: expected the checkpoint's vocabulary of {vocabulary}, got {tokenizer.vocab_size}: use "
            "the tokenizer that the checkpoint was trained with"
        )


def check_fits_checkpoint(tokenizer: Tokenizer, checkpoint: Checkpoint, vocabulary: int) -> None:
    """Raise DataError unless a tokenizer's ids are in the checkpoint's ``vocabulary`` and have the same meaning.

    The meaning is checked only if the checkpoint has its Hugging Face tokenizer files (after an import).
    """
    check_fits(tokenizer, vocabulary)
    folder = checkpoint.huggingface
    if folder is None or not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    own = HuggingFaceTokenizer(folder)
    if own.fingerprint() != tokenizer.fingerprint():
        raise DataError(
            f"{tokenizer.model} (vocabulary of {tokenizer.vocab_size}, end of document {tokenizer.eod}) is "
            f"not the tokenizer of checkpoint {checkpoint.root} ({own.vocab_size}, {own.eod}): the same ids "
            f"mean other text; use --tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"
        )
