"""``study report --verify``: reads again what a report rests on, all of it.

A report compares fingerprints, which sample the weights of every matrix and blocks of every corpus. Here every element
is hashed: weights against what ``evaluate`` scored, masks against their own bits and the weights' zeros, corpora
against the accounts, the scores, and the hash that preprocessing left next to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, masks
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.data import indexed
from megatron_prune.errors import MegatronPruneError
from megatron_prune.masks import with_weights
from megatron_prune.study import commands, custody
from megatron_prune.study.prunings import Places, parent_cells
from megatron_prune.study.schema import StudyConfig
from megatron_prune.training.account import read_account

Record = Mapping[str, Any]


def verify_files(study: StudyConfig, places: Places, records: Mapping[str, Record]) -> tuple[dict[str, int], list[str]]:
    """How many checkpoints, masks and corpora were read, and what is not as it was when it was used."""
    read: Counter[str] = Counter({"checkpoints": 0, "masks": 0, "corpora": 0})
    found: list[str] = []
    for cell in records:
        if places.scores(cell).is_file():
            found += _tried(cell, _of_cell(study, places, cell, read))
    for prefix, known in _corpora(study, places, records).items():
        read["corpora"] += 1
        found += _tried(prefix, _of_corpus(prefix, known))
    return dict(read), found


def _tried(name: str, problems: Iterator[str]) -> Iterator[str]:
    """The problems; a file that cannot be read is one too."""
    try:
        yield from (f"{name}: {problem}" for problem in problems)
    except (MegatronPruneError, OSError) as error:
        yield f"{name}: {error}"


def _of_cell(study: StudyConfig, places: Places, cell: str, read: Counter[str]) -> Iterator[str]:
    loaded = {name: places.parent(study, seed) for name, seed in parent_cells(study)}
    path = loaded.get(cell, places.checkpoint(cell))
    scores = custody.read_scores(places.scores(cell))
    if not (path / ".metadata").is_file() and find_iteration(path) is None:
        return  # its weights were not kept
    checkpoint = open_checkpoint(path)
    read["checkpoints"] += 1
    if (now := checkpoint.full_hash()) != (then := scores["checkpoint"]["full_hash"]):
        yield f"its weights are not those that were evaluated (full_hash {then} then, {now} now)"
    folder = masks.find_masks(checkpoint.root)
    held = masks.open_masks(folder) if folder else None
    found, scored = held.hash if held else None, scores["masks"]
    if found != scored:
        yield f"its masks are not those that were evaluated ({scored or 'none'} then, {found or 'none'} now)"
    if held is not None:
        read["masks"] += 1
        with_weights.verify(held, checkpoint)


def _corpora(study: StudyConfig, places: Places, records: Mapping[str, Record]) -> dict[str, dict[str, str]]:
    """The fingerprints of every corpus by what used it, by prefix."""
    found: dict[str, dict[str, str]] = {}
    for cell, record in records.items():
        for label, prefix in commands.scored_corpora(study).items():
            if label in record.get("text", {}):
                found.setdefault(prefix, {})[f"{cell} was scored"] = record["text"][label]["fingerprint"]
        stream = read_account(places.account(cell))["stream"] if places.account(cell).is_file() else None
        for (_, prefix), content in zip(stream["blend"], stream["corpora"], strict=True) if stream else ():
            found.setdefault(prefix, {})[f"{cell} was trained"] = content
    return found


def _of_corpus(prefix: str, known: Mapping[str, str]) -> Iterator[str]:
    now = indexed.fingerprint(prefix)
    if others := [use for use, then in known.items() if then != now]:
        yield f"it is not the text on which {others[0]}" + f" ({len(others) - 1} more)" * (len(others) > 1)
    described = indexed.sidecar(prefix) or {}
    if (whole := described.get("bin_sha256")) and artifacts.sha256_file(Path(f"{prefix}.bin")) != whole:
        yield f"{prefix}.bin is not what preprocessing wrote (bin_sha256)"
