"""Successive halving: many candidates are run on little text, and the better ones on more.

A search first runs all of its candidates on a few calibration windows. A third of them, those with the lowest loss, are
run on three times as many, and so on; the last round reads every window. A round's windows include those of the rounds
before it, which are not read again. So the cost grows with the logarithm of the number of windows, where running every
candidate on all of them would multiply the two. The idea is that of 1502.07943, with nested budgets.

Candidates of a search are run on the same windows, so that what is hard about a text cancels in comparisons. That is
why few windows suffice for the first rounds: ``FEWEST``, since documents differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prune.methods.base import NearTie
from megatron_prune.methods.ranking import lowest_losses

KEPT = 3  # one candidate in three goes on, on three times as much text
FEWEST = 4  # windows of the first round, unless there are fewer
LAST = 4  # candidates of the last round, unless more are retrained


@dataclass(frozen=True)
class Round:
    """``candidates`` are run on the first ``windows`` calibration windows."""

    windows: int
    candidates: int


def schedule(candidates: int, windows: int, last: int = LAST) -> tuple[Round, ...]:
    """The rounds of a search among ``candidates``; the last has at least ``last`` of them, if there are so many."""
    texts, left = [windows], [candidates]
    while left[-1] > last and texts[-1] >= KEPT * FEWEST:
        texts.append(math.ceil(texts[-1] / KEPT))
        left.append(max(last, math.ceil(left[-1] / KEPT)))
    return tuple(map(Round, reversed(texts), left))


def better(losses: Sequence[float], count: int) -> tuple[list[int], list[NearTie]]:
    """Indices of up to ``count`` of the lowest finite losses, ascending, and the near-tie at the cut."""
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        return [], []
    kept, ties = lowest_losses([losses[i] for i in finite], min(count, len(finite)), "survivor")
    return [finite[i] for i in kept], [tie.renumbered(finite) for tie in ties]
