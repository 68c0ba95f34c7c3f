"""Quotations: texts (questions of tasks) of which a corpus has ``RUN`` tokens in a row.

Every run of ``RUN`` tokens of the texts is hashed into a table, and every run of the corpus is looked up in it, at
about 0.1 µs per token of the corpus. A text is tokenized on its own, so its first and last tokens may differ from those
inside a document; runs between them do not. Texts shorter than ``RUN`` tokens are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_prune import screen
from megatron_prune.data import indexed
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.errors import DataError

RUN = 13  # tokens, as many words as GPT-3's authors looked for (Brown et al. 2020, appendix C)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BITS = 26  # of the table that excludes most runs before they are looked up
CHUNK = 1 << 20  # tokens of a corpus at a time


@dataclass(frozen=True)
class QuotedTexts:
    """Of ``texts``, ``too_short`` are not compared, and ``quoted`` are quoted in the ``corpora``.

    ``example``: the number of one of them.
    """

    texts: int
    too_short: int
    quoted: int
    corpora: tuple[str, ...]
    example: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quoted(texts: Mapping[str, Sequence[str]], corpora: Sequence[str], tokenizer: Tokenizer) -> dict[str, QuotedTexts]:
    """By name of a group of ``texts``: how many of them are quoted in ``corpora`` (prefixes).

    DataError for a corpus of another tokenizer.
    """
    _refuse_other_tokenizers(corpora, tokenizer)
    owners, hashes, short = [], [], dict.fromkeys(texts, 0)
    groups = [(name, number) for name, own in texts.items() for number in range(len(own))]
    every = tokenizer.encode_batch([text for own in texts.values() for text in own])
    for place, ((name, _), tokens) in enumerate(zip(groups, every, strict=True)):
        short[name] += len(tokens) < RUN
        found = run_hashes(np.asarray(tokens))
        hashes.append(found)
        owners.append(np.full(len(found), place))
    table, entry = np.unique(np.concatenate(hashes or [np.empty(0, np.uint64)]), return_inverse=True)
    hit = np.zeros(len(table), dtype=bool)
    for corpus in corpora if len(table) else ():
        _look_up(corpus, table, hit)
    found_places = set(np.concatenate(owners)[hit[entry]].tolist()) if len(table) else set()
    result = {}
    for name, own in texts.items():
        numbers = [number for place, (group, number) in enumerate(groups) if group == name and place in found_places]
        result[name] = QuotedTexts(len(own), short[name], len(numbers), tuple(corpora), numbers[0] if numbers else None)
    return result


def run_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hashes of all runs of ``RUN`` consecutive tokens, uint64 [max(0, n - RUN + 1)]."""
    tokens = tokens.astype(np.uint64)
    count = max(0, len(tokens) - RUN + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(RUN if count else 0):
        hashes *= MULTIPLIER
        hashes += tokens[place : place + count] + np.uint64(1)
    hashes ^= hashes >> np.uint64(32)
    hashes *= MULTIPLIER
    return hashes


def _look_up(corpus: str, table: np.ndarray, hit: np.ndarray) -> None:
    """Mark the entries of the sorted ``table`` that occur in a corpus."""
    shift = np.uint64(64 - BITS)
    maybe = np.zeros(1 << BITS, dtype=bool)
    maybe[(table >> shift).astype(np.int64)] = True
    opened = indexed.open_indexed(corpus)
    ids = np.memmap(f"{corpus}.bin", dtype=opened.index.dtype, mode="r")
    with screen.Bar(len(ids), f"looking for questions in {corpus}", "token", shown=screen.rank() == 0) as bar:
        for first in range(0, max(0, len(ids) - RUN + 1), CHUNK):
            runs = run_hashes(np.asarray(ids[first : first + CHUNK + RUN - 1]))
            runs = runs[maybe[(runs >> shift).astype(np.int64)]]
            places = np.minimum(np.searchsorted(table, runs), len(table) - 1)
            hit[places[table[places] == runs]] = True
            bar.reach(min(first + CHUNK, len(ids)))


def _refuse_other_tokenizers(corpora: Sequence[str], tokenizer: Tokenizer) -> None:
    for corpus in corpora:
        described = indexed.sidecar(corpus)
        if described and described["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
            raise DataError(
                f"{corpus} was tokenized with another tokenizer than {tokenizer.model}, so questions cannot be looked "
                "for in it: name its own in data.tokenizer"
            )
