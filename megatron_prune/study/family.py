"""``family`` of study.yaml: the comparisons that the study was made for, which Holm's correction is over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError
from megatron_prune.study.values import STRICT, Fraction, Setting, Tokens


@dataclass(frozen=True, config=STRICT)
class Family:
    """What a comparison must be to belong to it; None: anything. All comparisons of a study belong by default."""

    methods: list[str] | None = None  # as rows call them: their label, or else their name
    patterns: list[str] | None = None
    ratios: list[Fraction] | None = None
    settings: list[Setting] | None = None
    budgets: list[Tokens] | None = None

    def holds(self, comparison: Mapping[str, Any]) -> bool:
        """Whether a comparison is in it, given as ``method``, ``pattern``, ``ratio``, ``setting`` and ``budget``."""
        return all(
            allowed is None or comparison[key] in allowed
            for key, allowed in (
                ("method", self.methods),
                ("pattern", self.patterns),
                ("ratio", self.ratios),
                ("setting", self.settings),
                ("budget", self.budgets),
            )
        )

    def check(self, **known: Iterable[Any]) -> None:
        """UsageError where it names what the study does not have."""
        for key, there in known.items():
            values = list(dict.fromkeys(there))
            for value in getattr(self, key) or ():
                if value not in values:
                    raise UsageError(
                        f"family.{key}", given=value, allowed=f"what the study has: {', '.join(map(str, values))}"
                    )
