"""Which arm ended lower, by how much, and how sure that is: as numbers and as a sentence.

Losses are mean nats per predicted token on fixed windows. The test corpus decides; validation is
shown beside it. A sentence claims no more than its interval, and one seed has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.study import statistics
from megatron_prune.study.statistics import Difference

CORPORA = ("validation", "test")


@dataclass(frozen=True)
class Verdict:
    """Scratch minus pruned for one method, ratio, setting, kind of scratch and budget, over all finished seeds."""

    method: str
    pattern: str | None
    ratio: float | None
    setting: str
    against: str  # masked or dense
    tokens: int
    validation: Difference
    test: Difference
    pruned: Mapping[str, float]  # mean losses by corpus
    scratch: Mapping[str, float]

    @property
    def subject(self) -> str:
        """What it is about: ``shortgpt, 50% removed, equal training tokens, 409,600 of retraining``."""
        setting = self.setting.replace("-", " ")
        dense = ", against dense scratch" if self.dense else ""
        return f"{self.label}, {setting} tokens, {self.tokens:,} of retraining{dense}"

    @property
    def label(self) -> str:
        return label(self.method, self.pattern, self.ratio)

    @property
    def dense(self) -> bool:
        """True where a sparse model stands against one that has all its weights."""
        return self.pattern is not None and self.against == "dense"

    @property
    def words(self) -> str:
        """The verdict as a sentence, and how sure it is."""
        losses = f"test loss {self.pruned['test']:.3f} against {self.scratch['test']:.3f}"
        if self.test.winner == "neither":
            return f"pruned and scratch cannot be told apart, {losses}. {self._certainty}"
        winner = {"pruned": "the pruned model", "scratch": "training from scratch"}[self.test.winner]
        return f"{winner} ends lower by {abs(self.test.mean):.3f} nats, {losses}. {self._certainty}"

    @property
    def _certainty(self) -> str:
        if self.test.low is None or self.test.high is None:
            return "One seed: no interval."
        freedom = self.test.degrees_of_freedom
        return (
            f"Scratch minus pruned {self.test.mean:+.3f}, "
            f"95% interval {self.test.low:+.3f} to {self.test.high:+.3f} "
            f"(paired t over {self.test.seeds} seeds, {freedom} degree{'s' * (freedom != 1)} of freedom, "
            "conditional on this parent)."
        )


def label(method: str, pattern: str | None, ratio: float | None) -> str:
    """``shortgpt, 50% removed``; ``wanda 2:4, 50% removed``"""
    name = method if pattern is None else f"{method} {pattern}"
    return name if ratio is None else f"{name}, {100 * ratio:g}% removed"


def judge(
    *,
    method: str,
    pattern: str | None,
    ratio: float | None,
    setting: str,
    against: str,
    tokens: int,
    pruned: Sequence[Mapping[str, Any]],
    scratch: Sequence[Mapping[str, Any]],
) -> Verdict:
    """The verdict over paired records, a seed each, that hold ``validation_loss`` and ``test_loss``."""
    losses = {
        arm: {name: [record[f"{name}_loss"] for record in records] for name in CORPORA}
        for arm, records in (("pruned", pruned), ("scratch", scratch))
    }
    means = {arm: {name: sum(v) / len(v) for name, v in by.items()} for arm, by in losses.items()}
    return Verdict(
        method,
        pattern,
        ratio,
        setting,
        against,
        tokens,
        validation=statistics.paired(losses["pruned"]["validation"], losses["scratch"]["validation"]),
        test=statistics.paired(losses["pruned"]["test"], losses["scratch"]["test"]),
        pruned=means["pruned"],
        scratch=means["scratch"],
    )
