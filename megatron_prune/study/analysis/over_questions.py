"""Differences of accuracies between arms, paired by question: intervals over other seeds and other questions at once.

A difference is a table of seeds by questions: the pruned model's score of a question minus the scratch model's under
the same seed. Seeds and questions are both samples: a seed moves all questions, and a question may suit one arm under
every seed. The mean's variance is that of two crossed factors, ``S + B``:

    A   variance of the seeds' means / seeds, which holds S and E
    B   variance of the questions' means over seeds / questions: what questions contribute, E included
    E   what is left of a question under a seed, once both means are taken out
    S   max(A - E, 0), what seeds contribute beyond E

S has the few degrees of freedom of the seeds and B many, so the interval's half width is ``sqrt(t_S^2 S + t_B^2 B)``,
each part with its own quantile of t (as in MOVER, Zou and Donner 2008). E is in A and in B and has to be taken out of
one of them: ``TAKEN`` of it out of A, the rest out of B. All of it out of A makes intervals too short where seeds
matter (92 to 93%), none too long; from two seeds none is taken out of A, which then says too little.

A suite is the mean of its tasks. Tasks are fixed, so B and E are sums over them, and A is of the seeds' means over all
tasks. One seed has B alone: its interval is over questions, with the models fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, special

from megatron_prune.study.analysis.inference import Difference, effect_of, t_quantile

FEWEST_QUESTIONS = 30  # of a task; with fewer, intervals have less than their nominal coverage
TAKEN = 0.6  # of E out of A, by simulation (tests/benchmarks/task_intervals.py)
MANY = 1e9  # degrees of freedom at which t is normal


def over_questions(tasks: Sequence[np.ndarray]) -> Difference:
    """The mean over tasks of the mean differences [seeds, questions], with a 95% interval and its p value.

    No interval if a task has fewer than ``FEWEST_QUESTIONS``.
    """
    tables = [np.asarray(table, dtype=np.float64) for table in tasks]
    seeds, number = len(tables[0]), len(tables)
    means = np.mean([table.mean(axis=1) for table in tables], axis=0)  # [seeds]
    mean = float(means.mean())
    if min(table.shape[1] for table in tables) < FEWEST_QUESTIONS:
        return Difference(seeds, mean)
    parts, left, squares = [], 0.0, 0.0
    for table in tables:
        questions = table.shape[1]
        own = float(table.mean(axis=0).var(ddof=1)) / questions / number**2
        parts.append(own)
        squares += own**2 / (questions - 1)
        if seeds > 1:
            rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
            left += float((rest**2).sum()) / ((seeds - 1) * (questions - 1)) / (seeds * questions) / number**2
    of_questions = math.fsum(parts)
    of_seeds = float(means.var(ddof=1)) / seeds if seeds > 1 else 0.0
    taken = TAKEN * left if seeds > 2 else 0.0
    between, rest_of = max(of_seeds - taken, 0.0), max(of_questions - (left - taken), 0.0)
    quantile = t_quantile(of_questions**2 / squares) if squares else t_quantile(MANY)
    half = quantile**2 * rest_of
    if seeds > 1:
        half += t_quantile(seeds - 1) ** 2 * between
    half = math.sqrt(max(half, quantile**2 * of_questions))
    error = math.sqrt(max(between + rest_of, of_questions))
    freedom = _freedom(half / error) if error else MANY
    p = 2 * float(special.stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    deviation = float(means.std(ddof=1)) if seeds > 1 else 0.0
    effect = effect_of(mean, deviation, seeds - 1)
    return Difference(seeds, mean, mean - half, mean + half, p, effect, freedom)


def _freedom(quantile: float) -> float:
    """The degrees of freedom of a t distribution with this 97.5% quantile."""
    if quantile <= t_quantile(MANY):
        return MANY
    found = optimize.brentq(lambda log: t_quantile(math.exp(log)) - quantile, math.log(0.5), math.log(MANY))
    return math.exp(found)
