"""Whether the best pruned arm is below the best scratch arm (or the reverse), valid under repeated looks.

*Pruning wins* requires one pruned arm below every scratch arm: an intersection-union test (Berger 1982), whose p is the
largest over the rivals, without correction for their number. That arm was picked as the lowest of K, so p is multiplied
by K (Bonferroni).

*Scatter.* A loss is a mean of its arm, an effect of its seed on everything, one of the seed on its side, and an error
of the run, whose variance a side's arms share. A difference between the sides then has the variance of the sides' mean
difference over seeds, and what the mean over K and J arms has taken from the errors: ``var(d) + (1 - 1/K) MSE(pruned) +
(1 - 1/J) MSE(scratch)``, with degrees of freedom by Satterthwaite (1946). With one arm per side it is the paired t
test. If the two arms' own variance is larger, it is used instead, so that a noisy arm does not borrow precision.

*Looks.* A user who is told to train more seeds asks again. Each look spends a part of the 5%: half of it at 3 seeds,
half of the rest at 6, 12, 24 and 48 (alpha spending by Bonferroni's inequality, valid for dependent looks). Seeds
beyond the last look are used at the next one.
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
    """The best arms at one look, by index among the given arms.

    ``gap``: scratch minus pruned of these two, with an interval at this look's level for an arm picked from
    ``picked_from``. ``p``: two-sided, corrected for picking and for all looks. ``as_good``: arms of the winner's side
    that may also be the best.
    """

    look: int  # 1 for the first
    pruned: int
    scratch: int
    gap: Difference
    picked_from: int
    p: float
    as_good: tuple[int, ...]
    more_seeds: int | None  # up to the first look that would detect such a gap with 80% power

    @property
    def prunes(self) -> bool:
        return self.gap.mean > 0

    @property
    def sure(self) -> bool:
        return self.p < 1 - CONFIDENCE


def look(seeds: int) -> int | None:
    """The latest look that this number of seeds allows, counted from 1; None before the first."""
    return sum(seeds >= enough for enough in LOOKS) or None


def level(number: int, picked_from: int) -> float:
    """The level of look ``number`` for one arm and one direction."""
    return (1 - CONFIDENCE) * 0.5**number / 2 / picked_from


def compare(pruned: np.ndarray, scratch: np.ndarray) -> Best:
    """``pruned`` and ``scratch``: losses [arms, seeds] of the same seeds, at least as many as the first look needs."""
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
    """The variance of one seed's difference between a scratch and a pruned arm, and the degrees of freedom."""
    seeds = pruned.shape[1]
    parts = [(float((scratch.mean(axis=0) - pruned.mean(axis=0)).var(ddof=1)), seeds - 1)]
    parts += [((1 - 1 / len(side)) * _error(side), (len(side) - 1) * (seeds - 1)) for side in (pruned, scratch)]
    variance = sum(part for part, _ in parts)
    doubt = sum(part * part / freedom for part, freedom in parts if freedom)
    return variance, variance * variance / doubt if doubt else seeds - 1


def _error(side: np.ndarray) -> float:
    """Mean square error of runs: the residual after removing the means of arms and seeds."""
    arms, seeds = side.shape
    if arms == 1:
        return 0.0
    left = side - side.mean(axis=0) - side.mean(axis=1, keepdims=True) + side.mean()
    return float((left**2).sum() / ((arms - 1) * (seeds - 1)))


def _as_good(own: np.ndarray, first: int, spent: float) -> tuple[int, ...]:
    """Arms close enough to the first that they may be the best (subset selection, Gupta 1965)."""
    arms, seeds = own.shape
    if arms == 1:
        return ()
    critical = float(special.stdtrit((arms - 1) * (seeds - 1), 1 - spent / (arms - 1)))
    reach = critical * np.sqrt(2 * _error(own) / seeds)
    above = own.mean(axis=1) - own[first].mean()
    return tuple(int(arm) for arm in np.flatnonzero(above <= reach) if arm != first)


def _more_seeds(gap: float, deviation: float, freedom: float, have: int, picked_from: int) -> int | None:
    """``deviation``: of one seed's difference; ``freedom``: degrees of freedom per seed."""
    for number, seeds in enumerate(LOOKS, start=1):
        if seeds <= have:
            continue
        own = freedom * (seeds - 1)
        critical = float(special.stdtrit(own, 1 - level(number, picked_from)))
        if not deviation or special.nctdtr(own, gap / deviation * np.sqrt(seeds), critical) <= 1 - POWER:
            return seeds - have
    return None


# Measurements that would settle an open question, and their cost.


FEWEST_SEEDS = LOOKS[0]


def more_seeds(curves: Sequence[Curve], target: AdvisedTarget, have: int, extra: int) -> str:
    """The same comparison with more seeds, up to the next look that is likely to detect it."""
    seeds = f"{extra} more seed{'s' * (extra != 1)} of {_names(curves)}, {have + extra} in all"
    return f"{seeds}: {_cost(curves, target, extra)}"


def new_runs(curves: Sequence[Curve], target: AdvisedTarget, what: str) -> str:
    """Both arms at a budget or ratio that the ledger lacks."""
    return f"both arms {what}, {FEWEST_SEEDS} seeds, {_names(curves)}: {_cost(curves, target, FEWEST_SEEDS)}"


def own_study(target: AdvisedTarget) -> str:
    """A new study."""
    tokens = f"{target.tokens:,.0f}" if target.tokens is not None else "the tokens that the GPU-hours pay"
    kind = f" {target.pattern}" if target.pattern else ""
    return (
        f"a study: `study run` with that parent (parent.load or parent.import_hf), {100 * target.ratio:.3g}%{kind} "
        f"removed, budgets up to {tokens} (five of them for a break-even), seeds [1, 2, 3], settings [{target.setting}]"
    )


def _names(curves: Sequence[Curve]) -> str:
    return ", ".join(dict.fromkeys(curve.method for curve in curves))


def _cost(curves: Sequence[Curve], target: AdvisedTarget, seeds: int) -> str:
    """The cost of a pruned and a scratch run for every method and seed, and of learning masks."""
    budgets = [(curve.budget(target), curve) for curve in curves]
    extra = [np.mean(np.subtract(curve.arms.scratch_tokens, curve.arms.tokens)) for curve in curves]
    tokens = sum(
        seeds * (2 * budget + more + curve.learned) for (budget, curve), more in zip(budgets, extra, strict=True)
    )
    flops = sum(
        seeds * ((2 * budget + more) * curve.flops_per_token + curve.learned_flops)
        for (budget, curve), more in zip(budgets, extra, strict=True)
    )
    return f"{2 * seeds * len(curves)} runs at most, {tokens:,.0f} tokens, {flops:.2e} FLOPs"
