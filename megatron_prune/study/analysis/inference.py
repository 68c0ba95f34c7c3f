"""Differences between paired runs: intervals over seeds, documents and questions, and Holm's correction.

Two questions are separate. *Other seeds*: a t interval over paired differences, one per seed; it does not cover what is
fixed over the seeds, above all the parent. *Other text*: a bootstrap over evaluation documents with the models fixed;
it does not cover other seeds. Neither replaces the other.

The variance over seeds is estimated with the help of other comparisons (``shared``), since three seeds alone determine
it only within a factor of six. The variance of a comparison's paired differences is modelled as a draw from a scaled
inverse chi-square distribution that comparisons of the same seeds share (empirical Bayes, Smyth 2004). Its own ``s2``
with ``d = seeds - 1`` degrees of freedom becomes ``(d0 * prior + d * s2) / (d0 + d)`` with ``d0 + d``: the more similar
the variances of a study, the stronger the pooling. ``d0`` is estimated from the spread of ``log s2`` (expected:
``trigamma(d / 2) + trigamma(d0 / 2)``) plus its standard error, which pools as little as the data allow, since few
variances of few seeds look alike even if they differ. Of the whole study and a setting's comparisons alone, the one
that pools more is used.

One common variance, unless Bartlett's test rejects it, was tried: if variances differ by less than that test detects at
three seeds, 8 to 12% of studies had a false verdict.

Degrees of freedom count independent comparisons. Those that share a run count as one (``M**2 / sum(g**2)`` for M in
clusters of g, by scratch or by pruned runs, whichever gives less), and effects of a seed on all of them have the seeds'
degrees of freedom; both limit ``d0 + d``, combined as in Satterthwaite (1946).
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
FEWEST_DOCUMENTS = 30  # with fewer, intervals over documents have less than their nominal coverage


@dataclass(frozen=True)
class Difference:
    """Scratch minus pruned in nats; positive means that pruning won. One seed has only a mean.

    ``effect``: the mean in standard deviations over seeds (shared ones if ``pooled``), with Hedges' small-sample
    correction (1981, eq. 6e); from three seeds on, if they differ.
    """

    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided
    effect: float | None = None
    freedom: float = 0  # degrees of freedom of the interval's variance
    pooled: int = 1  # number of comparisons that share this variance

    @property
    def winner(self) -> str:
        """``pruned`` or ``scratch``; ``neither`` if the interval contains 0 (or the two are equal)."""
        low = self.mean if self.low is None else self.low
        high = self.mean if self.high is None else self.high
        return "pruned" if low > 0 else "scratch" if high < 0 else "neither"


@dataclass(frozen=True)
class OverDocuments:
    """A 95% interval of the same difference over other documents, with the models fixed.

    It has no ends for fewer documents than ``FEWEST_DOCUMENTS``.
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

    ``scatter``: variance shared with other comparisons, with which its own is combined.
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
    return Difference(seeds, mean, mean - reach, mean + reach, p, effect_of(mean, deviation, freedom), freedom,
                      scatter.comparisons if scatter else 1)  # fmt: skip


def effect_of(mean: float, deviation: float, freedom: float) -> float | None:
    """The mean in standard deviations, with Hedges' correction; None below two degrees of freedom."""
    if freedom < 2 or not deviation:
        return None
    correction = math.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return correction * mean / deviation


def t_quantile(freedom: float) -> float:
    """Half the width of a two-sided 95% interval in standard errors."""
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))


def detectable(found: Difference, level: float) -> float | None:
    """The true difference that a two-sided t test at ``level`` detects with probability ``POWER``, at this variance.

    By the noncentral t distribution. None for one seed.
    """
    if found.low is None or found.high is None:
        return None
    error = (found.high - found.low) / 2 / t_quantile(found.freedom)
    critical = float(special.stdtrit(found.freedom, 1 - level / 2))
    return error * float(special.nctdtrinc(found.freedom, 1 - POWER, critical))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for one family (Holm 1979), in the order given."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate((len(values) - np.arange(len(values))) * values[order])
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def holm_of_planned(p: Sequence[float], planned: int) -> list[float]:
    """Corrected p values of those that are known, in a family of ``planned``: the others count with p = 1."""
    return holm([*p, *[1.0] * max(0, planned - len(p))])[: len(p)]


def over_documents(pruned: np.ndarray, scratch: np.ndarray, documents: np.ndarray) -> OverDocuments | None:
    """Studentised bootstrap (bootstrap-t, Efron 1981) of scratch minus pruned over evaluation documents.

    ``pruned`` and ``scratch``: losses [seeds, windows]; ``documents`` [windows] names the document of each window,
    and a document's windows are drawn together. Documents differ in length, so the mean over windows is a ratio of two
    sums; its standard error, for the data and every resample, is the linear approximation. No interval for fewer than
    ``FEWEST_DOCUMENTS``; None for equal models.
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
    """The ratio of sums and its standard error, from the sums over documents of s, n, s*s, s*n and n*n [..., 5]."""
    s, n, ss, sn, nn = np.moveaxis(moments, -1, 0)
    ratio = s / n
    squares = np.maximum(ss - 2 * ratio * sn + ratio * ratio * nn, 0.0)
    return ratio, np.sqrt(squares * number / (number - 1)) / n


@dataclass(frozen=True)
class Scatter:
    """The variance of one seed's paired difference that ``comparisons`` share, worth ``weight`` degrees of freedom.

    ``limit``: upper bound on the degrees of freedom of the shared variance.
    """

    variance: float
    weight: float
    limit: float
    comparisons: int

    def variance_of(self, own: float, freedom: int) -> tuple[float, float]:
        """The combined variance for a comparison's ``own`` with ``freedom`` degrees, and its degrees of freedom."""
        together = self.weight + freedom
        shared = (self.weight * self.variance + freedom * own) / together
        return shared, max(float(freedom), min(together, self.limit))


@dataclass(frozen=True)
class Paired:
    """The paired differences of one comparison, one per seed, and what other comparisons may share with it."""

    setting: Hashable  # and the kind of scratch
    seeds: tuple[int, ...]
    pruned: Hashable  # names of its runs
    scratch: Hashable
    differences: np.ndarray  # [seeds]


def shared(comparisons: Sequence[Paired]) -> list[Scatter | None]:
    """The variance that each comparison shares with others, in the order given; None if it has only its own."""
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
    """The variance that these share; None for fewer than ``FEWEST``, or if one does not vary at all."""
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
    own = float(special.polygamma(1, half))  # variance of log s2 if all variances are equal
    doubt = float(np.sqrt((special.polygamma(3, half) + 2 * own**2) / independent))
    logs = np.log(variances)
    weight = 2 * _trigamma_inverse(max(0.0, float(logs.var(ddof=1)) - own) + doubt)
    centre = float(logs.mean()) - float(special.digamma(half)) + np.log(half)
    prior = float(np.exp(centre + special.digamma(weight / 2) - np.log(weight / 2)))
    return Scatter(prior, weight, _freedom(table, independent), number)


def _freedom(table: np.ndarray, independent: float) -> float:
    """Degrees of freedom of the mean variance of ``table`` [comparisons, seeds] with ``independent`` comparisons."""
    seeds = table.shape[1]
    variance = float(table.var(axis=1, ddof=1).mean())
    together = float(table.mean(axis=0).var(ddof=1))  # effect of a seed on all comparisons
    doubt = together * together / (seeds - 1)
    if independent > 1:
        doubt += (variance - together) ** 2 / ((independent - 1) * (seeds - 1))
    return float(variance * variance / doubt) if doubt else float(seeds - 1)


def _trigamma_inverse(value: float) -> float:
    low, high = 1e-3, 1e6
    if value >= special.polygamma(1, low):
        return low
    return float(optimize.brentq(lambda x: float(special.polygamma(1, x)) - value, low, high))


FEWEST_QUESTIONS = 30  # of a task; with fewer, intervals have less than their nominal coverage
TAKEN = 0.6  # of E out of A, by simulation (tests/benchmarks/task_intervals.py)
MANY = 1e9  # degrees of freedom at which t is normal


def over_questions(tasks: Sequence[np.ndarray]) -> Difference:
    """The mean over tasks of the mean differences [seeds, questions], with a 95% interval over other seeds and other
    questions at once, and its p value. No interval if a task has fewer than ``FEWEST_QUESTIONS``.

    A difference is a table of seeds by questions: the pruned model's score of a question minus the scratch model's
    under the same seed. Seeds and questions are both samples: a seed moves all questions, and a question may suit
    one arm under every seed. The mean's variance is that of two crossed factors, ``S + B``:

        A   variance of the seeds' means / seeds, which holds S and E
        B   variance of the questions' means over seeds / questions: what questions contribute, E included
        E   what is left of a question under a seed, once both means are taken out
        S   max(A - E, 0), what seeds contribute beyond E

    S has the few degrees of freedom of the seeds and B many, so the interval's half width is ``sqrt(t_S^2 S + t_B^2
    B)``, each part with its own quantile of t (as in MOVER, Zou and Donner 2008). E is in A and in B and has to be
    taken out of one of them: ``TAKEN`` of it out of A, the rest out of B. All of it out of A makes intervals too
    short where seeds matter (92 to 93%), none too long; from two seeds none is taken out of A, which then says too
    little.

    A suite is the mean of its tasks. Tasks are fixed, so B and E are sums over them, and A is of the seeds' means
    over all tasks. One seed has B alone: its interval is over questions, with the models fixed.
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
    freedom = _freedom_of(half / error) if error else MANY
    p = 2 * float(special.stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    deviation = float(means.std(ddof=1)) if seeds > 1 else 0.0
    effect = effect_of(mean, deviation, seeds - 1)
    return Difference(seeds, mean, mean - half, mean + half, p, effect, freedom)


def _freedom_of(quantile: float) -> float:
    """The degrees of freedom of a t distribution with this 97.5% quantile."""
    if quantile <= t_quantile(MANY):
        return MANY
    found = optimize.brentq(lambda log: t_quantile(math.exp(log)) - quantile, math.log(0.5), math.log(MANY))
    return math.exp(found)
