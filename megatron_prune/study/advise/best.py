"""Whether the best pruned arm is below the best scratch arm (or the reverse), however often that is asked.

*Pruning wins* is false where, for some scratch arm, no pruned arm is below it. So one pruned arm must be below every
scratch arm: an intersection-union test (Berger 1982), whose p is the largest over the rivals without any correction
for their number. That arm was picked from K as the lowest, for which p counts K times (Bonferroni); nothing else is
corrected for.

*Scatter.* A loss is a mean of its arm, an effect of its seed on everything, one of the seed on its side, and an error
of the run, whose variance a side's arms share. A difference between the sides then has the variance of the sides' mean
difference over seeds, and what the mean over K and J arms has taken from the errors: ``var(d) + (1 - 1/K) MSE(pruned) +
(1 - 1/J) MSE(scratch)``, with degrees of freedom by Satterthwaite (1946). With one arm a side it is the paired t test.
Where the two arms at hand scatter more than that, their own variance stands in its place: an arm that is noisier than
its neighbours is not judged by theirs.

*Looks.* Whoever is told that seeds are missing trains them and asks again. Each look spends a part of the 5%: half of
it at 3 seeds, half of the rest at 6, at 12, at 24, at 48 (alpha spending by Bonferroni's inequality, which holds
whatever the looks have in common). Seeds beyond the last look wait for the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from megatron_prune.study.advise.ledgers import Curve
from megatron_prune.study.advise.question import AdvisedTarget
from megatron_prune.study.analysis.inference import CONFIDENCE, Difference

LOOKS = (3, 6, 12, 24, 48)  # seeds
POWER = 0.8


@dataclass(frozen=True)
class Best:
    """The best arms at one look, by their place among the arms given.

    ``gap``: scratch minus pruned of these two; its interval is cut to what this look may spend, for an arm picked from
    ``picked_from``. ``p``: two-sided, for the answer of that sign, corrected for the picking and for all looks.
    ``as_good``: arms of the winner's side that may be the best one.
    """

    look: int  # 1 for the first
    pruned: int
    scratch: int
    gap: Difference
    picked_from: int
    p: float
    as_good: tuple[int, ...]
    more_seeds: int | None  # to the first look that would find a gap as large in four cases of five

    @property
    def prunes(self) -> bool:
        return self.gap.mean > 0

    @property
    def sure(self) -> bool:
        return self.p < 1 - CONFIDENCE


def look(seeds: int) -> int | None:
    """Which look so many seeds are enough for, 1 for the first; None before it."""
    return sum(seeds >= enough for enough in LOOKS) or None


def level(number: int, picked_from: int) -> float:
    """What look ``number`` may spend on one arm and one direction."""
    return (1 - CONFIDENCE) * 0.5**number / 2 / picked_from


def compare(pruned: np.ndarray, scratch: np.ndarray) -> Best:
    """``pruned`` and ``scratch``: losses [arms, seeds] of the same seeds, as many as a look asks for or more."""
    number = look(pruned.shape[1])
    assert number is not None
    have, seeds = pruned.shape[1], LOOKS[number - 1]
    pruned, scratch = pruned[:, :seeds], scratch[:, :seeds]
    best, rival = (int(np.argmin(side.mean(axis=1))) for side in (pruned, scratch))
    mean = float(scratch[rival].mean() - pruned[best].mean())
    own, others = (pruned, scratch) if mean > 0 else (scratch, pruned)
    first = own[best if mean > 0 else rival]
    variance, freedom = scatter(pruned, scratch)
    against = others - first
    errors = np.sqrt(np.maximum(variance, against.var(axis=1, ddof=1)) / seeds)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num(against.mean(axis=1) / errors, nan=0.0, posinf=np.inf)
    p = 2 * float(special.stdtr(freedom, -t).max()) * len(own) * 2**number
    error = float(errors[rival if mean > 0 else best])
    reach = float(special.stdtrit(freedom, 1 - level(number, len(own)))) * error
    return Best(
        look=number,
        pruned=best,
        scratch=rival,
        gap=Difference(seeds, mean, mean - reach, mean + reach, freedom=freedom),
        picked_from=len(own),
        p=min(1.0, p),
        as_good=_as_good(own, best if mean > 0 else rival, level(number, 1)),
        more_seeds=_more_seeds(abs(mean), error * np.sqrt(seeds), freedom / (seeds - 1), have, len(own)),
    )


def scatter(pruned: np.ndarray, scratch: np.ndarray) -> tuple[float, float]:
    """The variance of one seed's difference between a scratch and a pruned arm, and its degrees of freedom."""
    seeds = pruned.shape[1]
    parts = [(float((scratch.mean(axis=0) - pruned.mean(axis=0)).var(ddof=1)), seeds - 1)]
    parts += [((1 - 1 / len(side)) * _error(side), (len(side) - 1) * (seeds - 1)) for side in (pruned, scratch)]
    variance = sum(part for part, _ in parts)
    doubt = sum(part * part / freedom for part, freedom in parts if freedom)
    return variance, variance * variance / doubt if doubt else seeds - 1


def _error(side: np.ndarray) -> float:
    """Mean square of the errors of runs: what is left without the means of arms and seeds."""
    arms, seeds = side.shape
    if arms == 1:
        return 0.0
    left = side - side.mean(axis=0) - side.mean(axis=1, keepdims=True) + side.mean()
    return float((left**2).sum() / ((arms - 1) * (seeds - 1)))


def _as_good(own: np.ndarray, first: int, spent: float) -> tuple[int, ...]:
    """Arms that are not above the first by so much that they cannot be the best (subset selection, Gupta 1965)."""
    arms, seeds = own.shape
    if arms == 1:
        return ()
    critical = float(special.stdtrit((arms - 1) * (seeds - 1), 1 - spent / (arms - 1)))
    reach = critical * np.sqrt(2 * _error(own) / seeds)
    above = own.mean(axis=1) - own[first].mean()
    return tuple(int(arm) for arm in np.flatnonzero(above <= reach) if arm != first)


def _more_seeds(gap: float, deviation: float, freedom: float, have: int, picked_from: int) -> int | None:
    """``deviation``: of one seed's difference; ``freedom``: degrees a seed."""
    for number, seeds in enumerate(LOOKS, start=1):
        if seeds <= have:
            continue
        own = freedom * (seeds - 1)
        critical = float(special.stdtrit(own, 1 - level(number, picked_from)))
        if not deviation or special.nctdtr(own, gap / deviation * np.sqrt(seeds), critical) <= 1 - POWER:
            return seeds - have
    return None


# Which measurement would settle a question that a ledger leaves open, and what it costs.


FEWEST_SEEDS = LOOKS[0]


def more_seeds(curves: Sequence[Curve], target: AdvisedTarget, have: int, extra: int) -> str:
    """The same comparison under more seeds, up to the next look that is likely to see it."""
    seeds = f"{extra} more seed{'s' * (extra != 1)} of {_names(curves)}, {have + extra} in all"
    return f"{seeds}: {_cost(curves, target, extra)}"


def new_runs(curves: Sequence[Curve], target: AdvisedTarget, what: str) -> str:
    """Both arms where the ledger has nothing: at a budget or a ratio."""
    return f"both arms {what}, {FEWEST_SEEDS} seeds, {_names(curves)}: {_cost(curves, target, FEWEST_SEEDS)}"


def own_study(target: AdvisedTarget) -> str:
    """A study of one's own."""
    tokens = f"{target.tokens:,.0f}" if target.tokens is not None else "the tokens that the GPU-hours pay"
    kind = f" {target.pattern}" if target.pattern else ""
    return (
        f"a study: `study run` with that parent's checkpoint as parent.load, {100 * target.ratio:.3g}%{kind} "
        f"removed, budgets up to {tokens} (five of them for a break-even), seeds [1, 2, 3], settings [{target.setting}]"
    )


def _names(curves: Sequence[Curve]) -> str:
    return ", ".join(dict.fromkeys(curve.method for curve in curves))


def _cost(curves: Sequence[Curve], target: AdvisedTarget, seeds: int) -> str:
    """Of a pruned and a scratch run for every method and seed."""
    budgets = [(target.budget(curve.flops_per_token), curve) for curve in curves]
    extra = [np.mean(np.subtract(curve.arms.scratch_tokens, curve.arms.tokens)) for curve in curves]
    tokens = sum(seeds * (2 * budget + more) for (budget, _), more in zip(budgets, extra, strict=True))
    flops = sum(
        seeds * (2 * budget + more) * curve.flops_per_token
        for (budget, curve), more in zip(budgets, extra, strict=True)
    )
    return f"{2 * seeds * len(curves)} runs at most, {tokens:,.0f} tokens, {flops:.2e} FLOPs"
