"""A corpus by documents, as they are compared: each the union of its sequences, all of them one slice of ``P.bin``.

Bounds are read from the index a block of documents at a time, so that a corpus may have billions of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_prune.data import indexed

SHORTEST = 8  # tokens; shorter documents (a heading, "page not found") are equal by chance and give nothing away
# Odd, of 64 bits: tokens of a sketch or a shingle are digits of a number to this base.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 1 << 20  # documents whose bounds are in memory at a time


class Documents:
    """The documents of a corpus; ``ids`` are all its tokens."""

    def __init__(self, prefix: str | Path):
        self._corpus = indexed.open_indexed(prefix)  # held, since the index's arrays look into what it maps
        self._index = self._corpus.index
        self._tokens = indexed.tokens(self._corpus)
        self.ids = np.memmap(f"{prefix}.bin", dtype=self._index.dtype, mode="r")

    def __len__(self) -> int:
        return len(self._index.document_indices) - 1

    def bounds(self, first: int, last: int) -> np.ndarray:
        """Where documents ``first`` to ``last - 1`` begin, and where the last one ends: [last - first + 1] tokens."""
        pointers, sequences = self._index.sequence_pointers, self._index.document_indices[first : last + 1]
        found = pointers[np.minimum(sequences, len(pointers) - 1)] // self._index.dtype_size
        return np.where(sequences == len(pointers), self._tokens, found)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first document, ``bounds``) of up to BLOCK documents at a time; one block at least."""
        for first in range(0, max(len(self), 1), BLOCK):
            yield first, self.bounds(first, min(first + BLOCK, len(self)))

    def tokens(self, document: int) -> np.ndarray:
        start, end = self.bounds(document, document + 1)
        return self.ids[start:end]

    def counts(self) -> tuple[int, int]:
        """Documents with any token, and those of them that are too short to compare."""
        lengths = [np.diff(bounds) for _, bounds in self.blocks()]
        held = sum(int((found > 0).sum()) for found in lengths)
        return held, held - sum(int((found >= SHORTEST).sum()) for found in lengths)
