"""Which measurement would settle a question that a ledger leaves open, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_prune.advise.best import LOOKS
from megatron_prune.advise.ledgers import Curve
from megatron_prune.advise.target import Target

FEWEST_SEEDS = LOOKS[0]


def more_seeds(curves: Sequence[Curve], target: Target, have: int, extra: int) -> str:
    """The same comparison under more seeds, up to the next look that is likely to see it."""
    seeds = f"{extra} more seed{'s' * (extra != 1)} of {_names(curves)}, {have + extra} in all"
    return f"{seeds}: {_cost(curves, target, extra)}"


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
