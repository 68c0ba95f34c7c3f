"""Fixed windows of a corpus, which ``evaluate`` scores and ``calibrate`` reads.

Window *k* is tokens k*S to (k+1)*S, inclusive, of the concatenated documents: S+1 tokens. A model reads
the first S and predicts the last S, so adjacent windows share one token and no prediction is repeated.
Nothing is shuffled: window *k* is always the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from megatron_prune.data import indexed
from megatron_prune.errors import DataError, UsageError


class Windows(Sequence[torch.Tensor]):
    """Windows ``numbers`` of a corpus, each an int64 CPU tensor [S+1]. See ``windows``."""

    def __init__(self, prefix: str | Path, seq_length: int, numbers: np.ndarray):
        self.prefix, self.seq_length, self.numbers = str(prefix), seq_length, numbers
        self._corpus = indexed.open_indexed(prefix)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, position: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, position: slice) -> Windows: ...
    def __getitem__(self, position: int | slice) -> torch.Tensor | Windows:
        if isinstance(position, slice):
            return Windows(self.prefix, self.seq_length, self.numbers[position])
        index = self._corpus.index
        start = int(self.numbers[position]) * self.seq_length
        found = self._corpus.bin_reader.read(index.dtype, self.seq_length + 1, start * index.dtype_size)
        return torch.from_numpy(found.astype(np.int64))

    @property
    def predictions(self) -> int:
        """Number of tokens that a model predicts in all windows."""
        return len(self) * self.seq_length


def windows(
    prefix: str | Path,
    seq_length: int,
    count: int | None = None,
    *,
    seed: int | None = None,
    flag: str = "--windows",
) -> Windows:
    """The first ``count`` windows of a corpus (default: all), or with ``seed`` a random sample.

    A random sample has ``count`` different windows in random order and depends only on the length of the
    corpus, S, count and seed. ``flag`` is the flag to name if the corpus has fewer windows than ``count``.

    Raises DataError (no such corpus, or shorter than one window) and UsageError.
    """
    if seq_length < 1:
        raise UsageError("--seq-length", got=seq_length, expected="a positive number of tokens")
    length = indexed.tokens(indexed.open_indexed(prefix))
    available = (length - 1) // seq_length
    if not available:
        raise DataError(
            f"{prefix}: expected at least the {seq_length + 1} tokens of one window, got {length}: "
            "give more text or a shorter --seq-length"
        )
    count = available if count is None else count
    if not 1 <= count <= available:
        raise UsageError(
            flag,
            got=count,
            expected=f"1 to {available}",
            why=f"{prefix} holds {length} tokens and a window has {seq_length}",
        )
    # RandomState, as in all of data/: NumPy guarantees that its numbers never change.
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(available)[:count].copy()
    return Windows(prefix, seq_length, order)
