"""Do the stages of a study share documents? Every pair of stages, exact and near duplicates, one report.

Exact duplicates are equal token by token (``heldout``), near ones are alike (``near_duplicates``). What is
judged is the share of the smaller corpus's documents that have a duplicate in the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prune.data import identity, indexed
from megatron_prune.data.documents import SHORTEST, Documents
from megatron_prune.data.heldout import shared_documents
from megatron_prune.data.near_duplicates import PERMUTATIONS, SHINGLE, near_duplicates
from megatron_prune.errors import DataError, UsageError


def compare_stages(
    stages: Mapping[str, Sequence[str]],
    *,
    similarity: float = 0.8,
    max_duplicates: float = 0.0,
    max_near_duplicates: float = 0.0,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A report (JSON) on every two corpora of different stages; ``refuse`` turns it into an error.

    An ``earlier`` report on the same corpora (by their fingerprints) with the same settings is the answer.

    ``stages``: corpora (prefixes) by stage. The limits are shares, 0 to 1, of the documents of the smaller
    corpus; near duplicates do not count the exact ones. Raises UsageError and DataError.
    """
    for flag, given in (("--max-duplicates", max_duplicates), ("--max-near-duplicates", max_near_duplicates)):
        if not 0 <= given <= 1:
            raise UsageError(flag, given=given, allowed="a share of the documents, 0 to 1")
    given_stages = [(stage, prefix) for stage, prefixes in stages.items() for prefix in prefixes]
    pairs = [(a, b) for a, b in itertools.combinations(given_stages, 2) if a[0] != b[0]]
    if not pairs:
        raise UsageError("--train, …, --test", given=f"corpora of {len(stages)} stage(s)", allowed="two stages or more")
    question = {
        "version": 2,
        "corpora": {stage: [identity.fingerprint(prefix) for prefix in stages[stage]] for stage in sorted(stages)},
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
    """What two corpora, each (stage, prefix), share; ``documents`` are the smaller one's, non-empty ones."""
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
    """DataError when a pair of corpora shares more than the report's limits allow; names the pairs."""
    wrong = [line(found) for found in report["pairs"] if not found["accepted"]]
    if wrong:
        raise DataError(
            f"{'; '.join(wrong)}: allowed are {report['max_duplicates']:.2%} and {report['max_near_duplicates']:.2%} "
            "of the documents; take them out of one of the two, so that no stage uses what another is judged by"
        )


def line(found: Mapping[str, Any]) -> str:
    """One pair of corpora in words."""
    small, large = found["of"], found["in"]
    text = (
        f"of {found['documents']} documents of {small['stage']} {small['prefix']}, {found['duplicates']} are in "
        f"{large['stage']} {large['prefix']} and {found['near_duplicates']} nearly so"
    )
    for pair in found["nearest"][:1]:
        text += f" (document {pair['document']} is like its document {pair['is_like']})"
    if found["too_short"]:
        text += f", {found['too_short']} are too short to judge (below {SHORTEST} tokens)"
    return text
