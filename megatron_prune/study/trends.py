"""A comparison over all its budgets: the laws of both arms and where training from scratch catches up.

On test losses, as the verdicts are. Each budget is a run of its own; an intermediate checkpoint is never one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prune.study import break_even
from megatron_prune.study.break_even import Arms, BreakEven
from megatron_prune.study.fits import FEWEST_BUDGETS, POOR, Fit
from megatron_prune.study.subject import SUBJECT, Subject


@dataclass(frozen=True)
class Trend(Subject):
    """One method at one ratio in one setting against one kind of scratch, over budgets and seeds."""

    arms: Arms
    break_even: BreakEven
    pruned: Fit | None
    scratch: Fit | None

    @property
    def laws(self) -> str:
        """Both laws in words, or why there is none."""
        if self.pruned is None or self.scratch is None:
            return f"No fit: {len(self.arms.tokens)} budgets, at least {FEWEST_BUDGETS} are needed."
        off = [
            f"{name} (p = {fit.lack_of_fit:.2g})"
            for name, fit in (("pruned", self.pruned), ("scratch", self.scratch))
            if not fit.good
        ]
        text = f"Pruned {self.pruned.law.words}, scratch {self.scratch.law.words}"
        if off:
            return f"{text}; not used: off by more than runs scatter (F test below {POOR}): {', '.join(off)}."
        return f"{text}; off by {self.pruned.rms:.3f} and {self.scratch.rms:.3f} nats (root mean square)."

    def to_json(self) -> dict[str, Any]:
        """Everything but the single losses, which are the rows'."""
        return {
            **{key: getattr(self, key) for key in SUBJECT},
            "budgets": list(self.arms.tokens),
            "scratch_tokens": list(self.arms.scratch_tokens),
            "seeds": list(self.arms.seeds),
            "break_even": asdict(self.break_even) | {"words": self.break_even.words},
            "pruned": _fit(self.pruned),
            "scratch": _fit(self.scratch),
            "laws": self.laws,
        }


def _fit(found: Fit | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found) | {"used": found.good}


def of(subject: Mapping[str, Any], runs: Sequence[tuple[int, int, int, float, float]]) -> Trend | None:
    """The trend of one comparison, from (seed, retraining tokens, scratch tokens, pruned and scratch test loss).

    None for one budget.
    """
    arms = break_even.arms(runs)
    if arms is None:
        return None
    found, pruned, scratch = break_even.find(arms)
    return Trend(**subject, arms=arms, break_even=found, pruned=pruned, scratch=scratch)
