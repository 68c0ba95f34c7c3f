"""Questions between comparisons (``compare`` in study.yaml): advantages compared, gaps that vanish, trends.

Each is a weighted sum of gaps, computed for every seed on its own, so that what a seed does to all arms cancels:

    larger    mean of the gaps of one selection minus that of another (a difference of differences); or of the losses
              of their scratch runs alone (``arm: scratch``)
    vanishes  mean of the gaps of a selection, against both ends of a margin (two one-sided tests, Schuirmann 1987)
    trend     least-squares slope of the gap in what is removed, or in the logarithm of the tokens, method by method

Losses have a t interval over the seeds' sums. Where weights add up to zero, or there is one comparison, their variance
is combined with that of the study's other comparisons (``inference.shared``), which is that of one pair of runs: a sum
with coefficients ``c`` of runs has ``sum(c**2) / 2`` times as much. Sums of several trust it by half, and where
comparisons scatter too differently (``ALIKE``) none is shared. Accuracies have their interval over seeds and questions
(``over_questions``). p values are corrected by Holm over all questions of the study, those without one included.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from megatron_prune.study import schema
from megatron_prune.study.analysis import inference
from megatron_prune.study.analysis.inference import (
    CONFIDENCE,
    POWER,
    Difference,
    OverDocuments,
    Scatter,
    over_questions,
)
from megatron_prune.study.analysis.measures import TEST, Answers, Measure
from megatron_prune.study.analysis.verdicts import p_value
from megatron_prune.study.grid import selects, setting_words

Record = Mapping[str, Any]
STEP = {"ratio": 0.1, "tokens": 1.0}  # of a slope: a tenth of the linears, one doubling
STEPS = {"ratio": "per 10% of the linears removed", "tokens": "per doubling of the tokens"}
# Of the weight of the shared variance, for sums of several comparisons. With all of it, tests at three seeds find
# something in 8% of studies without it where variances differ (log-normal, 0.5); tests/benchmarks/contrasts.py.
TRUSTED = 0.5
# The least weight of the shared variance (degrees of freedom) with which it counts. Where comparisons scatter so
# differently that it is worth less (log-normal, 1), tests at three seeds would find something in 6 to 8% of studies
# without it; a sum then has its own variance alone.
ALIKE = 1.5
ONE_SIDED = 2 * CONFIDENCE - 1  # two one-sided tests at 5% are a two-sided 90% interval


@dataclass(frozen=True)
class Weighted:
    """A comparison (its finished runs by seed, pruned and scratch) and its weight in a sum."""

    weight: float
    runs: Mapping[int, tuple[str, str]]
    scatter: Scatter | None
    arm: str = "gap"

    def signed(self, seed: int) -> list[tuple[int, str]]:
        """The runs whose losses are added up, with their signs: scratch minus pruned; or scratch alone, where lower is
        better."""
        pruned, scratch = self.runs[seed]
        return [(-1, scratch)] if self.arm == "scratch" else [(-1, pruned), (1, scratch)]

    def gap(self, seed: int, loss: Callable[[str], Any]) -> Any:
        """The weighted sum of their losses."""
        pruned, scratch = self.runs[seed]
        return self.weight * (-loss(scratch) if self.arm == "scratch" else loss(scratch) - loss(pruned))


@dataclass(frozen=True)
class ContrastResult:
    """The answer to one question in one setting: ``gap`` is the weighted sum, with its 95% interval.

    ``corrected``: the p value after Holm's correction over ``family`` questions. ``inner``: the 90% interval of two
    one-sided tests.
    """

    asked: schema.Contrast
    setting: str
    dense: bool
    measure: Measure
    comparisons: int
    gap: Difference
    documents: OverDocuments | None = None
    p: float | None = None
    inner: tuple[float, float] | None = None
    family: int = 0
    corrected: float | None = None

    @property
    def outcome(self) -> str:
        """``larger`` or ``smaller``, ``rises`` or ``falls``, ``vanishes``, or ``open``."""
        if self.corrected is None or self.corrected >= 1 - CONFIDENCE:
            return "open"
        if self.asked.kind == "vanishes":
            return "vanishes"
        if self.documents is not None and self.documents.holds_zero:
            return "open"
        up, down = {"larger": ("larger", "smaller"), "trend": ("rises", "falls")}[self.asked.kind]
        return up if self.gap.mean > 0 else down

    @property
    def detectable(self) -> float | None:
        """The true value that such a study tells from zero with 80% power; None for one seed."""
        return inference.detectable(self.gap, (1 - CONFIDENCE) / max(1, self.family))

    @property
    def subject(self) -> str:
        return subject(self.asked, dense=self.dense)

    @property
    def claim(self) -> str:
        """The first words of the sentence."""
        advantage = "the advantage of pruning"
        than = self.asked.than.words() if self.asked.than else ""
        if self.asked.arm == "scratch":
            ends = {"larger": f"ends lower than for {than}", "smaller": f"ends higher than for {than}"}
            return f"Scratch {ends.get(self.outcome, f'cannot be told from scratch for {than}')}"
        return {
            "larger": f"{advantage[0].upper()}{advantage[1:]} is larger than for {than}",
            "smaller": f"{advantage[0].upper()}{advantage[1:]} is smaller than for {than}",
            "rises": f"{advantage[0].upper()}{advantage[1:]} grows",
            "falls": f"{advantage[0].upper()}{advantage[1:]} shrinks",
            "vanishes": f"The gap nearly vanishes: it is within {self._margin}",
            "open": {
                "larger": "The advantages of pruning cannot be told apart",
                "trend": "No trend can be told from none",
                "vanishes": f"It is not shown that the gap is within {self._margin}",
            }[self.asked.kind],
        }[self.outcome]

    @property
    def _margin(self) -> str:
        return self._amount(self.asked.margin or 0.0).replace("+", "±")

    def _amount(self, value: float) -> str:
        return self.measure.shown(value, 4 if self.asked.kind == "trend" else 3)

    @property
    def shown_interval(self) -> tuple[float, tuple[float, float]] | None:
        """The confidence and the ends of the interval behind the answer; None for one seed."""
        if self.gap.low is None or self.gap.high is None:
            return None
        return (ONE_SIDED, self.inner) if self.inner else (CONFIDENCE, (self.gap.low, self.gap.high))

    @property
    def words(self) -> str:
        """The rest of the sentence: numbers, interval, p value, power."""
        what = {"larger": "difference of the gaps", "trend": "slope of the gap", "vanishes": "gap"}[self.asked.kind]
        what = "difference of the losses" if self.asked.arm == "scratch" else what
        text = f": {what} {self._amount(self.gap.mean)}"
        text += f" {STEPS[self.asked.along]}" if self.asked.along else ""
        if self.measure.name != TEST:
            text += f" ({self.measure.title})"
        if self.shown_interval is None:
            return f"{text}; one seed: no interval over seeds.{self._documents}"
        seeds = f"{self.gap.seeds} seed{'s' * (self.gap.seeds > 1)}"
        share, (low, high) = self.shown_interval
        text += f" ({share:.0%} interval {self._amount(low).partition(' ')[0]} to {self._amount(high)} over {seeds}"
        text += " and questions" if self.measure.kind != "corpus" else ""
        if self.corrected is not None:
            tests = "two one-sided tests, " if self.asked.kind == "vanishes" else ""
            text += f"; {tests}p {p_value(self.corrected)}"
            text += f" by Holm over {self.family} questions" if self.family > 1 else ""
        text += ")"
        if self.outcome == "open" and self.asked.kind != "vanishes" and self.detectable is not None:
            text += (
                f"; {self._amount(self.detectable).lstrip('+')} would have been found in {POWER:.0%} of such studies"
            )
        return f"{text}.{self._documents}"

    @property
    def _documents(self) -> str:
        return f" {self.documents.words}" if self.documents and self.documents.low is not None else ""

    @property
    def sentence(self) -> str:
        return f"{self.subject}, {setting_words(self.setting)}: {self.claim}{self.words}"

    def to_json(self) -> dict[str, Any]:
        return {
            **{key: getattr(self, key) for key in ("setting", "dense", "comparisons", "outcome", "detectable")},
            "subject": self.subject,
            "asked": asdict(self.asked),
            "measure": self.measure.title,
            "gap": asdict(self.gap),
            "documents": self.documents and asdict(self.documents),
            "p": self.p,
            "inner": self.inner,
            "family": self.family,
            "corrected": self.corrected,
            "words": self.sentence,
        }


def answer(
    study: schema.StudyConfig,
    compared: Sequence[Any],
    groups: Mapping[Any, Sequence[Any]],
    scatters: Sequence[Scatter | None],
    answers: Answers,
    records: Mapping[str, Record],
) -> tuple[ContrastResult, ...]:
    """The answers, in the file's order and setting by setting.

    ``compared``: all comparisons (``results.Compared``), which say how many questions there are; ``groups``: the
    finished ones, and for each the variance that it shares.
    """
    first = [items[0].comparison.pruned for items in groups.values()]
    measures = {measure.name: measure for measure in reversed(answers.measures(first))}
    measures[TEST] = Measure("corpus", TEST)
    finished = list(zip(groups.values(), scatters, strict=True))
    planned, found = 0, []
    for asked in study.compare:
        for setting, dense in _settings(study, asked, compared):
            planned += 1
            own = [one for one in finished if _asked_in(one[0][0], setting, dense)]
            weighted = _weighted(study, asked, own, records)
            if weighted and asked.measure in measures:
                made = _result(asked, setting, dense, measures[asked.measure], weighted, answers, records)
                found += [made] if made else []
    tested = [place for place, one in enumerate(found) if one.p is not None]
    corrected = inference.holm_of_planned([found[place].p or 0.0 for place in tested], planned)
    for place, p in zip(tested, corrected, strict=True):
        found[place] = replace(found[place], family=planned, corrected=p)
    return tuple(found)


def subject(asked: schema.Contrast, *, dense: bool) -> str:
    """A question in words."""
    if asked.label:
        return asked.label
    than = f" against {asked.than.words()}" if asked.than else ""
    along = f" along the {'ratio' if asked.along == 'ratio' else 'tokens'}" if asked.along else ""
    words = f"{asked.of.words()}{than}{along}{', against dense scratch' * dense}"
    return words if asked.of.methods else words[0].upper() + words[1:]


def list_questions(
    study: schema.StudyConfig, compared: Sequence[Any]
) -> Iterator[tuple[schema.Contrast, str, bool, list[Any]]]:
    """Every question in each of its settings, dense or not, with the comparisons of all its sides."""
    for asked in study.compare:
        sides = [asked.of, *([asked.than] if asked.than else [])]
        for setting, dense in _settings(study, asked, compared):
            own = [item for item in compared if _asked_in(item, setting, dense)]
            every = asked.along == "tokens"
            yield (
                asked,
                setting,
                dense,
                [
                    item
                    for item in own
                    if any(selects(study, one, item.comparison, every_budget=every) for one in sides)
                ],
            )


def _settings(study: schema.StudyConfig, asked: schema.Contrast, compared: Sequence[Any]) -> list[tuple[str, bool]]:
    """The settings, and dense scratch or not for sparse models, in which all sides of a question have comparisons."""
    every = asked.along == "tokens"
    sides = [asked.of, *([asked.than] if asked.than else [])]
    found = []
    for setting in dict.fromkeys(item.comparison.setting for item in compared):
        own = [[item for item in compared if item.comparison.setting == setting
                and selects(study, side, item.comparison, every_budget=every)] for side in sides]  # fmt: skip
        sparse = [item.comparison.against == "dense" for side in own for item in side if item.comparison.pruning.sparse]
        for dense in sorted(set(sparse)) or [False]:
            if all(any(_asked_in(item, setting, dense) for item in side) for side in own):
                found.append((setting, dense))
    return found


def _asked_in(item: Any, setting: str, dense: bool) -> bool:
    made = item.comparison
    return made.setting == setting and (not made.pruning.sparse or (made.against == "dense") == dense)


def _weighted(
    study: schema.StudyConfig, asked: schema.Contrast, own: Sequence[tuple[Sequence[Any], Scatter | None]],
    records: Mapping[str, Record],
) -> list[Weighted]:  # fmt: skip
    """The comparisons with their weights; none if a side is not finished, or no method has two points of a trend."""
    every = asked.along == "tokens"
    of = [one for one in own if selects(study, asked.of, one[0][0].comparison, every_budget=every)]
    if asked.kind == "trend":
        return [_weight(weight, *one) for weight, one in _slopes(asked, of, records)]
    weighted = [_weight(1 / len(of), *one, asked.arm) for one in of]
    if asked.than is not None:
        than = [one for one in own if selects(study, asked.than, one[0][0].comparison)]
        weighted = [*weighted, *(_weight(-1 / len(than), *one, asked.arm) for one in than)] if of and than else []
    return weighted


def _weight(weight: float, items: Sequence[Any], scatter: Scatter | None, arm: str = "gap") -> Weighted:
    return Weighted(weight, runs_by_seed(items), scatter, arm)


def runs_by_seed(items: Sequence[Any]) -> dict[int, tuple[str, str]]:
    """The pruned and the scratch run of every seed of a comparison (``results.Compared``)."""
    return {item.comparison.seed: (item.comparison.pruned, item.comparison.scratch) for item in items}


def _slopes(
    asked: schema.Contrast, of: Sequence[tuple[Sequence[Any], Scatter | None]], records: Mapping[str, Record]
) -> Iterator[tuple[float, Any]]:
    """Weights that give the mean over methods of each one's least-squares slope."""
    series: dict[Any, list[tuple[float, Any]]] = {}
    for one in of:
        made, tokens = one[0][0].comparison, one[0][0].tokens
        method = made.pruning.method
        if asked.along == "tokens":
            key: tuple[Any, ...] = (*made.subject, made.against)
            at = math.log2(tokens)
        else:
            key = (method.name or method.title, method.last_pattern, made.objective, made.against, made.budget)
            at = float(np.mean([records[item.comparison.pruning.cell]["removed_linears"] for item in one[0]]))
        series.setdefault(key, []).append((at, one))
    lines = [line for line in series.values() if len({at for at, _ in line}) > 1]
    for line in lines:
        places = np.array([place for place, _ in line])
        centred = places - places.mean()
        weights = centred / (centred**2).sum() * STEP[asked.along or "ratio"] / len(lines)
        yield from zip(weights.tolist(), (one for _, one in line), strict=True)


def _result(
    asked: schema.Contrast, setting: str, dense: bool, measure: Measure, weighted: Sequence[Weighted],
    answers: Answers, records: Mapping[str, Record],
) -> ContrastResult | None:  # fmt: skip
    """None if the comparisons have no seed in common."""
    seeds = sorted(set.intersection(*(set(one.runs) for one in weighted)))
    if not seeds:
        return None
    documents = None
    if measure.kind == "corpus":
        gap, documents = of_losses(measure, weighted, seeds, answers, records)
    else:
        tables = [
            [one.weight * task for task in answers.gaps(measure, *one.runs[seed])] for one in weighted for seed in seeds
        ]
        summed = [
            np.stack([sum(tables[place * len(seeds) + number][task] for place in range(len(weighted)))
                      for number in range(len(seeds))])
            for task in range(len(measure.metrics))
        ]  # fmt: skip
        gap = over_questions(summed)
    p, inner = gap.p, None
    if asked.kind == "vanishes" and asked.margin is not None:
        p, inner = equivalence(gap, asked.margin)
    return ContrastResult(asked, setting, dense, measure, len(weighted), gap, documents, p, inner)


def of_losses(
    measure: Measure,
    weighted: Sequence[Weighted],
    seeds: Sequence[int],
    answers: Answers,
    records: Mapping[str, Record],
) -> tuple[Difference, OverDocuments | None]:
    """A weighted sum of gaps in the loss on a corpus, over seeds and over documents."""
    values = [
        math.fsum(one.gap(seed, lambda cell: answers.value(measure, cell, records[cell])) for one in weighted)
        for seed in seeds
    ]
    scatter = shared(weighted, seeds[0]) if measure.name == TEST else None
    gap = inference.paired([0.0] * len(values), values, scatter)
    return gap, _over_documents(measure, weighted, seeds, answers)


def shared(weighted: Sequence[Weighted], seed: int) -> Scatter | None:
    """The variance that a weighted sum shares with the study's comparisons; None if it only has its own."""
    alone = len(weighted) == 1
    scatters = [one.scatter for one in weighted]
    if not alone and abs(math.fsum(one.weight for one in weighted)) > 1e-9:
        return None  # what a seed does to all runs would not cancel
    if any(scatter is None for scatter in scatters):
        return None
    least = min((scatter for scatter in scatters if scatter is not None), key=lambda scatter: scatter.weight)
    if least.weight < ALIKE:
        return None
    runs: dict[str, float] = defaultdict(float)
    for one in weighted:
        for sign, cell in one.signed(seed):
            runs[cell] += sign * one.weight
    squares = math.fsum(value * value for value in runs.values())
    return least if alone else replace(least, variance=least.variance * squares / 2, weight=least.weight * TRUSTED)


def equivalence(gap: Difference, margin: float) -> tuple[float | None, tuple[float, float] | None]:
    """p of two one-sided t tests that the true value is within ``margin`` of zero, and the 90% interval behind them."""
    if gap.low is None or gap.high is None:
        return None, None
    error = (gap.high - gap.low) / 2 / inference.t_quantile(gap.freedom)
    if not error:
        return float(abs(gap.mean) >= margin), (gap.mean, gap.mean)
    p = float(special.stdtr(gap.freedom, (abs(gap.mean) - margin) / error))
    reach = float(special.stdtrit(gap.freedom, CONFIDENCE)) * error
    return p, (gap.mean - reach, gap.mean + reach)


def _over_documents(
    measure: Measure, weighted: Sequence[Weighted], seeds: Sequence[int], answers: Answers
) -> OverDocuments | None:
    """The bootstrap of the weighted sum over evaluation documents, with the models fixed."""
    windows = answers.windows[measure.name]
    cells = {cell for one in weighted for seed in seeds for _, cell in one.signed(seed)}
    losses = {cell: windows.of(cell) for cell in cells}
    if windows.documents is None or any(own is None for own in losses.values()):
        return None
    known: dict[str, np.ndarray] = {cell: own for cell, own in losses.items() if own is not None}
    summed = np.stack([sum(one.gap(seed, known.__getitem__) for one in weighted) for seed in seeds])
    return inference.over_documents(np.zeros_like(summed), summed, windows.documents)
