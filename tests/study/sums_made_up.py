"""Simulated answers to questions between comparisons, from the simulated studies of ``families``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_prune.study.analysis import contrasts, inference
from megatron_prune.study.analysis.contrasts import Weighted
from megatron_prune.study.analysis.inference import Difference
from tests.study.families import Study

Weights = Mapping[tuple[int, int], float]  # of (method, budget), in the first setting
TREND = (np.arange(5) - 2.0) / 10  # least squares over five budgets, per step
QUESTIONS: dict[str, Weights] = {
    "one method against another": {(0, 4): 1.0, (1, 4): -1.0},
    "two methods against a third": {(0, 4): 0.5, (1, 4): 0.5, (2, 4): -1.0},
    "trend of one method": {(0, budget): float(weight) for budget, weight in enumerate(TREND)},
    "trend of three methods": {
        (method, budget): float(weight) / 3 for method in range(3) for budget, weight in enumerate(TREND)
    },
    "one gap": {(0, 4): 1.0},
}


def answers(study: Study, generator: np.random.Generator, gap: float) -> dict[str, tuple[Difference, float]]:
    """To every question its estimate and the truth; the first method's gap at budget b is ``gap * b / 4``."""
    made = study.comparisons(generator)
    scatters = inference.shared(made)
    found = {}
    for name, weights in QUESTIONS.items():
        weighted, values, truth = [], np.zeros(study.seeds), 0.0
        for (method, budget), weight in weights.items():
            place = (method * study.budgets + budget) * 2
            one = made[place]
            own = gap * budget / (study.budgets - 1) * (method == 0)
            values += weight * (one.differences + own)
            truth += weight * own
            weighted.append(Weighted(weight, {0: (str(one.pruned), str(one.scratch))}, scatters[place]))
        found[name] = inference.paired(np.zeros(study.seeds), values, contrasts.shared(weighted, 0)), truth
    return found
