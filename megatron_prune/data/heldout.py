"""Held-out text is held out: no document of an evaluation or calibration corpus is in a training corpus.

Corpora of different names can still share documents (a test set that came out of the training set, a
crawl that holds the book). Documents are compared as token sequences, so both corpora must come from
one tokenizer; only whole, equal documents of ``documents.SHORTEST`` tokens and more are found, not
quotations and not sentences that two documents share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron_prune.data.documents import MULTIPLIER, SHORTEST, Documents
from megatron_prune.errors import DataError

HEAD = 16  # tokens by which, and by its length, a document is judged before it is read whole


def shared_documents(training: str | Path, held_out: str | Path) -> list[tuple[int, int]]:
    """Pairs (document of ``training``, document of ``held_out``) with the same tokens; each held-out one once.

    Reads of both corpora the lengths and the heads of documents of fitting length, and whole only those whose
    heads fit; the held-out one is to be the small one.
    """
    train, held = Documents(training), Documents(held_out)
    numbers, lengths, sketches = _all_sketches(held)
    lengths, wanted = np.unique(lengths), np.unique(sketches)
    begun_alike, alike = [], []
    for first, bounds in train.blocks():
        rows = np.flatnonzero(np.isin(np.diff(bounds), lengths))
        found = _sketches(train.ids, bounds[rows], np.diff(bounds)[rows])
        fits = np.isin(found, wanted)
        begun_alike.append(first + rows[fits])
        alike.append(np.unique(found[fits]))
    candidates = numbers[np.isin(sketches, np.concatenate(alike))]
    by_tokens: dict[bytes, list[int]] = {}
    for number in candidates.tolist():
        by_tokens.setdefault(_digest(held.tokens(number)), []).append(number)
    pairs: list[tuple[int, int]] = []
    for row in np.concatenate(begun_alike).tolist():
        if not by_tokens:
            break
        pairs += [(row, twin) for twin in by_tokens.pop(_digest(train.tokens(row)), [])]
    return sorted(pairs)


def _all_sketches(corpus: Documents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers, lengths and sketches of the documents that are long enough to compare."""
    found = []
    for first, bounds in corpus.blocks():
        rows = np.flatnonzero(np.diff(bounds) >= SHORTEST)
        lengths = np.diff(bounds)[rows]
        found.append((first + rows, lengths, _sketches(corpus.ids, bounds[rows], lengths)))
    numbers, lengths, sketches = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return numbers, lengths, sketches


def _sketches(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[documents] uint64 of each document's length and first HEAD tokens: equal for equal documents."""
    sketches = lengths.astype(np.uint64)
    for position in range(HEAD):  # a shorter document's last token stands for those that it lacks
        token = ids[starts + np.minimum(position, lengths - 1)].astype(np.uint64)
        sketches = sketches * MULTIPLIER + token
    return sketches


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.astype(np.int32).tobytes(), digest_size=16).digest()


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
