"""Contamination: documents of an evaluation or calibration corpus that are also in a training corpus.

``shared_documents`` finds exact duplicates, ``near_duplicates`` similar documents, and ``compare_stages``
reports on all corpora of a study. Documents are compared as token sequences, so the corpora must share a
tokenizer. Documents shorter than ``SHORTEST`` tokens, and quotations in longer documents, are not found.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prune import screen
from megatron_prune.data import indexed
from megatron_prune.errors import DataError, UsageError

HEAD = 16  # first tokens that, with the length, decide whether a document is read whole


def shared_documents(training: str | Path, held_out: str | Path) -> list[tuple[int, int]]:
    """Pairs (document of ``training``, document of ``held_out``) with equal tokens; each held-out document once.

    Reads the lengths of all documents, the first tokens of those with a matching length, and all tokens only of
    those whose first tokens match. ``held_out`` should be the smaller corpus.
    """
    train, held = Documents(training), Documents(held_out)
    numbers, lengths, sketches = _all_sketches(held)
    lengths, wanted = np.unique(lengths), np.unique(sketches)
    begun_alike, alike = [], []
    for first, bounds in train.blocks("looking for equal documents"):
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
    """Numbers, lengths and sketches of the documents with at least SHORTEST tokens."""
    found = []
    for first, bounds in corpus.blocks():
        rows = np.flatnonzero(np.diff(bounds) >= SHORTEST)
        lengths = np.diff(bounds)[rows]
        found.append((first + rows, lengths, _sketches(corpus.ids, bounds[rows], lengths)))
    numbers, lengths, sketches = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return numbers, lengths, sketches


def _sketches(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hashes of each document's length and first HEAD tokens, uint64 [documents]: equal for equal documents."""
    sketches = lengths.astype(np.uint64)
    for position in range(HEAD):  # shorter documents repeat their last token
        token = ids[starts + np.minimum(position, lengths - 1)].astype(np.uint64)
        sketches = sketches * MULTIPLIER + token
    return sketches


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.astype(np.int32).tobytes(), digest_size=16).digest()


def refuse_shared_documents(training: Iterable[str], held_out: Sequence[str]) -> None:
    """Raises DataError, with number and example, if a held-out corpus shares a document with a training corpus."""
    for prefix in training:
        for held in held_out:
            if shared := shared_documents(prefix, held):
                row, twin = shared[0]
                raise DataError(
                    f"{len(shared)} document(s) of {held} are in {prefix} too (document {twin} is its document {row}): "
                    "remove them from one of the two, so that no stage trains on what another is evaluated on"
                )


# Access to a corpus by document. A document is the union of its sequences. Bounds are read from the index block by
# block, so a corpus can have billions of documents.


SHORTEST = 8  # tokens; shorter documents (a heading, "page not found") are equal by chance and leak nothing
# Odd 64-bit base of the polynomial hashes of sketches and shingles.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 1 << 20  # documents whose bounds are in memory at a time


class Documents:
    """The documents of a corpus; ``ids`` are all its tokens."""

    def __init__(self, prefix: str | Path):
        self._corpus = indexed.open_indexed(prefix)  # keeps the memory map of the index's arrays alive
        self._index = self._corpus.index
        self._tokens = indexed.tokens(self._corpus)
        self.ids = np.memmap(f"{prefix}.bin", dtype=self._index.dtype, mode="r")

    def __len__(self) -> int:
        return len(self._index.document_indices) - 1

    def bounds(self, first: int, last: int) -> np.ndarray:
        """Starts of documents ``first`` to ``last - 1`` and the end of the last one, in tokens: [last - first + 1]."""
        pointers, sequences = self._index.sequence_pointers, self._index.document_indices[first : last + 1]
        found = pointers[np.minimum(sequences, len(pointers) - 1)] // self._index.dtype_size
        return np.where(sequences == len(pointers), self._tokens, found)

    def blocks(self, what: str | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first document, ``bounds``) for up to BLOCK documents at a time; at least one block.

        Shows a progress bar labelled ``what``, if given.
        """
        with screen.Bar(len(self), what or "", "document", shown=what is not None and screen.rank() == 0) as bar:
            for first in range(0, max(len(self), 1), BLOCK):
                last = min(first + BLOCK, len(self))
                yield first, self.bounds(first, last)
                bar.reach(last)

    def tokens(self, document: int) -> np.ndarray:
        start, end = self.bounds(document, document + 1)
        return self.ids[start:end]

    def counts(self) -> tuple[int, int]:
        """Number of non-empty documents, and how many of them are too short to compare."""
        lengths = [np.diff(bounds) for _, bounds in self.blocks()]
        held = sum(int((found > 0).sum()) for found in lengths)
        return held, held - sum(int((found >= SHORTEST).sum()) for found in lengths)


# Near duplicates. The similarity of two documents is the Jaccard index of their sets of ``SHINGLE`` consecutive
# tokens. The held-out corpus is put into a MinHash LSH index (``datasketch``). A training document is looked up there
# only if enough of its shingles occur in the held-out corpus, which is rare. Every candidate pair is then compared
# exactly, so no pair below the threshold is reported. A pair above it can be missed by chance (in the tests, less than
# 1% at the threshold). A short document quoted in a long one is not similar to it by this measure.


if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 5  # tokens
PERMUTATIONS = 256


@dataclass(frozen=True)
class Pair:
    """A held-out document and the training document most similar to it."""

    training: int
    held_out: int
    similarity: float


def shingles_of(tokens: np.ndarray) -> np.ndarray:
    """Sorted unique shingles of a document as uint64 hashes; none if it has fewer than SHORTEST tokens."""
    tokens = tokens.astype(np.uint64)
    count = len(tokens) - SHINGLE + 1 if len(tokens) >= SHORTEST else 0
    hashes = np.zeros(count, dtype=np.uint64)
    for position in range(SHINGLE if count else 0):
        hashes = hashes * MULTIPLIER + tokens[position : position + count] + np.uint64(1)
    hashes ^= hashes >> np.uint64(32)  # mix in the high bits, because MinHash takes the low ones
    hashes *= MULTIPLIER
    return np.unique(hashes ^ (hashes >> np.uint64(29)))


def near_duplicates(training: str | Path, held_out: str | Path, similarity: float = 0.8) -> list[Pair]:
    """Held-out documents with a near (or exact) duplicate in the training corpus, each with the most similar one.

    ``held_out`` should be the smaller corpus: it takes about 16 bytes of memory per token. A training token
    takes about 0.1 µs. Raises UsageError, and DataError for corpora of different tokenizers.
    """
    if not 0.1 <= similarity <= 1:
        raise UsageError("--similarity", got=similarity, expected="a number from 0.1 to 1")
    _refuse_two_tokenizers(training, held_out)
    from datasketch import MinHashLSH

    held, train = Documents(held_out), Documents(training)
    # Recall matters more than precision, because every candidate is checked.
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
    bounds = itertools.chain.from_iterable(itertools.pairwise(bounds.tolist()) for _, bounds in train.blocks())
    shown = screen.progress(bounds, len(train), "looking for near duplicates", "document")
    for number, (start, end) in enumerate(shown):
        shingles = shingles_of(train.ids[start:end])
        # |A ∩ B| ≥ s·|A ∪ B| ≥ s·|A|: with fewer known shingles, no document B is similar enough.
        if not len(shingles) or _members(shingles, known) < similarity * len(shingles):
            continue
        for twin in lsh.query(_signature(shingles)):
            found = jaccard(shingles, shingles_of(held.tokens(twin)))
            if found >= similarity and (twin not in nearest or found > nearest[twin].similarity):
                nearest[twin] = Pair(number, twin, found)
    return [nearest[twin] for twin in sorted(nearest)]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sorted sets."""
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
            f"{training} and {held_out}: expected the same tokenizer, so that documents can be compared, got two: "
            "tokenize both with one"
        )


# Report on every pair of stages of a study. The limits apply to the share of the smaller corpus's documents that have
# an exact or near duplicate in the other corpus.


def compare_stages(
    stages: Mapping[str, Sequence[str]],
    *,
    similarity: float = 0.8,
    max_duplicates: float = 0.0,
    max_near_duplicates: float = 0.0,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare every two corpora of different stages; returns a report (JSON) for ``refuse``.

    ``stages``: corpora (prefixes) by stage. The limits are shares, 0 to 1, of the documents of the smaller
    corpus; near duplicates exclude exact ones. An ``earlier`` report on the same corpora (by fingerprint)
    with the same settings is returned as it is. Raises UsageError and DataError.
    """
    for flag, given in (("--max-duplicates", max_duplicates), ("--max-near-duplicates", max_near_duplicates)):
        if not 0 <= given <= 1:
            raise UsageError(flag, got=given, expected="a share of the documents, from 0 to 1")
    given_stages = [(stage, prefix) for stage, prefixes in stages.items() for prefix in prefixes]
    pairs = [(a, b) for a, b in itertools.combinations(given_stages, 2) if a[0] != b[0]]
    if not pairs:
        raise UsageError("--train, …, --test", got=f"those of {len(stages)}", expected="corpora of at least two stages")
    question = {
        "version": 2,
        "corpora": {stage: [indexed.fingerprint(prefix) for prefix in stages[stage]] for stage in sorted(stages)},
        "shortest": SHORTEST,
        "shingle": SHINGLE,
        "permutations": PERMUTATIONS,
        "similarity": similarity,
        "max_duplicates": max_duplicates,
        "max_near_duplicates": max_near_duplicates,
    }
    if earlier is not None and question == {name: earlier.get(name) for name in question}:
        return dict(earlier)
    compared = [compare(a, b, similarity) for a, b in pairs]
    for found in compared:
        found["accepted"] = (
            found["duplicates"] <= max_duplicates * found["documents"]
            and found["near_duplicates"] <= max_near_duplicates * found["documents"]
        )
    return question | {"accepted": all(found["accepted"] for found in compared), "pairs": compared}


def compare(first: tuple[str, str], second: tuple[str, str], similarity: float) -> dict[str, Any]:
    """Duplicates between two corpora, each (stage, prefix); ``documents`` counts the smaller one's non-empty ones."""
    sizes = [indexed.tokens(indexed.open_indexed(prefix)) for _, prefix in (first, second)]
    large, small = (first, second) if sizes[0] >= sizes[1] else (second, first)
    exact = [document for _, document in shared_documents(large[1], small[1])]
    known = set(exact)
    near = [pair for pair in near_duplicates(large[1], small[1], similarity) if pair.held_out not in known]
    documents, too_short = Documents(small[1]).counts()
    return {
        "of": {"stage": small[0], "prefix": small[1]},
        "in": {"stage": large[0], "prefix": large[1]},
        "documents": documents,
        "too_short": too_short,
        "duplicates": len(exact),
        "near_duplicates": len(near),
        "nearest": [
            {"document": pair.held_out, "is_like": pair.training, "similarity": round(pair.similarity, 4)}
            for pair in sorted(near, key=lambda pair: -pair.similarity)
        ],
        "exact": sorted(exact),
    }


def refuse(report: Mapping[str, Any]) -> None:
    """Raises DataError, naming the pairs of corpora, if the report exceeds its limits."""
    wrong = [line(found) for found in report["pairs"] if not found["accepted"]]
    if wrong:
        raise DataError(
            f"{'; '.join(wrong)}: expected at most {report['max_duplicates']:.2%} and "
            f"{report['max_near_duplicates']:.2%} of the documents; remove them from one of the two, "
            "so that no stage trains on what another is evaluated on"
        )


def line(found: Mapping[str, Any]) -> str:
    """One pair of corpora as text."""
    small, large = found["of"], found["in"]
    text = (
        f"of {found['documents']} documents of {small['stage']} {small['prefix']}, {found['duplicates']} are in "
        f"{large['stage']} {large['prefix']} and {found['near_duplicates']} nearly so"
    )
    for pair in found["nearest"][:1]:
        text += f" (document {pair['document']} is like its document {pair['is_like']})"
    if found["too_short"]:
        text += f", {found['too_short']} are too short to compare (below {SHORTEST} tokens)"
    return text
