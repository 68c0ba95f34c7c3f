"""Which measurement would settle a question that a ledger leaves open, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from megatron_prune.advise.ledgers import Curve
from megatron_prune.advise.target import Target
from megatron_prune.study.statistics import CONFIDENCE

FEWEST_SEEDS = 3
MOST_SEEDS = 50


def seeds_needed(differences: np.ndarray, picked_from: int) -> int | None:
    """Seeds after which p, times the arms that the best was picked from, would be below 0.05 if means and scatter stay.

    None where that takes more than ``MOST_SEEDS``.
    """
    mean, deviation = abs(float(differences.mean())), float(differences.std(ddof=1))
    for seeds in range(max(FEWEST_SEEDS, len(differences) + 1), MOST_SEEDS + 1):
        p = 2 * float(special.stdtr(seeds - 1, -mean * math.sqrt(seeds) / deviation)) if deviation else 0.0
        if p * picked_from < 1 - CONFIDENCE:
            return seeds
    return None


def more_seeds(curves: Sequence[Curve], target: Target, have: int, need: int) -> str:
    """The same comparison under more seeds."""
    extra = need - have
    return f"about {extra} more seed{'s' * (extra != 1)} of {_names(curves)}: {_cost(curves, target, extra)}"


def new_runs(curves: Sequence[Curve], target: Target, what: str) -> str:
    """Both arms where the ledger has nothing: at a budget or a ratio."""
    return f"both arms {what}, {FEWEST_SEEDS} seeds, {_names(curves)}: {_cost(curves, target, FEWEST_SEEDS)}"


def own_study(target: Target) -> str:
    """A study of one's own."""
    tokens = f"{target.tokens:,.0f}" if target.tokens is not None else "the tokens that the GPU-hours pay"
    kind = f" {target.pattern}" if target.pattern else ""
    return (
        f"a study: `study run` with that parent's checkpoint as parent.load, {100 * target.ratio:.3g}%{kind} "
        f"removed, budgets up to {tokens} (five of them for a break-even), seeds [1, 2, 3], settings [{target.setting}]"
    )


def _names(curves: Sequence[Curve]) -> str:
    return ", ".join(dict.fromkeys(curve.method for curve in curves))


def _cost(curves: Sequence[Curve], target: Target, seeds: int) -> str:
    """Of a pruned and a scratch run for every method and seed."""
    budgets = [(target.budget(curve.flops_per_token), curve) for curve in curves]
    extra = [np.mean(np.subtract(curve.arms.scratch_tokens, curve.arms.tokens)) for curve in curves]
    tokens = sum(seeds * (2 * budget + more) for (budget, _), more in zip(budgets, extra, strict=True))
    flops = sum(
        seeds * (2 * budget + more) * curve.flops_per_token
        for (budget, curve), more in zip(budgets, extra, strict=True)
    )
    return f"{2 * seeds * len(curves)} runs at most, {tokens:,.0f} tokens, {flops:.2e} FLOPs"
