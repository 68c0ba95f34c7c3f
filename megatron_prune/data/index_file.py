"""Megatron's ``.idx`` files, written and read without importing Megatron and without a Python loop over sequences.

The format is that of ``megatron.core.datasets.indexed_dataset``; the tests compare bytes with what its
own builder writes. Importing Megatron takes seconds, which is as long as tokenizing a small corpus.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_prune.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, document ends
TOKEN_TYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def token_type(vocab_size: int | None) -> str:
    """Megatron's choice of a token's type for a vocabulary: uint16 below 65500 ids, else int32."""
    return "uint16" if vocab_size is not None and vocab_size < 65500 else "int32"


def write_index(path: str | Path, sequences: Sequence[np.ndarray], documents: Sequence[np.ndarray], dtype: str) -> None:
    """Write an index.

    ``sequences``: lengths in tokens, in pieces; ``documents``: sequences in each document, in pieces.
    """
    lengths = np.concatenate([np.empty(0, np.int32), *sequences]).astype(np.int32)
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *documents]), dtype=np.int64)
    pointers = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    with open(path, "wb") as handle:
        handle.write(HEADER.pack(MAGIC, 1, TOKEN_TYPES[dtype], len(lengths), len(ends)))
        handle.write(lengths.tobytes())
        handle.write(np.concatenate([np.zeros(1, np.int64), pointers])[: len(lengths)].tobytes())
        handle.write(ends.tobytes())


def document_tokens(path: str | Path) -> np.ndarray:
    """Tokens of every document of an index, int64 [documents]. DataError when it is no index."""
    with open(path, "rb") as handle:
        content = handle.read()
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise DataError(f"{path} is not an index of a tokenized corpus")
    _, _, _, sequences, ends = HEADER.unpack_from(content)
    expected = HEADER.size + 12 * sequences + 8 * ends
    if len(content) < expected:
        raise DataError(f"{path} is cut short: it has {len(content)} of {expected} bytes")
    lengths = np.frombuffer(content, np.int32, sequences, HEADER.size).astype(np.int64)
    bounds = np.frombuffer(content, np.int64, ends, HEADER.size + 12 * sequences)
    return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[bounds])
