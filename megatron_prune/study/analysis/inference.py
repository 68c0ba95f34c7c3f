"""Differences between paired runs: t intervals over seeds, Holm's correction, and a bootstrap over documents.

Two questions are kept apart. *Other seeds*: a t interval over paired differences, a seed each; what stays the
same over the seeds, the parent above all, is not in it. *Other text*: a bootstrap over evaluation documents, the
models fixed; it says nothing of other seeds. Neither stands in for the other.

How far seeds scatter is estimated with the help of other comparisons (``shared``): three seeds alone know it to within
a factor of six. The variance of a comparison's paired differences is taken to be one draw from a scaled inverse
chi-square distribution that comparisons of the same seeds share (empirical Bayes, Smyth 2004). Its own ``s2`` with
``d = seeds - 1`` degrees of freedom then becomes ``(d0 * prior + d * s2) / (d0 + d)`` with ``d0 + d``: the less the
variances of a study differ, the more they are one. ``d0`` is estimated from the spread of ``log s2`` (expected:
``trigamma(d / 2) + trigamma(d0 / 2)``), as the spread plus its standard error: as little is shared as the data allow,
since few variances of few seeds look alike even where they are not. Of the whole study and of a setting's comparisons
alone, that is used which shares more.

One variance for all comparisons, where Bartlett's test does not refuse it, was tried: where scatter differs by less
than that test sees at three seeds, 8 to 12% of studies had a false verdict.

Degrees of freedom count what is independent. Comparisons that share a run count as one (``M**2 / sum(g**2)`` of M in
clusters of g, by the scratch runs or the pruned ones, whichever leaves less), and what a seed does to all of them
alike has the degrees of freedom of the seeds; both limit ``d0 + d`` as Satterthwaite (1946) puts variances together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 4000
FEWEST = 4  # comparisons from which a spread is estimated
FEWEST_DOCUMENTS = 30  # below it intervals over documents cover less than they say


@dataclass(frozen=True)
class Difference:
    """Scratch minus pruned in nats, so that positive says that pruning won. One seed has a mean alone.

    ``effect``: the mean in standard deviations over seeds (shared ones where ``pooled``), times Hedges' correction for
    few of them (1981, eq. 6e); from three seeds on, where they differ.
    """

    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided
    effect: float | None = None
    freedom: float = 0  # degrees of, of the variance that the interval rests on
    pooled: int = 1  # comparisons that this variance is of

    @property
    def winner(self) -> str:
        """``pruned`` or ``scratch``; ``neither`` where the interval holds 0 (or the two are equal)."""
        low = self.mean if self.low is None else self.low
        high = self.mean if self.high is None else self.high
        return "pruned" if low > 0 else "scratch" if high < 0 else "neither"


@dataclass(frozen=True)
class OverDocuments:
    """A 95% interval of the same difference, had other documents been drawn and the models been the same.

    Without ends for fewer documents than ``FEWEST_DOCUMENTS``.
    """

    documents: int
    low: float | None = None
    high: float | None = None

    @property
    def holds_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high

    @property
    def words(self) -> str:
        if self.low is None or self.high is None:
            return (
                f"Over evaluation documents no interval: the windows are of {self.documents}, and from fewer than "
                f"{FEWEST_DOCUMENTS} it would be too short."
            )
        return (
            f"Over {self.documents} evaluation documents, these models fixed: "
            f"{self.low:+.3f} to {self.high:+.3f} (95%, bootstrap)."
        )


def paired(pruned: Sequence[float], scratch: Sequence[float], scatter: Scatter | None = None) -> Difference:
    """The paired difference over seeds, with a two-sided 95% t interval from two seeds on.

    ``scatter`` is what it shares with other comparisons, which its own is put together with.
    """
    differences = np.subtract(scratch, pruned, dtype=np.float64)
    seeds, mean = len(differences), float(differences.mean())
    if seeds == 1:
        return Difference(1, mean)
    freedom, variance = float(seeds - 1), float(differences.var(ddof=1))
    if scatter is not None:
        variance, freedom = scatter.variance_of(variance, seeds - 1)
    deviation = math.sqrt(variance)
    error = deviation / math.sqrt(seeds)
    reach = t_quantile(freedom) * error
    p = 2 * float(special.stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    return Difference(seeds, mean, mean - reach, mean + reach, p, _effect(mean, deviation, freedom), freedom,
                      scatter.comparisons if scatter else 1)  # fmt: skip


def _effect(mean: float, deviation: float, freedom: float) -> float | None:
    if freedom < 2 or not deviation:
        return None
    correction = math.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return correction * mean / deviation


def t_quantile(freedom: float) -> float:
    """How many standard errors a two-sided 95% interval reaches to either side."""
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))


def detectable(found: Difference, level: float) -> float | None:
    """The true difference that a two-sided t test at ``level`` finds with probability ``POWER``, at this scatter.

    By the noncentral t distribution. None for one seed.
    """
    if found.low is None or found.high is None:
        return None
    error = (found.high - found.low) / 2 / t_quantile(found.freedom)
    critical = float(special.stdtrit(found.freedom, 1 - level / 2))
    return error * float(special.nctdtrinc(found.freedom, 1 - POWER, critical))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for being one family (Holm 1979), in the order given."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order])
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def over_documents(pruned: np.ndarray, scratch: np.ndarray, documents: np.ndarray) -> OverDocuments | None:
    """Studentised bootstrap (bootstrap-t, Efron 1981) of scratch minus pruned over evaluation documents.

    ``pruned`` and ``scratch``: losses [seeds, windows]; ``documents`` [windows] names the document of each window,
    and a document's windows are drawn together. Documents differ in length, so that the mean over windows is a ratio of
    two sums; its standard error, of the data and of every resample, is the linear one. Without an interval for fewer
    than ``FEWEST_DOCUMENTS``; None for equal models.
    """
    differences = (np.asarray(scratch) - np.asarray(pruned)).mean(axis=0)
    _, own = np.unique(documents, return_inverse=True)
    sums, windows = np.bincount(own, differences), np.bincount(own).astype(np.float64)
    number = len(sums)
    if np.ptp(differences) == 0:
        return None
    if number < FEWEST_DOCUMENTS:
        return OverDocuments(number)
    moments = np.stack([sums, windows, sums * sums, sums * windows, windows * windows], axis=1)
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES) @ moments
    ratio, error = _ratio(moments.sum(axis=0), number)
    ratios, errors = _ratio(drawn, number)
    low, high = np.quantile((ratios - ratio) / np.maximum(errors, 1e-300), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return OverDocuments(number, float(ratio - high * error), float(ratio - low * error))


def _ratio(moments: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The ratio of sums and its standard error, from sums over documents of s, n, s*s, s*n and n*n [..., 5]."""
    s, n, ss, sn, nn = np.moveaxis(moments, -1, 0)
    ratio = s / n
    squares = np.maximum(ss - 2 * ratio * sn + ratio * ratio * nn, 0.0)
    return ratio, np.sqrt(squares * number / (number - 1)) / n


@dataclass(frozen=True)
class Scatter:
    """The variance of one seed's paired difference that ``comparisons`` share, worth ``weight`` degrees of freedom.

    ``limit``: degrees of freedom that the shared variance has itself, at most.
    """

    variance: float
    weight: float
    limit: float
    comparisons: int

    def variance_of(self, own: float, freedom: int) -> tuple[float, float]:
        """The variance of a comparison whose own is ``own`` with ``freedom`` degrees, and its degrees of freedom."""
        together = self.weight + freedom
        shared = (self.weight * self.variance + freedom * own) / together
        return shared, max(float(freedom), min(together, self.limit))


@dataclass(frozen=True)
class Paired:
    """The paired differences of one comparison, a seed each, and what other comparisons may share with it."""

    setting: Hashable  # and the kind of scratch
    seeds: tuple[int, ...]
    pruned: Hashable  # names of its runs
    scratch: Hashable
    differences: np.ndarray  # [seeds]


def shared(comparisons: Sequence[Paired]) -> list[Scatter | None]:
    """The scatter that each comparison shares with others, in the order given; None where it has only its own."""
    found: list[Scatter | None] = [None] * len(comparisons)
    study: dict[Hashable, list[int]] = {}
    settings: dict[Hashable, list[int]] = {}
    for place, one in enumerate(comparisons):
        if len(one.seeds) > 1:
            study.setdefault(one.seeds, []).append(place)
            settings.setdefault((one.seeds, one.setting), []).append(place)
    for places in (*study.values(), *settings.values()):
        scatter = common([comparisons[place] for place in places])
        for place in places:
            known = found[place]
            if scatter and (known is None or scatter.weight > known.weight):
                found[place] = scatter
    return found


def common(comparisons: Sequence[Paired]) -> Scatter | None:
    """What these share; None for fewer than ``FEWEST``, or where one does not vary at all."""
    if len(comparisons) < FEWEST:
        return None
    table = np.stack([one.differences for one in comparisons])  # [comparisons, seeds]
    number, seeds = table.shape
    variances, half = table.var(axis=1, ddof=1), (seeds - 1) / 2
    if not (variances > 0).all():
        return None
    independent = min(
        number**2 / sum(own * own for own in Counter(names).values())
        for names in ([one.pruned for one in comparisons], [one.scratch for one in comparisons])
    )
    own = float(special.polygamma(1, half))  # variance of log s2 where all have one variance
    doubt = float(np.sqrt((special.polygamma(3, half) + 2 * own**2) / independent))
    logs = np.log(variances)
    weight = 2 * _trigamma_inverse(max(0.0, float(logs.var(ddof=1)) - own) + doubt)
    centre = float(logs.mean()) - float(special.digamma(half)) + np.log(half)
    prior = float(np.exp(centre + special.digamma(weight / 2) - np.log(weight / 2)))
    return Scatter(prior, weight, _freedom(table, independent), number)


def _freedom(table: np.ndarray, independent: float) -> float:
    """Degrees of freedom of the mean variance of ``table`` [comparisons, seeds], of which so many are independent."""
    seeds = table.shape[1]
    variance = float(table.var(axis=1, ddof=1).mean())
    together = float(table.mean(axis=0).var(ddof=1))  # what seeds do to all comparisons alike
    doubt = together * together / (seeds - 1)
    if independent > 1:
        doubt += (variance - together) ** 2 / ((independent - 1) * (seeds - 1))
    return float(variance * variance / doubt) if doubt else float(seeds - 1)


def _trigamma_inverse(value: float) -> float:
    low, high = 1e-3, 1e6
    if value >= special.polygamma(1, low):
        return low
    return float(optimize.brentq(lambda x: float(special.polygamma(1, x)) - value, low, high))
