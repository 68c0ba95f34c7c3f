"""Documents that are nearly the same in two corpora: MinHash proposes pairs, exact similarity judges them.

The similarity of two documents is the Jaccard index of their sets of ``SHINGLE`` consecutive tokens. The
held-out corpus goes into a MinHash LSH index (``datasketch``). A training document is looked up there
only if enough of its shingles occur in the held-out corpus at all, which nearly none passes; every pair
that the index proposes is then compared in full, so no pair below the threshold is ever reported. A pair
above it can be missed by chance (measured in the tests: below 1% at the threshold itself).

A short document quoted inside a long one is not near it in this measure; documents below
``documents.SHORTEST`` tokens are not compared.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prune.data import indexed
from megatron_prune.data.documents import MULTIPLIER, SHORTEST, Documents
from megatron_prune.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 5  # tokens
PERMUTATIONS = 256


@dataclass(frozen=True)
class Pair:
    """A held-out document and the training document that is most like it."""

    training: int
    held_out: int
    similarity: float


def shingles_of(tokens: np.ndarray) -> np.ndarray:
    """Sorted different shingles of a document as uint64 hashes; none where it is shorter than SHORTEST."""
    tokens = tokens.astype(np.uint64)
    count = len(tokens) - SHINGLE + 1 if len(tokens) >= SHORTEST else 0
    hashes = np.zeros(count, dtype=np.uint64)
    for position in range(SHINGLE if count else 0):
        hashes = hashes * MULTIPLIER + tokens[position : position + count] + np.uint64(1)
    hashes ^= hashes >> np.uint64(32)  # spread the high bits, since MinHash takes the low ones
    hashes *= MULTIPLIER
    return np.unique(hashes ^ (hashes >> np.uint64(29)))


def near_duplicates(training: str | Path, held_out: str | Path, similarity: float = 0.8) -> list[Pair]:
    """Held-out documents with a near (or exact) duplicate in the training corpus, each with the nearest.

    The held-out corpus is to be the small one: about 16 bytes of memory a token of it. A training token
    takes about 0.1 µs. Raises UsageError and DataError (two tokenizers).
    """
    if not 0.1 <= similarity <= 1:
        raise UsageError("--similarity", given=similarity, allowed="0.1 to 1")
    _refuse_two_tokenizers(training, held_out)
    from datasketch import MinHashLSH

    held, train = Documents(held_out), Documents(training)
    # Recall is worth more than precision here, since every proposal is checked.
    lsh = MinHashLSH(threshold=max(0.05, similarity - 0.1), num_perm=PERMUTATIONS, weights=(0.05, 0.95))
    everything = []
    for number in range(len(held)):
        shingles = shingles_of(held.tokens(number))
        if len(shingles):
            everything.append(shingles)
            lsh.insert(number, _signature(shingles), check_duplication=False)
    if not everything:
        return []
    known = np.unique(np.concatenate(everything))
    nearest: dict[int, Pair] = {}
    for first, bounds in train.blocks():
        for number, (start, end) in enumerate(itertools.pairwise(bounds.tolist()), start=first):
            shingles = shingles_of(train.ids[start:end])
            # |A ∩ B| ≥ s·|A ∪ B| ≥ s·|A|: fewer known shingles than that, and no document B is near.
            if not len(shingles) or _members(shingles, known) < similarity * len(shingles):
                continue
            for twin in lsh.query(_signature(shingles)):
                found = jaccard(shingles, shingles_of(held.tokens(twin)))
                if found >= similarity and (twin not in nearest or found > nearest[twin].similarity):
                    nearest[twin] = Pair(number, twin, found)
    return [nearest[twin] for twin in sorted(nearest)]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two sorted sets."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def _members(shingles: np.ndarray, known: np.ndarray) -> int:
    places = np.minimum(np.searchsorted(known, shingles), len(known) - 1)
    return int((known[places] == shingles).sum())


def _signature(shingles: np.ndarray) -> MinHash:
    from datasketch import MinHash

    signature = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    signature.update_batch((shingles & np.uint64(0xFFFFFFFF)).tolist())
    return signature


def _refuse_two_tokenizers(training: str | Path, held_out: str | Path) -> None:
    described = indexed.sidecar(training), indexed.sidecar(held_out)
    prints = {found["tokenizer"]["fingerprint"] for found in described if found}
    if len(prints) > 1:
        raise DataError(
            f"{training} and {held_out} were tokenized with different tokenizers: the same text has other tokens "
            "there, so their documents cannot be compared; tokenize both with one"
        )
