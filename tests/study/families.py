"""Simulated studies of many comparisons: their paired differences, tested as in ``conclusions``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_prune.study.analysis import inference
from megatron_prune.study.analysis.inference import Paired


@dataclass(frozen=True)
class Study:
    """``methods`` x ``budgets`` x two settings; runs are normal with deviation sqrt(1/2), so that differences have 1.

    ``dense``: all methods share their scratch runs. ``seed``: deviation of the effect of a seed on all scratch runs.
    ``spread``: that of the logarithm of comparisons' deviations; ``settings``: factor of the second setting's scatter.
    ``real``: how many comparisons, the first ones, have a true gap, of ``gap`` deviations of a paired difference.
    """

    methods: int = 3
    budgets: int = 5
    seeds: int = 3
    dense: bool = False
    seed: float = 0.0
    spread: float = 0.0
    settings: float = 1.0
    real: int = 0
    gap: float = 5.0

    def comparisons(self, generator: np.random.Generator) -> list[Paired]:
        def run() -> np.ndarray:
            return generator.normal(0, np.sqrt(0.5), self.seeds)

        common, scratch = generator.normal(0, self.seed or 1e-12, self.seeds), {}
        found: list[Paired] = []
        for method in range(self.methods):
            for budget in range(self.budgets):
                pruned = run()
                for setting in range(2):
                    scale = np.exp(generator.normal(0, self.spread)) * self.settings**setting
                    beside = ("dense" if self.dense else method, budget, setting)
                    scratch.setdefault(beside, run())
                    errors = scale * (scratch[beside] + common - pruned)
                    gap = self.gap * scale * np.hypot(1, self.seed) * (len(found) < self.real)
                    found.append(Paired(setting, tuple(range(self.seeds)), (method, budget), beside, errors + gap))
        return found


def told_apart(comparisons: list[Paired], *, pool: bool = True) -> np.ndarray:
    """The comparisons whose p stays below 0.05 after Holm's correction; ``pool`` False: without pooling."""
    shared = inference.shared(comparisons) if pool else [None] * len(comparisons)
    found = [
        inference.paired(np.zeros(len(one.seeds)).tolist(), one.differences.tolist(), scatter)
        for one, scatter in zip(comparisons, shared, strict=True)
    ]
    return np.array(inference.holm([one.p or 0.0 for one in found])) < 1 - inference.CONFIDENCE
