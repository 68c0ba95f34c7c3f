"""Differences between paired runs: t intervals over seeds, Holm's correction, and a bootstrap over documents.

Two questions are kept apart. *Other seeds*: a t interval over paired differences, a seed each; what stays the
same over the seeds, the parent above all, is not in it. *Other text*: a bootstrap over evaluation documents, the
models fixed; it says nothing of other seeds. Neither stands in for the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
RESAMPLES = 2000
FEWEST_DOCUMENTS = 10  # below it resampling them says little


@dataclass(frozen=True)
class Difference:
    """Scratch minus pruned in nats, so that positive says that pruning won. One seed has a mean alone.

    ``effect``: the mean in standard deviations over seeds, times Hedges' correction for few of them (1981, eq. 6e);
    from three seeds on, where they differ.
    """

    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided
    effect: float | None = None
    freedom: float = 0  # degrees of, of the variance that the interval rests on

    @property
    def winner(self) -> str:
        """``pruned`` or ``scratch``; ``neither`` where the interval holds 0 (or the two are equal)."""
        low = self.mean if self.low is None else self.low
        high = self.mean if self.high is None else self.high
        return "pruned" if low > 0 else "scratch" if high < 0 else "neither"


@dataclass(frozen=True)
class OverDocuments:
    """A 95% interval of the same difference, had other documents been drawn and the models been the same."""

    documents: int
    low: float
    high: float


def paired(pruned: Sequence[float], scratch: Sequence[float]) -> Difference:
    """The paired difference over seeds, with a two-sided 95% t interval from two seeds on."""
    differences = np.subtract(scratch, pruned, dtype=np.float64)
    seeds, mean = len(differences), float(differences.mean())
    if seeds == 1:
        return Difference(1, mean)
    freedom, deviation = seeds - 1, float(differences.std(ddof=1))
    error = deviation / math.sqrt(seeds)
    reach = t_quantile(freedom) * error
    p = 2 * float(special.stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    return Difference(seeds, mean, mean - reach, mean + reach, p, _effect(mean, deviation, freedom), freedom)


def _effect(mean: float, deviation: float, freedom: int) -> float | None:
    if freedom < 2 or not deviation:
        return None
    correction = math.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return correction * mean / deviation


def t_quantile(freedom: int) -> float:
    """How many standard errors a two-sided 95% interval reaches to either side."""
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for being one family (Holm 1979), in the order given."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order])
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def over_documents(pruned: np.ndarray, scratch: np.ndarray, documents: np.ndarray) -> OverDocuments | None:
    """Bootstrap (BCa, Efron 1987) of scratch minus pruned over evaluation documents.

    ``pruned`` and ``scratch``: losses [seeds, windows]; ``documents`` [windows] names the document of each window,
    and a document's windows are drawn together. None for fewer than ``FEWEST_DOCUMENTS``, or equal models.
    """
    differences = (np.asarray(scratch) - np.asarray(pruned)).mean(axis=0)
    names, own = np.unique(documents, return_inverse=True)
    if len(names) < FEWEST_DOCUMENTS or np.ptp(differences) == 0:
        return None
    sums, windows = np.bincount(own, differences), np.bincount(own).astype(np.float64)
    found = stats.bootstrap(
        (sums, windows), lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis), paired=True, vectorized=True,
        n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="BCa", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return OverDocuments(len(names), float(found.low), float(found.high))
