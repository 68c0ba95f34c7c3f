"""The break-even: the retraining budget at which training from scratch catches up with a pruned start.

The gap, scratch minus pruned, is followed over the budgets of one comparison, each seed for itself: by the laws of
both arms (``fits``) where there are at least five budgets and the laws describe the losses, and at the measured
budgets alone where not. At every budget a t interval over seeds says where the gap may be zero; the budgets at
which it may are the break-even's interval. So a truth beyond the data is called inside them only where the gap at
the largest budget is below zero by its own interval, and whatever a seed's runs have in common is allowed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_prune.study import fits, statistics
from megatron_prune.study.fits import Fit

GRID = 400  # budgets between the smallest and the largest at which the gap is asked for
Status = Literal["inside", "open", "beyond", "before", "reversed"]


@dataclass(frozen=True)
class Arms:
    """The runs of one comparison at all its budgets, lowest first, over the seeds that have all of them."""

    tokens: tuple[int, ...]  # of retraining
    scratch_tokens: tuple[int, ...]  # of the scratch runs beside them
    seeds: tuple[int, ...]
    pruned: np.ndarray  # losses [seeds, budgets]
    scratch: np.ndarray


@dataclass(frozen=True)
class BreakEven:
    """``inside`` the data, with an interval; ``beyond`` them: pruned is ahead at every budget; ``before``: scratch is;
    ``open``: the interval reaches an end of the data; ``reversed``: scratch is ahead at first, and pruned later.

    ``low`` or ``high`` None: that end is open, or (one seed) there is no interval. Tokens of retraining.
    """

    status: Status
    by: Literal["laws", "budgets"]
    seeds: int
    first: int
    last: int
    tokens: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def words(self) -> str:
        """A sentence without its subject."""
        return f"{self._where}{' (one seed: no interval)' if self.seeds == 1 else ''}."

    @property
    def _where(self) -> str:
        first, last = f"{self.first:,}", f"{self.last:,}"
        how = "" if self.by == "laws" else ", by the measured budgets alone"
        if self.status == "beyond":
            return f"not within the data: pruned is ahead at every budget up to {last} tokens"
        if self.status == "before":
            return f"not within the data: scratch is ahead from the smallest budget on, {first} tokens"
        if self.status == "reversed":
            return f"none: scratch is ahead at {first} tokens and pruned at {last}"
        if self.status == "open":
            if self.low is None and self.high is None:
                return f"undecided between {first} and {last} tokens, where the data end"
            if self.high is None:
                return f"after {self.low:,.0f} tokens; the data end at {last} and do not say where{how}"
            return f"before {self.high:,.0f} tokens; the data begin at {first} and do not say where{how}"
        about = "" if self.tokens is None else f"at {self.tokens:,.0f} tokens"
        if self.low is None or self.high is None:
            return about
        interval = f"{self.low:,.0f} to {self.high:,.0f}"
        return (
            f"{about}, 95% interval {interval}" if about else f"between {interval.replace(' to ', ' and ')} tokens{how}"
        )


def find(arms: Arms) -> tuple[BreakEven, Fit | None, Fit | None]:
    """The break-even and the laws of the pruned and the scratch arm; fewer than five budgets have no laws."""
    pruned = fits.fit(arms.tokens, arms.pruned, pruned=True)
    scratch = fits.fit(arms.scratch_tokens, arms.scratch, pruned=False)
    if pruned and scratch and pruned.good and scratch.good:
        return _between(arms, *_by_laws(arms), by="laws"), pruned, scratch
    return _between(arms, np.array(arms.tokens, float), arms.scratch - arms.pruned, by="budgets"), pruned, scratch


def gaps(arms: Arms, tokens: np.ndarray) -> np.ndarray:
    """Scratch minus pruned by each seed's laws [seeds, tokens], at retraining budgets within the data."""
    beside = np.interp(tokens, arms.tokens, arms.scratch_tokens)
    return np.array(
        [
            fits.law(arms.scratch_tokens, scratch, pruned=False)(beside)
            - fits.law(arms.tokens, pruned, pruned=True)(tokens)
            for pruned, scratch in zip(arms.pruned, arms.scratch, strict=True)
        ]
    )


def _by_laws(arms: Arms) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.geomspace(arms.tokens[0], arms.tokens[-1], GRID)
    return tokens, gaps(arms, tokens)


def _between(arms: Arms, tokens: np.ndarray, gap: np.ndarray, *, by: Literal["laws", "budgets"]) -> BreakEven:
    """From the gap of every seed at increasing budgets."""
    seeds, mean = len(gap), gap.mean(axis=0)
    reach = np.zeros_like(mean)
    if seeds > 1:
        reach = statistics.t_quantile(seeds - 1) * gap.std(axis=0, ddof=1) / np.sqrt(seeds)
    ahead, behind = mean - reach > 0, mean + reach < 0  # pruned, by its interval

    def found(status: Status, **ends: float | None) -> BreakEven:
        return BreakEven(status, by, seeds, arms.tokens[0], arms.tokens[-1], **ends)

    if behind[0]:
        return found("reversed" if ahead[-1] else "before")
    if ahead.all():
        return found("beyond")
    begins, ends = ahead[0], behind[-1]
    # The last budget up to which pruned is ahead all the way, and the first from which scratch is.
    low = int(np.argmin(ahead)) - 1
    high = len(behind) - int(np.argmin(behind[::-1]))
    if by == "laws":
        limits = _cross(tokens, mean - reach, low), _cross(tokens, mean + reach, high - 1)
        point = _cross(tokens, mean, int(np.argmax(mean < 0)) - 1) if begins and ends else None
    else:
        limits, point = (tokens[low], tokens[min(high, len(tokens) - 1)]), None
    if seeds == 1 and by == "laws":
        return found("inside", tokens=point) if begins and ends else found("open")
    return found(
        "inside" if begins and ends else "open",
        tokens=point,
        low=float(limits[0]) if begins else None,
        high=float(limits[1]) if ends else None,
    )


def _cross(tokens: np.ndarray, values: np.ndarray, before: int) -> float:
    """Where ``values`` pass zero between ``before`` and the next of ``tokens``, on a line in log(tokens)."""
    if not 0 <= before < len(tokens) - 1:
        return float(tokens[min(max(before, 0), len(tokens) - 1)])
    a, b = values[before], values[before + 1]
    share = a / (a - b) if a != b else 0.5
    return float(tokens[before] * (tokens[before + 1] / tokens[before]) ** share)


def arms(records: Sequence[tuple[int, int, int, float, float]], fewest: int = 2) -> Arms | None:
    """From (seed, retraining tokens, scratch tokens, pruned loss, scratch loss) of every finished pair.

    Every budget rests on the same seeds: of an unfinished study, the largest full table of seeds and budgets; None
    where that has fewer than ``fewest`` budgets.
    """
    found = {(seed, tokens): (beside, pruned, scratch) for seed, tokens, beside, pruned, scratch in records}
    budgets: dict[int, set[int]] = {}
    for seed, tokens in found:
        budgets.setdefault(seed, set()).add(tokens)
    fullest = sorted(budgets, key=lambda seed: -len(budgets[seed]))
    tables = [
        (fullest[:count], set.intersection(*(budgets[s] for s in fullest[:count])))
        for count in range(1, len(fullest) + 1)
    ]
    seeds, shared = max(
        tables, key=lambda table: len(table[0]) * len(table[1]) * (len(table[1]) >= fewest), default=([], set())
    )
    if not shared or len(shared) < fewest:
        return None
    own, common = [seed for seed in budgets if seed in seeds], sorted(shared)
    table = np.array([[found[seed, budget] for budget in common] for seed in own])  # [seeds, budgets, 3]
    beside = tuple(round(value) for value in table[:, :, 0].mean(axis=0))
    return Arms(tuple(common), beside, tuple(own), table[:, :, 1], table[:, :, 2])
