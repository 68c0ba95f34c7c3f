"""Simulated users who ask ``advise``, train as many seeds as it says, and ask again, until it answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_prune.study.advise import answer
from megatron_prune.study.advise.answer import Advice
from megatron_prune.study.advise.best import LOOKS
from megatron_prune.study.advise.ledgers import Curve, Measurements
from megatron_prune.study.advise.question import AdvisedTarget
from megatron_prune.study.analysis.scaling_laws import Arms

BUDGET = 1_000_000
Losses = tuple[np.ndarray, np.ndarray]  # of pruned and scratch arms [arms, seeds]


@dataclass(frozen=True)
class Truth:
    """Arms whose losses are normal. ``gaps`` and ``rivals``: true losses of pruned and scratch arms.

    ``seed`` is the deviation of a seed's effect on its side, ``noise`` of a run, ``loud`` of runs of the first arm of
    either side.
    """

    pruned: tuple[float, ...]
    scratch: tuple[float, ...]
    noise: float = 1.0
    seed: float = 0.0
    loud: float | None = None

    def losses(self, generator: np.random.Generator, seeds: int = LOOKS[-1]) -> Losses:
        shared = generator.normal(0, 2, seeds)

        def side(means: tuple[float, ...]) -> np.ndarray:
            errors = generator.normal(0, self.noise, (len(means), seeds))
            if self.loud is not None:
                errors[0] *= self.loud / self.noise
            return np.array(means)[:, None] + shared + generator.normal(0, self.seed or 1e-12, seeds) + errors

        return side(self.pruned), side(self.scratch)

    def wrong(self, said: str) -> bool:
        """Whether an answer is false: no arm of that side is below all arms of the other."""
        best, rival = min(self.pruned), min(self.scratch)
        return (said == "prune" and best >= rival) or (said == "scratch" and rival >= best)


def ledger(pruned: np.ndarray, scratch: np.ndarray) -> Measurements:
    """A ledger of one budget, with a scratch arm for the shape of every method."""
    curves = []
    for number in range(max(len(pruned), len(scratch))):
        own, beside = pruned[min(number, len(pruned) - 1)], scratch[min(number, len(scratch) - 1)]
        arms = Arms((BUDGET,), (BUDGET,), tuple(range(len(own))), own[:, None], beside[:, None])
        curves.append(
            Curve(
                method=f"m{number}",
                pattern=None,
                ratio=0.5,
                setting="equal-training",
                against="dense",
                sparse=False,
                arms=arms,
                removed_linears=0.5,
                removed_all=0.5,
                shape=f"L{number}",
                flops_per_token=1.0,
            )  # fmt: skip
        )
    return Measurements("made-up", 1_000_000, 5_000_000, True, tuple(curves))


def ask(losses: Losses, seeds: int) -> Advice:
    pruned, scratch = (side[:, :seeds] for side in losses)
    return answer.advise(ledger(pruned, scratch), AdvisedTarget(0.5, "linears", "equal-training", tokens=BUDGET))


def follow(losses: Losses, begin: int = LOOKS[0], asked: Callable[[Losses, int], Advice] = ask) -> tuple[str, int]:
    """The final answer and its number of seeds, if more are trained whenever the advice says so."""
    seeds = begin
    while True:
        advice = asked(losses, seeds)
        more = re.match(r"(\d+) more seed", advice.settle[0]) if advice.settle else None
        if advice.answer != answer.UNKNOWN or more is None:
            return advice.answer, seeds
        seeds += int(more[1])


def insist(losses: Losses) -> str:
    """The answer for a user who asks at every look until there is one."""
    said = (ask(losses, seeds).answer for seeds in LOOKS)
    return next((word for word in said if word != answer.UNKNOWN), answer.UNKNOWN)
