"""Tokenizers by Megatron's names for them, and whether one fits a model.

Only what preparing text needs: ids of many texts at once, the size of the vocabulary, the
end-of-document id, and an identity. No special token is ever added to a text.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_prune.artifacts import sha256_json
from megatron_prune.errors import DataError, UsageError

if TYPE_CHECKING:
    from megatron_prune.checkpoint.reader import Checkpoint


class Tokenizer(Protocol):
    """What ``load_tokenizer`` returns. ``vocab_size`` counts added tokens; ``eod`` is None without one."""

    type: str
    model: str
    vocab_size: int
    eod: int | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def fingerprint(self) -> str:
        """Identity of the vocabulary, 64 hex digits: which id means what."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file; the end of a document is its ``</s>``."""

    type = "SentencePieceTokenizer"

    def __init__(self, model: str | Path):
        import sentencepiece

        path = Path(model)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"{path} does not exist: --tokenizer-model takes a SentencePiece .model file")
        self.model = str(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=self.model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id() if self._processor.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def fingerprint(self) -> str:
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        return _identity({piece: i for i, piece in enumerate(pieces)}, self.eod)


class HuggingFaceTokenizer:
    """The fast tokenizer of a Hugging Face directory (or hub name), loaded without running its code."""

    type = "HuggingFaceTokenizer"

    def __init__(self, model: str | Path):
        # One process has one thread here: parallelism is the business of the worker processes.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from transformers import AutoTokenizer

        self.model = str(model)
        try:
            loaded = AutoTokenizer.from_pretrained(self.model, use_fast=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot load a Hugging Face tokenizer from {self.model}: {error}") from error
        if not loaded.is_fast:
            raise DataError(f"{self.model} has no fast tokenizer: save it with a tokenizer.json first")
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # The largest id counts, not the number of entries: a vocabulary may have holes.
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = loaded.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def fingerprint(self) -> str:
        return _identity(self._backend.get_vocab(with_added_tokens=True), self.eod)


def _identity(vocabulary: dict[str, int], eod: int | None) -> str:
    digest = hashlib.sha256()
    for token in sorted(vocabulary):
        digest.update(f"{vocabulary[token]}\t{token}\n".encode(errors="surrogatepass"))
    return sha256_json({"vocabulary": digest.hexdigest(), "eod": eod})


TYPES = {kind.type: kind for kind in (SentencePieceTokenizer, HuggingFaceTokenizer)}


def load_tokenizer(type: str, model: str | Path) -> Tokenizer:
    """A tokenizer by Megatron's ``--tokenizer-type`` and ``--tokenizer-model``; UsageError or DataError."""
    if type not in TYPES:
        raise UsageError("--tokenizer-type", given=type, allowed=" or ".join(TYPES))
    return TYPES[type](model)


def check_fits(tokenizer: Tokenizer, padded_vocab_size: int) -> None:
    """Refuse a tokenizer that gives ids for which a model of this padded vocabulary has no embedding."""
    if tokenizer.vocab_size > padded_vocab_size:
        raise DataError(
            f"{tokenizer.model} has a vocabulary of {tokenizer.vocab_size}, the checkpoint's (padded) has "
            f"{padded_vocab_size}: use the tokenizer that the checkpoint was trained with"
        )


def check_fits_checkpoint(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer that is not the checkpoint's own: its ids must exist there and mean the same.

    The meaning can be checked where the checkpoint carries its Hugging Face tokenizer files (it was
    imported); elsewhere only the size can.
    """
    check_fits(tokenizer, checkpoint.shape.padded_vocab_size)
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
