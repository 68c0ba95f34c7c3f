"""A corpus of real English from this machine, for the examples: four JSONL files and a manifest.

``sources`` finds text; here it is cleaned (paragraph by paragraph, every paragraph at most once in the
whole corpus, so that no split contains another's), filtered (long enough, English) and split by
document: in the order of their hashes, the first 94% of the bytes are train, then come calibration,
validation and test. Two runs on a machine give the same bytes. Licences stay with the packages that
the text comes from: nothing of it belongs in a repository.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from megatron_prune import artifacts
from megatron_prune.data.sources import Found, Places, gather
from megatron_prune.errors import DataError, UsageError

SPLITS = ("train", "calibration", "validation", "test")
SHARES = (94, 2, 2, 2)
SHORTEST = 200  # characters of a document
SHORT_PARAGRAPH = 40  # letters and digits; shorter ones ("Parameters", "Examples:") may repeat
LEAST_ASCII = 0.97
LEAST_STOPWORDS = 0.05  # of words; English prose has about 0.4, tables and code have next to none
STOPWORDS = frozenset("the of to and a in is it for be as on this that with are by or an if not from".split())
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ufeff]")


def build_corpus(
    output: str | Path,
    *,
    max_bytes: int | None = 16_000_000,
    shares: Sequence[float] = SHARES,
    longest_held_out: int | None = None,
    workers: int = 1,
    places: Places | None = None,
) -> dict[str, Any]:
    """Write ``output``/{train,calibration,validation,test}.jsonl and manifest.json; the manifest.

    ``max_bytes`` of text (UTF-8) end the gathering; ``shares`` are the splits' parts of the bytes, which
    are met but for the document on each border. Of documents of calibration, validation and test, ``longest_held_out``
    characters at most are kept and the rest is in no split: where they are resampled, many say more than long ones.
    An ``output`` from before is replaced. Raises UsageError, and DataError when a split stays empty.
    """
    if len(shares) != len(SPLITS) or min(shares) <= 0:
        given = ",".join(map(str, shares))
        raise UsageError("--split", given=given, allowed="four positive shares, such as 94,2,2,2")
    if max_bytes is not None and max_bytes < 1:
        raise UsageError("--max-bytes", given=max_bytes, allowed="a positive number")
    if longest_held_out is not None and longest_held_out < SHORTEST:
        raise UsageError("--longest-held-out", given=longest_held_out, allowed=f"{SHORTEST} characters or more")
    begun = monotonic()
    rejected: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    documents: list[tuple[bytes, Found]] = []
    total = 0
    for document in clean(gather(places or Places(), workers), rejected):
        payload = document.text.encode()
        size = len(payload)
        documents.append((hashlib.sha256(payload).digest(), document))
        kinds.setdefault(document.kind, Counter()).update(documents=1, bytes=size)
        total += size
        if max_bytes is not None and total >= max_bytes:
            break
    splits = _split(documents, total, shares, longest_held_out)
    if empty := [name for name, found in splits.items() if not found]:
        raise DataError(
            f"only {total} bytes of text were found and {', '.join(empty)} got none: "
            "install packages with documentation, or raise --max-bytes"
        )
    manifest: dict[str, Any] = {"version": 1, "max_bytes": max_bytes, "shares": list(shares),
                                "longest_held_out": longest_held_out, "bytes": total,
                                "splits": {}, "kinds": kinds, "rejected": dict(rejected)}  # fmt: skip
    with artifacts.atomic_directory(output, replace=True) as scratch:
        for name, chosen in splits.items():
            with open(scratch / f"{name}.jsonl", "w", encoding="utf-8") as handle:
                for found in chosen:
                    line = {"text": found.text, "source": f"{found.kind}/{found.name}"}
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            manifest["splits"][name] = {
                "documents": len(chosen),
                "bytes": sum(len(found.text.encode()) for found in chosen),
                "sha256": artifacts.sha256_file(scratch / f"{name}.jsonl"),
            }
        artifacts.write_json(scratch / "manifest.json", manifest)
    return manifest | {"seconds": monotonic() - begun}


def _split(
    documents: Sequence[tuple[bytes, Found]], total: int, shares: Sequence[float], longest: int | None
) -> dict[str, list[Found]]:
    """Cut the documents, in the order of their hashes, where each split has its share of the bytes: test from the end.

    The order stays: so the first windows of a split are a mixture and not all of one kind.
    """
    rest = [found for _, found in sorted(documents, key=lambda document: document[0])]
    splits: dict[str, list[Found]] = {}
    seen, border = 0, 0.0
    for name, share in reversed(list(zip(SPLITS, shares, strict=True))[1:]):
        border += total * share / sum(shares)
        chosen: list[Found] = []
        while rest:
            held = replace(rest[-1], text=beginning(rest[-1].text, longest))
            size = len(held.text.encode())
            if seen + size / 2 >= border:
                break
            chosen.append(held)
            rest.pop()
            seen += size
        splits[name] = chosen[::-1]
    return {SPLITS[0]: rest} | {name: splits[name] for name in SPLITS[1:]}


def beginning(text: str, longest: int | None) -> str:
    """A text's first paragraphs, of ``longest`` characters at most; the first words of a paragraph longer than that."""
    if longest is None or len(text) <= longest:
        return text
    ends = (text.rfind(mark, SHORTEST, longest + 1) for mark in ("\n\n", " "))
    return text[: next((end for end in ends if end > 0), longest)]


def clean(found: Iterable[Found], rejected: Counter[str]) -> Iterator[Found]:
    """Documents worth keeping, without what an earlier one held; ``rejected`` counts the others by reason."""
    seen: set[bytes] = set()
    for document in found:
        text = deduplicate(document.text, seen)
        reason = why_not(text)
        if reason:
            rejected[reason] += 1
        else:
            yield Found(document.kind, document.name, text)


def deduplicate(text: str, seen: set[bytes]) -> str:
    """The paragraphs of a text that are not in ``seen`` (which they join), compared by letters and digits."""
    kept = []
    text = CONTROLS.sub("", text.replace("\r\n", "\n").expandtabs(4))
    for paragraph in re.split(r"\n\s*\n", text):
        letters = re.sub(r"[\W_]+", "", paragraph.lower())
        if len(letters) >= SHORT_PARAGRAPH:
            key = hashlib.blake2b(letters.encode(), digest_size=12).digest()
            if key in seen:
                continue
            seen.add(key)
        if paragraph := "\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")):
            kept.append(paragraph)
    return "\n\n".join(kept)


def why_not(text: str) -> str | None:
    """The reason to leave a text out, or None."""
    if len(text) < SHORTEST:
        return "short"
    if len(text.encode("ascii", "ignore")) < LEAST_ASCII * len(text):
        return "not ASCII"
    words = re.findall(r"[a-z]+", text.lower())
    if sum(word in STOPWORDS for word in words) < LEAST_STOPWORDS * max(len(words), SHORTEST // 8):
        return "not English"
    return None
