"""Simulated runs of two arms whose laws cross at a known budget, and whether a reported break-even is true."""

from __future__ import annotations

import numpy as np

from megatron_prune.study.analysis.scaling_laws import Arms, BreakEven, Law


def holds(found: BreakEven, truth: float) -> bool:
    """Whether the reported break-even is true: its interval, or that it is beyond or before the data."""
    if found.status == "beyond":
        return truth > found.last
    if found.status == "before":
        return truth < found.first
    return found.status != "reversed" and (found.low or 0) <= truth <= (found.high or np.inf)


def simulate(generator: np.random.Generator, *, inside: bool) -> tuple[Arms, float]:
    """Runs of five to seven budgets and three to five seeds, and where their laws really cross.

    Beyond the data is up to three times the largest budget. Errors are of a run (0.001 to 0.03 nats) and of a seed,
    which both arms and all budgets share.
    """
    while True:
        tokens, scratch, pruned, truth = _laws(generator, inside)
        at = np.geomspace(tokens[0], max(truth * 1.2, tokens[-1]), 80)
        gap = scratch(at) - pruned(at)
        if gap[0] > 0.05 and (np.diff(np.sign(gap)) != 0).sum() == 1:
            break
    seeds, noise = int(generator.integers(3, 6)), 10 ** generator.uniform(-3, -1.5)
    shared = generator.normal(0, 0.5 * noise, (seeds, 1))
    losses = [law(tokens) + shared + generator.normal(0, noise, (seeds, len(tokens))) for law in (pruned, scratch)]
    whole = tuple(round(value) for value in tokens)
    return Arms(whole, whole, tuple(range(seeds)), *losses), truth


def _laws(generator: np.random.Generator, inside: bool) -> tuple[np.ndarray, Law, Law, float]:
    """Budgets, the laws of scratch and pruned, and the budget at which the two are equal."""
    budgets = int(generator.integers(5, 8))
    tokens = np.geomspace(1e9, 1e9 * 2 ** (budgets - 1) * generator.uniform(0.5, 4), budgets)
    share = generator.uniform(0.1, 0.9)
    truth = tokens[0] * (tokens[-1] / tokens[0]) ** share if inside else tokens[-1] * generator.uniform(1.02, 3)
    exponent, own = generator.uniform(0.2, 0.5, 2)
    scratch = Law(generator.uniform(1.5, 2.5), generator.uniform(1, 3) * tokens[0] ** exponent, exponent)
    start = tokens[0] * 10 ** generator.uniform(-0.5, 1.5)
    floor = scratch.floor + generator.uniform(0.02, 0.5) * (float(scratch(truth)) - scratch.floor)
    pruned = Law(floor, (float(scratch(truth)) - floor) * (truth + start) ** own, own, start)
    return tokens, scratch, pruned, float(truth)
