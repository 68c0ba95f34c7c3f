"""What the plan has and the report lacks: for each conclusion and each question, the comparisons that are not finished.

A run that was deleted looks like one that was never made, so that a conclusion names what it is without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.study import schema
from megatron_prune.study.analysis import contrasts, headlines
from megatron_prune.study.grid import label, setting_words

MOST_NAMED = 4


@dataclass(frozen=True)
class Unfinished:
    """The comparisons of one conclusion, or of one ``question``, that are ``missing`` of those ``planned``."""

    question: bool
    subject: str
    setting: str
    planned: int
    missing: tuple[str, ...]

    @property
    def words(self) -> str:
        """``Not finished: 2 of 6 comparisons (shortgpt, 50% removed, 1,280 tokens, seed 3; …).``"""
        named = "; ".join(self.missing[:MOST_NAMED])
        more = f"; {len(self.missing) - MOST_NAMED} more" if len(self.missing) > MOST_NAMED else ""
        return f"Not finished: {len(self.missing)} of {self.planned} comparisons ({named}{more})."

    @property
    def sentence(self) -> str:
        return f"{self.subject}, {setting_words(self.setting)}: {self.words}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "missing": list(self.missing), "words": self.sentence}


def find_unfinished(study: schema.StudyConfig, compared: Sequence[Any]) -> tuple[Unfinished, ...]:
    """Of every conclusion and question that lacks something; ``compared``: ``results.Compared``."""
    found = []
    for question, subject, setting, items in (*_conclusions(compared), *_questions(study, compared)):
        missing = tuple(_name(item) for item in items if item.status == "pending")
        if missing:
            found.append(Unfinished(question, subject, setting, len(items), missing))
    return tuple(found)


def _conclusions(compared: Sequence[Any]) -> Iterator[tuple[bool, str, str, list[Any]]]:
    for key, items in headlines.group_comparisons(compared).items():
        setting, kind, dense, objective = key
        sparse = items[0].comparison.pruning.sparse
        yield False, headlines.subject(kind, sparse=sparse, dense=dense, objective=objective), setting, items


def _questions(study: schema.StudyConfig, compared: Sequence[Any]) -> Iterator[tuple[bool, str, str, list[Any]]]:
    for asked, setting, dense, items in contrasts.list_questions(study, compared):
        yield True, contrasts.subject(asked, dense=dense), setting, items


def _name(item: Any) -> str:
    made = item.comparison
    return f"{label(*made.subject)}, {item.tokens:,} tokens, seed {made.seed}"
