"""Held-out text is held out: no document of an evaluation or calibration corpus is in a training corpus.

Corpora of different names can still share documents (a test set that came out of the training set, a
crawl that holds the book). Documents are compared as token sequences, so both corpora must come from
one tokenizer; only whole, equal documents are found, not quotations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron_prune.data import indexed
from megatron_prune.errors import DataError

SHORTEST = 32  # tokens; shorter documents may well be equal by chance
HEAD = 16  # tokens by which a training document is judged before it is read whole
BLOCK = 1 << 20  # training documents that are judged at a time


def shared_documents(training: str | Path, held_out: str | Path) -> list[tuple[int, int]]:
    """Pairs (document of ``training``, document of ``held_out``) with the same tokens; each held-out one once.

    Reads the held-out corpus and of the training corpus its lengths and the heads of documents of
    fitting length, so the held-out one is to be the small one.
    """
    train, held = indexed.open_indexed(training), indexed.open_indexed(held_out)
    by_tokens = {
        held[i].astype(np.int32).tobytes(): i for i in np.flatnonzero(held.sequence_lengths >= SHORTEST)[::-1].tolist()
    }
    if not by_tokens:
        return []
    heads = np.array([np.frombuffer(key, np.int32, HEAD) for key in by_tokens])
    wanted = np.unique(_as_one(heads))
    lengths = np.unique([len(key) // 4 for key in by_tokens])
    ids = np.memmap(f"{training}.bin", dtype=train.index.dtype, mode="r")
    found: dict[int, int] = {}
    for block in range(0, len(train), BLOCK):
        rows = block + np.flatnonzero(np.isin(train.sequence_lengths[block : block + BLOCK], lengths))
        starts = train.index.sequence_pointers[rows] // train.index.dtype_size
        begun = ids[starts[:, None] + np.arange(HEAD)].astype(np.int32)
        for row in rows[np.isin(_as_one(begun), wanted)].tolist():
            twin = by_tokens.get(train[row].astype(np.int32).tobytes())
            if twin is not None:
                found.setdefault(twin, row)
    return sorted((row, twin) for twin, row in found.items())


def _as_one(heads: np.ndarray) -> np.ndarray:
    """[documents, HEAD] int32 → [documents], each head as one comparable value."""
    return np.ascontiguousarray(heads).view(f"S{4 * HEAD}").reshape(-1)


def refuse_shared_documents(training: Iterable[str], held_out: Sequence[str]) -> None:
    """DataError when a held-out corpus shares a document with a training corpus; says which and how many."""
    for prefix in training:
        for held in held_out:
            if shared := shared_documents(prefix, held):
                row, twin = shared[0]
                raise DataError(
                    f"{len(shared)} document(s) of {held} are in {prefix} too (document {twin} is its document {row}): "
                    "take them out of one of the two, so that no stage uses what another is judged by"
                )
