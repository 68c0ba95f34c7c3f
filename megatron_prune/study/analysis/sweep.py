"""Chooses the learning rate of an arm: the one with the lowest validation loss, averaged over the seeds.

Both arms of a comparison are trained at every rate with every seed (``match`` checks their accounts). One rate is
chosen per arm (a pruning's retraining at a budget; a setting's scratch runs), not per seed, to reduce noise; the test
corpus is not used. There is no choice until all runs of the arm are finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune.study.grid import Comparison, Edge


@dataclass(frozen=True)
class Sweep:
    """An arm's rates with their mean validation losses, and the chosen one (None while runs are missing)."""

    arm: str
    method: str
    pattern: str | None
    ratio: float | None
    budget: int
    setting: str | None  # of a scratch arm; pruned runs serve all settings
    against: str | None
    sparse: bool
    objective: str
    validation: Mapping[float, float | None]
    chosen: float | None

    @property
    def edge(self) -> Edge | None:
        """If the choice is at an end of the rates: the next rate to try, at its neighbour's distance on a log scale."""
        rates = sorted(self.validation)
        if self.chosen is None or self.chosen not in (rates[0], rates[-1]):
            return None
        largest = self.chosen == rates[-1]
        add = self.chosen**2 / rates[-2 if largest else 1]
        return Edge(self.arm, self.chosen, "largest" if largest else "smallest", float(f"{add:.3g}"))


def choose(
    comparisons: Sequence[Comparison], records: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[Comparison, ...], tuple[Sweep, ...]]:
    """The comparisons with the chosen runs of their arms, and the sweeps behind the choices."""
    runs: dict[tuple[Any, ...], dict[float, list[str | None]]] = {}
    for made in comparisons:
        for rate, pruned, scratch in made.swept:
            runs.setdefault(_pruned(made), {}).setdefault(rate, []).append(pruned)
            runs.setdefault(_scratch(made), {}).setdefault(rate, []).append(scratch)
    sweeps = {key: _chosen(key, by_rate, records) for key, by_rate in runs.items() if not _left_out(by_rate)}
    return tuple(_with_choice(made, sweeps) for made in comparisons), tuple(sweeps.values())


def _pruned(made: Comparison) -> tuple[Any, ...]:
    return ("pruned", *made.pruning.subject, made.budget, None, None, made.pruning.sparse, made.objective)


def _scratch(made: Comparison) -> tuple[Any, ...]:
    own = made.budget, made.setting, made.against, made.pruning.sparse, made.objective
    return ("scratch", *made.pruning.subject, *own)


def _left_out(by_rate: Mapping[float, Sequence[str | None]]) -> bool:
    """True for the scratch arm of a comparison that is not run."""
    return all(name is None for names in by_rate.values() for name in names)


def _chosen(
    key: tuple[Any, ...], by_rate: Mapping[float, Sequence[str | None]], records: Mapping[str, Mapping[str, Any]]
) -> Sweep:
    means: dict[float, float | None] = {}
    for rate, names in by_rate.items():
        runs = {name for name in names if name is not None}
        losses = [records[name]["validation_loss"] for name in sorted(runs & set(records))]
        means[rate] = sum(losses) / len(losses) if len(losses) == len(set(names)) else None
    known = {rate: mean for rate, mean in means.items() if mean is not None}
    best = min(known, key=lambda rate: known[rate]) if len(known) == len(means) else None
    arm, method, pattern, ratio, budget, setting, against, sparse, objective = key
    return Sweep(arm, method, pattern, ratio, budget, setting, against, sparse, objective, means, best)


def _with_choice(made: Comparison, sweeps: Mapping[tuple[Any, ...], Sweep]) -> Comparison:
    arms = {"pruned": sweeps.get(_pruned(made)), "scratch": sweeps.get(_scratch(made))}
    changes: dict[str, Any] = {"chosen": all(arm is None or arm.chosen is not None for arm in arms.values())}
    changes["edges"] = tuple(edge for arm in arms.values() if arm is not None and (edge := arm.edge))
    for position, (which, arm) in enumerate(arms.items()):
        if arm is not None and arm.chosen is not None:
            changes[which] = next(names[position] for rate, *names in made.swept if rate == arm.chosen)
    return replace(made, **changes)
