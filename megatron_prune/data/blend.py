"""Blends: parsing ``--data-path``, the identity of a blend's corpora, and the length of a blend."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import normalize

from megatron_prune.data import indexed
from megatron_prune.errors import DataError, UsageError


@dataclass(frozen=True)
class Corpus:
    """One member of a blend; ``weight`` is None if members are drawn in proportion to their length."""

    prefix: str
    weight: float | None
    fingerprint: str


def parse_blend(blend: str | Sequence[str]) -> list[tuple[float | None, str]]:
    """Parse Megatron's ``--data-path`` (prefixes, or alternating weights and prefixes) as (weight or None, prefix)."""
    words = [blend] if isinstance(blend, str) else [str(word) for word in blend]
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(weight is None for weight in weights):
        pairs: list[tuple[float | None, str]] = [(None, word) for word in words]
    else:
        pairs = list(zip(weights, words[1::2], strict=True))
    wrong = [w for w, _ in pairs if w is not None and not 0 < w < float("inf")]
    if not words or wrong or len({weight is None for weight, _ in pairs}) > 1:
        raise UsageError(
            "--data-path",
            got=" ".join(words) or "nothing",
            expected="PREFIX… or WEIGHT PREFIX WEIGHT PREFIX…",
            why="either every corpus has a positive weight or none has one",
        )
    return pairs


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def members(pairs: Sequence[tuple[float | None, str]]) -> list[Corpus]:
    """The corpora of a blend with their fingerprints. Raises DataError for broken or repeated corpora."""
    for _, prefix in pairs:
        indexed.open_indexed(prefix)
    found = [Corpus(prefix, weight, indexed.fingerprint(prefix)) for weight, prefix in pairs]
    for earlier, later in itertools.combinations(found, 2):
        if earlier.fingerprint == later.fingerprint:
            raise DataError(
                f"expected different corpora, got the same tokens in {earlier.prefix} and {later.prefix}: "
                "name a corpus once, with the sum of its weights"
            )
    return found


def blend_length(weights: Sequence[float], lengths: Sequence[int]) -> int:
    """Number of samples that a blend at these weights yields before one of its members is exhausted.

    Megatron's interleaving is greedy, so its first n choices do not depend on the number requested.
    """
    # A member is never more than (members - 1) samples behind its share, so one is exhausted before this bound.
    members = len(weights)
    bound = 1 + int(min((length + members) / weight for weight, length in zip(weights, lengths, strict=True)))
    member, taken = np.zeros(bound, dtype=np.int16), np.zeros(bound, dtype=np.int64)
    helpers.build_blending_indices(member, taken, list(weights), members, bound, False)
    exhausted = taken >= np.asarray(lengths)[member]
    return int(exhausted.argmax()) if exhausted.any() else bound


def samples_per_epoch(corpora: Sequence[Corpus], seq_length: int) -> int:
    """Samples in one epoch of a stream over these corpora, from token counts alone, without building an index."""
    lengths = [(indexed.tokens(indexed.open_indexed(c.prefix)) - 1) // seq_length for c in corpora]
    weights = shares(corpora)
    return sum(lengths) if weights is None else blend_length(weights, lengths)


def member_of(corpora: Sequence[Corpus], seq_length: int, samples: int) -> np.ndarray:
    """The corpus that each of the first ``samples`` samples of an epoch comes from, int16, from token counts alone."""
    weights = shares(corpora)
    lengths = [(indexed.tokens(indexed.open_indexed(c.prefix)) - 1) // seq_length for c in corpora]
    if len(corpora) == 1 or not samples:
        return np.zeros(samples, dtype=np.int16)
    size = samples if weights is not None else sum(lengths)
    member, taken = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    if weights is not None:
        helpers.build_blending_indices(member, taken, list(weights), len(weights), size, False)
    else:
        helpers.build_exhaustive_blending_indices(member, taken, np.array(lengths, dtype=np.int64), len(lengths))
    return member[:samples]


def ranges(corpora: Sequence[Corpus], seq_length: int, start: int, end: int) -> list[list[int]]:
    """By corpus, which of its own samples the samples [start, end) of an epoch are: [first, end) of each."""
    member = member_of(corpora, seq_length, end)
    until, before = (np.bincount(part, minlength=len(corpora)) for part in (member, member[:start]))
    return [list(pair) for pair in zip(before.tolist(), until.tolist(), strict=True)]


def after(corpora: Sequence[Corpus], seq_length: int, ends: Sequence[int]) -> int:
    """The first sample of an epoch from which on no corpus gives a sample before its ``ends``."""
    samples = samples_per_epoch(corpora, seq_length)
    member = member_of(corpora, seq_length, samples)
    found = 0
    for number, end in enumerate(ends):
        places = np.flatnonzero(member == number)
        if end:
            found = max(found, int(places[end - 1]) + 1 if end <= len(places) else samples)
    return found


def intersecting(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> tuple[int, int, int] | None:
    """(corpus, first, end) of samples that are in both lists of ranges by corpus; None if there are none."""
    for corpus, ((a, b), (c, d)) in enumerate(zip(one, other, strict=True)):
        if max(a, c) < min(b, d):
            return corpus, max(a, c), min(b, d)
    return None


def shares(corpora: Sequence[Corpus]) -> list[float] | None:
    """Weights that sum to one; None for a single member, or if members are drawn in proportion to their length."""
    weights = [c.weight for c in corpora]
    return None if len(weights) == 1 or weights[0] is None else normalize(weights)
