"""Tokenized corpora on disk: open ``P.bin``/``P.idx``, describe them, and check that they fit a model.

A corpus is Megatron's ``IndexedDataset``: the concatenated tokens of all documents in ``P.bin``, their
lengths in ``P.idx``. ``preprocess`` also writes a sidecar ``P.json`` (tokenizer, documents, tokens, hash
of the ``.bin``). Corpora from other tools have no sidecar and work too.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prune.artifacts import read_json
from megatron_prune.errors import DataError

if TYPE_CHECKING:  # importing Megatron takes seconds, as long as tokenizing a small corpus
    from megatron.core.datasets.indexed_dataset import IndexedDataset


def open_indexed(prefix: str | Path, mmap_bin_files: bool = True) -> IndexedDataset:
    """Megatron's ``IndexedDataset`` at ``prefix``, its ``.bin`` memory-mapped or read through a file pointer.

    Raises DataError if a file is missing, is not an index, holds no tokens, or if the length of the
    ``.bin`` contradicts the ``.idx`` (truncated, or from another run).
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(prefix)
    paths = {suffix: Path(prefix + suffix) for suffix in (".bin", ".idx")}
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path} does not exist: a corpus is given by its prefix, without .bin and .idx")
        if not path.stat().st_size:
            raise DataError(f"{path} is empty: make the corpus again with megatron-prune preprocess")
    _check_index(paths[".idx"])
    corpus = IndexedDataset(prefix, mmap=mmap_bin_files)
    lengths, pointers = corpus.sequence_lengths, corpus.index.sequence_pointers
    expected = int(lengths.sum(dtype=np.int64)) * corpus.index.dtype_size
    if not expected:
        raise DataError(f"{prefix} holds no tokens")
    found = paths[".bin"].stat().st_size
    # Windows read the concatenated documents as one slice, so the documents must be contiguous.
    end = int(pointers[-1]) + int(lengths[-1]) * corpus.index.dtype_size  # int(): lengths are int32 and could overflow
    if found != expected or pointers[0] != 0 or end != expected:
        raise DataError(
            f"{paths['.bin']} has {found} bytes, but {paths['.idx']} describes {expected}: "
            "one of the two is truncated or comes from another run; make the corpus again"
        )
    return corpus


def _check_index(path: Path) -> None:
    """Raises DataError for an index on which Megatron's reader would fail later: foreign, truncated or empty."""
    from megatron.core.datasets.indexed_dataset import DType

    with open(path, "rb") as handle:
        header = handle.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path} is not a Megatron index")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in {kind.value for kind in DType}:
        raise DataError(f"{path} is a Megatron index of unknown kind (version {version}, token type {code})")
    expected = HEADER.size + sequences * (4 + 8) + documents * 8  # lengths, pointers; document ends
    found = path.stat().st_size
    if found < expected:
        raise DataError(f"{path} is a truncated Megatron index: it has {found} bytes, but its header says {expected}")
    if not sequences:
        raise DataError(f"{path} describes a corpus without documents")


def tokens(corpus: IndexedDataset) -> int:
    """Number of tokens of all documents."""
    return int(corpus.sequence_lengths.sum(dtype=np.int64))


def sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """The sidecar that ``preprocess`` wrote next to the corpus; None if another tool made the corpus."""
    path = Path(f"{prefix}.json")
    return read_json(path) if path.is_file() else None


def check_fits_model(prefix: str | Path, vocabulary: int) -> None:
    """Raises DataError for a corpus with token ids outside a model's ``vocabulary`` (size without padding).

    Checks the sidecar's vocabulary, if there is one, and the largest id in evenly spaced blocks.
    """
    described = sidecar(prefix)
    if described:
        size = int(described["tokenizer"]["vocab_size"])
        if size > vocabulary:
            raise DataError(
                f"{prefix} was tokenized with a vocabulary of {size}, but the model has one of {vocabulary}: "
                "tokenize the text with the model's own tokenizer"
            )
    corpus = open_indexed(prefix)
    ids = np.memmap(f"{prefix}.bin", dtype=corpus.index.dtype, mode="r")
    length = BLOCK_BYTES // ids.itemsize
    starts = {block * max(len(ids) - length, 0) // (BLOCKS - 1) for block in range(BLOCKS)}
    largest = max(int(ids[start : start + length].max()) for start in starts)
    if largest >= vocabulary:
        raise DataError(
            f"{prefix} holds token id {largest}, but the model's vocabulary ends at {vocabulary - 1}: "
            "tokenize the text with the model's own tokenizer"
        )


# Megatron's ``.idx`` files (``megatron.core.datasets.indexed_dataset``), read and written without a Python loop over
# sequences. The tests compare the bytes with Megatron's own builder.


MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, document ends
TOKEN_TYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def token_type(vocab_size: int | None) -> str:
    """Megatron's token type for a vocabulary: uint16 below 65500 ids, else int32."""
    return "uint16" if vocab_size is not None and vocab_size < 65500 else "int32"


def write_index(path: str | Path, sequences: Sequence[np.ndarray], documents: Sequence[np.ndarray], dtype: str) -> None:
    """Write an index. ``sequences``: lengths in tokens; ``documents``: sequences per document. Both are lists of
    arrays, which are concatenated."""
    lengths = np.concatenate([np.empty(0, np.int32), *sequences]).astype(np.int32)
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *documents]), dtype=np.int64)
    pointers = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    with open(path, "wb") as handle:
        handle.write(HEADER.pack(MAGIC, 1, TOKEN_TYPES[dtype], len(lengths), len(ends)))
        handle.write(lengths.tobytes())
        handle.write(np.concatenate([np.zeros(1, np.int64), pointers])[: len(lengths)].tobytes())
        handle.write(ends.tobytes())


def document_tokens(path: str | Path) -> np.ndarray:
    """Tokens per document of an index, int64 [documents]. Raises DataError if the file is not an index."""
    with open(path, "rb") as handle:
        content = handle.read()
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise DataError(f"{path} is not an index of a tokenized corpus")
    _, _, _, sequences, ends = HEADER.unpack_from(content)
    expected = HEADER.size + 12 * sequences + 8 * ends
    if len(content) < expected:
        raise DataError(f"{path} is truncated: it has {len(content)} of {expected} bytes")
    lengths = np.frombuffer(content, np.int32, sequences, HEADER.size).astype(np.int64)
    bounds = np.frombuffer(content, np.int64, ends, HEADER.size + 12 * sequences)
    return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[bounds])


# The identity of a corpus depends on its content, not on its path: it is the same on every machine, and changes if the
# corpus is made again from other text. A file of up to BLOCKS * BLOCK_BYTES is hashed whole, a larger one at evenly
# spaced blocks, because every rank computes the fingerprint of corpora that can have terabytes.
BLOCKS = 256
BLOCK_BYTES = 64 * 1024


def fingerprint(prefix: str | Path) -> str:
    """Identity of a corpus's content, 64 hex digits: sizes and evenly spaced blocks of both files.

    Reads at most 32 MB. Small corpora are hashed whole. In a large corpus, a change of a few tokens can
    go unnoticed; the sidecar's ``bin_sha256`` covers all of it.
    """
    digest = hashlib.sha256(b"megatron_prune corpus 1")
    for suffix in (".idx", ".bin"):
        path = Path(f"{prefix}{suffix}")
        size = path.stat().st_size
        digest.update(f"{suffix} {size}\n".encode())
        with open(path, "rb") as handle:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(handle.read())
                continue
            for block in range(BLOCKS):
                handle.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()
