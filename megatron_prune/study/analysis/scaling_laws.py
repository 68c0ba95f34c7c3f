"""Loss as a law of training tokens, and where training from scratch catches up with a pruned start.

Scratch: ``E + A * N**-alpha``, with N its training tokens (Hoffmann et al. 2022, arXiv:2203.15556, at one model size).
Pruned: ``E + A * (N + N0)**-alpha``, with N its retraining tokens and N0 what its start was worth in tokens.

Given alpha and N0 the law is linear in E and A, so only alpha and N0 are searched (variable projection): first on a
grid, since the valley is long and flat, then by SciPy's least squares.

An F test checks whether a law describes the losses: its residuals against the scatter of runs. The runs of a seed share
their data order at every budget, and therefore an offset; an offset common to all budgets is not scatter, and only
moves the floor of the law of the mean. If the floor is 0, p is below 0.01 for 2% of true laws instead of 1%.

The break-even is the retraining budget at which scratch catches up. The gap, scratch minus pruned, is followed over the
budgets of one comparison, separately per seed: by the laws of both arms if there are at least five budgets and the laws
describe the losses, otherwise only at the measured budgets. The break-even's interval is the set of budgets at which a
t interval over seeds contains zero. So a break-even beyond the data is placed inside only if the gap at the largest
budget is below zero by its own interval, and effects common to a seed's runs are accounted for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from megatron_prune.study.analysis import inference

FEWEST_BUDGETS = 5
EXPONENTS = (0.02, 3.0)
STARTS = (1e-2, 1e3)  # N0, as multiples of the smallest and of the largest number of tokens
GRID = 400  # points between the smallest and largest budget at which the gap is evaluated
Status = Literal["inside", "open", "beyond", "before", "reversed"]
POOR = 0.01  # p of the test of lack of fit below which a law is not used


@dataclass(frozen=True)
class Law:
    """``floor + scale * (tokens + start)**-exponent``, in nats."""

    floor: float
    scale: float
    exponent: float
    start: float = 0.0  # N0; 0 for scratch

    def __call__(self, tokens: np.ndarray | float) -> np.ndarray:
        return self.floor + self.scale * (np.asarray(tokens, dtype=np.float64) + self.start) ** -self.exponent

    @property
    def at_bound(self) -> bool:
        """Whether the exponent is at a bound of the search, that is, not determined by these losses."""
        return not 1.01 * EXPONENTS[0] < self.exponent < 0.99 * EXPONENTS[1]

    @property
    def words(self) -> str:
        inside = f"(N + {self.start:.3g})" if self.start else "N"
        undetermined = " (exponent not determined)" * self.at_bound
        return f"{self.floor:.3f} + {self.scale:.3g} {inside}^-{self.exponent:.3f}{undetermined}"


@dataclass(frozen=True)
class Fit:
    """A law of the mean over seeds, its error, and the test whether it describes the losses."""

    law: Law
    rms: float  # nats between the law and the means at the budgets
    lack_of_fit: float | None  # p of the F test against the scatter of runs; None for one seed

    @property
    def good(self) -> bool:
        return self.lack_of_fit is None or self.lack_of_fit >= POOR


def fit(tokens: Sequence[float], losses: np.ndarray, *, pruned: bool) -> Fit | None:
    """The law of one arm; ``losses`` [seeds, budgets]. None for fewer than ``FEWEST_BUDGETS`` budgets."""
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    seeds, budgets = losses.shape
    if budgets < FEWEST_BUDGETS:
        return None
    found = law(tokens, losses.mean(axis=0), pruned=pruned)
    residuals = losses.mean(axis=0) - found(np.asarray(tokens))
    p = None
    if seeds > 1:
        free = budgets - (4 if pruned else 3)
        # Residuals after removing the means of seeds and budgets: errors of single runs.
        errors = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
        own = (budgets - 1) * (seeds - 1)
        scatter, lack = float((errors**2).sum()) / own, seeds * float(residuals @ residuals) / free
        p = float(stats.f.sf(lack / scatter, free, own)) if scatter > 1e-20 else float(lack < 1e-12)
    return Fit(found, float(np.sqrt(np.mean(residuals**2))), p)


def law(budgets: Sequence[float], losses: np.ndarray, *, pruned: bool) -> Law:
    """The least-squares law for ``losses`` at ``budgets``, with E, A and N0 not negative."""
    tokens = np.asarray(budgets, dtype=np.float64)
    losses = np.asarray(losses, dtype=np.float64)
    points, bases = _grid(tuple(tokens.tolist()), pruned)
    centred = bases - bases.mean(axis=1, keepdims=True)
    # The squared error of the best E and A at every grid point; a falling law cannot explain rising losses.
    explained = np.maximum(centred @ losses, 0.0) ** 2 / (centred**2).sum(axis=1)
    begin = points[int(np.argmax(explained))]
    low, high = np.log(_bounds(tokens, pruned))

    def residuals(logs: np.ndarray) -> np.ndarray:
        basis = _basis(tokens, *np.exp(logs))
        floor, scale = _floor_and_scale(basis, losses)
        left: np.ndarray = floor + scale * basis - losses
        return left

    found = optimize.least_squares(
        residuals, np.clip(np.log(begin), low + 1e-9, high - 1e-9), bounds=(low, high), xtol=1e-10, ftol=1e-10,
        max_nfev=60,
    ).x  # fmt: skip
    exponent, *start = np.exp(found)
    floor, scale = _floor_and_scale(_basis(tokens, exponent, *start), losses)
    start_tokens = float(start[0]) if start else 0.0
    return Law(floor, scale * (tokens[0] + start_tokens) ** exponent, float(exponent), start_tokens)


def _basis(tokens: np.ndarray, exponent: float, start: float = 0.0) -> np.ndarray:
    """(N + N0)**-alpha, 1 at the first budget."""
    terms: np.ndarray = ((tokens + start) / (tokens[0] + start)) ** -exponent
    return terms


def _floor_and_scale(basis: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """Least squares with both not negative."""
    centred = basis - basis.mean()
    scale = float(centred @ losses) / max(float(centred @ centred), 1e-300)
    floor = float(losses.mean() - scale * basis.mean())
    if scale < 0:
        return float(losses.mean()), 0.0
    if floor < 0:
        return 0.0, float(basis @ losses) / float(basis @ basis)
    return floor, scale


def _bounds(tokens: np.ndarray, pruned: bool) -> tuple[list[float], list[float]]:
    """Bounds of alpha, and of N0 for a pruned model."""
    low, high = [EXPONENTS[0]], [EXPONENTS[1]]
    return (low + [STARTS[0] * tokens[0]], high + [STARTS[1] * tokens[-1]]) if pruned else (low, high)


@functools.cache
def _grid(tokens: tuple[float, ...], pruned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points of the search [points, 1 or 2], evenly spaced in their logarithms, and the basis at each [points, B]."""
    values = np.array(tokens)
    axes = [np.geomspace(low, high, 40) for low, high in zip(*_bounds(values, pruned), strict=True)]
    points = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    return points, np.array([_basis(values, *point) for point in points])


@dataclass(frozen=True)
class Arms:
    """The runs of one comparison at all its budgets, lowest first, over the seeds that have all of them."""

    tokens: tuple[int, ...]  # of retraining
    scratch_tokens: tuple[int, ...]  # of the matching scratch runs
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
        """The break-even as a sentence without its subject."""
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
    pruned = fit(arms.tokens, arms.pruned, pruned=True)
    scratch = fit(arms.scratch_tokens, arms.scratch, pruned=False)
    if pruned and scratch and pruned.good and scratch.good:
        return _between(arms, *_by_laws(arms), by="laws"), pruned, scratch
    return _between(arms, np.array(arms.tokens, float), arms.scratch - arms.pruned, by="budgets"), pruned, scratch


def gaps(arms: Arms, tokens: np.ndarray) -> np.ndarray:
    """Scratch minus pruned by each seed's laws [seeds, tokens], at retraining budgets within the data."""
    beside = np.interp(tokens, arms.tokens, arms.scratch_tokens)
    return np.array(
        [
            law(arms.scratch_tokens, scratch, pruned=False)(beside) - law(arms.tokens, pruned, pruned=True)(tokens)
            for pruned, scratch in zip(arms.pruned, arms.scratch, strict=True)
        ]
    )


def _by_laws(arms: Arms) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.geomspace(arms.tokens[0], arms.tokens[-1], GRID)
    return tokens, gaps(arms, tokens)


def _between(arms: Arms, tokens: np.ndarray, gap: np.ndarray, *, by: Literal["laws", "budgets"]) -> BreakEven:
    """The break-even from the gap [seeds, tokens] at increasing budgets."""
    seeds, mean = len(gap), gap.mean(axis=0)
    reach = np.zeros_like(mean)
    if seeds > 1:
        reach = inference.t_quantile(seeds - 1) * gap.std(axis=0, ddof=1) / np.sqrt(seeds)
    ahead, behind = mean - reach > 0, mean + reach < 0  # pruned, by its interval

    def found(status: Status, **ends: float | None) -> BreakEven:
        return BreakEven(status, by, seeds, arms.tokens[0], arms.tokens[-1], **ends)

    if behind[0]:
        return found("reversed" if ahead[-1] else "before")
    if ahead.all():
        return found("beyond")
    begins, ends = ahead[0], behind[-1]
    # The last budget up to which pruned is always ahead, and the first from which scratch always is.
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
    """Where ``values`` cross zero after index ``before``, by linear interpolation in log(tokens)."""
    if not 0 <= before < len(tokens) - 1:
        return float(tokens[min(max(before, 0), len(tokens) - 1)])
    a, b = values[before], values[before + 1]
    share = a / (a - b) if a != b else 0.5
    return float(tokens[before] * (tokens[before + 1] / tokens[before]) ** share)


def arms(records: Sequence[tuple[int, int, int, float, float]], fewest: int = 2) -> Arms | None:
    """From (seed, retraining tokens, scratch tokens, pruned loss, scratch loss) of every finished pair.

    All budgets have the same seeds: for an unfinished study, the largest complete table of seeds and budgets; None if
    that has fewer than ``fewest`` budgets.
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
