"""What the pruned start gives, what the teacher gives, and whether one needs the other: the four arms of a study with
both objectives.

    g_lm, g_distill   scratch minus pruned, trained on the text alone, and distilled
    t_pruned, t_scratch   text alone minus distilled, of the pruned and of the scratch arm
    start = (g_lm + g_distill) / 2,   teacher = (t_pruned + t_scratch) / 2
    interaction = g_distill - g_lm = t_pruned - t_scratch

All are weighted sums of test losses, seed by seed (``contrasts``), averaged over the methods of a granularity at the
largest budget that was distilled. p values of the three questions are corrected by Holm over all of the study.

The worth of a teacher in tokens: how many tokens of training on the text alone reach the loss of the distilled runs, on
a line in log(tokens) between the measured budgets, seed by seed. Outside the measured budgets nothing is stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from megatron_prune.study.analysis import contrasts, inference
from megatron_prune.study.analysis.contrasts import Weighted
from megatron_prune.study.analysis.inference import CONFIDENCE, Difference, OverDocuments, Scatter
from megatron_prune.study.analysis.measures import TEST, Answers, Measure
from megatron_prune.study.analysis.verdicts import p_value
from megatron_prune.study.grid import SUBJECT, Subject, against_words, setting_words
from megatron_prune.study.prunings import granularity
from megatron_prune.study.schema import StudyConfig

Record = Mapping[str, Any]
Question = Literal["start", "teacher", "interaction"]
QUESTIONS: tuple[Question, ...] = ("start", "teacher", "interaction")
ASKED = {
    "start": "What the start gives",
    "teacher": "What the teacher gives",
    "interaction": "Whether one needs the other",
}
ARMS = (("pruned", "lm"), ("pruned", "distill"), ("scratch", "lm"), ("scratch", "distill"))
NAMES = {"lm": "text alone", "distill": "distilled"}
Match = Callable[[str, str, str], None]  # distilled run, the same run without a teacher, setting


@dataclass(frozen=True)
class Effect:
    """The answer to one question, in nats: ``gap`` with its interval over seeds. ``simple``: its two parts, by name."""

    question: Question
    gap: Difference
    documents: OverDocuments | None
    simple: Mapping[str, Difference] = field(default_factory=dict)
    family: int = 0
    corrected: float | None = None

    @property
    def outcome(self) -> str:
        """``more`` or ``less`` than nothing, or ``open``."""
        if self.corrected is None or self.corrected >= 1 - CONFIDENCE:
            return "open"
        if self.documents is not None and self.documents.holds_zero:
            return "open"
        return "more" if self.gap.mean > 0 else "less"

    @property
    def claim(self) -> str:
        """The first words of the sentence."""
        return {
            ("start", "more"): "The pruned start ends lower",
            ("start", "less"): "Random weights end lower",
            ("start", "open"): "The start makes no difference that can be told from none",
            ("teacher", "more"): "Distilled models end lower",
            ("teacher", "less"): "Models trained on the text alone end lower",
            ("teacher", "open"): "The teacher makes no difference that can be told from none",
            ("interaction", "more"): "The start gives more with a teacher",
            ("interaction", "less"): "The start gives less with a teacher",
            ("interaction", "open"): "That one changes what the other gives is not shown",
        }[self.question, self.outcome]

    @property
    def words(self) -> str:
        """The rest of the sentence."""
        parts = ", ".join(f"{name} {_shown(one)}" for name, one in self.simple.items())
        text = f": {_shown(self.gap)} nats" + (f" ({parts})" if parts else "")
        if self.gap.low is None:
            text += "; one seed: no interval over seeds"
        elif self.corrected is not None:
            text += f"; p {p_value(self.corrected)} by Holm over {self.family} questions"
        return f"{text}."

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question, "outcome": self.outcome, **asdict(self.gap), "family": self.family,
            "documents": self.documents and asdict(self.documents), "corrected": self.corrected,
            "simple": {name: asdict(one) for name, one in self.simple.items()},
            "words": f"{ASKED[self.question]}: {self.claim}{self.words}",
        }  # fmt: skip


@dataclass(frozen=True)
class Worth:
    """The tokens of training on the text alone that reach the loss of one distilled arm.

    ``plain``: the mean over seeds (geometric), with a 95% interval from two seeds on; None outside the measured budgets
    (``status``: inside, below, beyond). ``curve``: mean losses of the arm on the text alone, by tokens.
    """

    subject: Subject
    arm: Literal["pruned", "scratch"]
    tokens: int
    loss: float
    curve: Mapping[int, float]
    status: Literal["inside", "below", "beyond"]
    plain: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def words(self) -> str:
        """``pruned, distilled on 163,840 tokens, is worth 301,000 tokens of text alone, 1.84 times as many (…)``"""
        text = f"{self.arm}, distilled on {self.tokens:,} tokens"
        if self.status == "beyond":
            return f"{text}, is below all that text alone reached: worth more than {max(self.curve):,} tokens of it"
        if self.status == "below":
            return f"{text}, is above all that text alone reached: worth less than {min(self.curve):,} tokens of it"
        assert self.plain is not None
        text += f", is worth {self.plain:,.0f} tokens of text alone, {self.plain / self.tokens:.2f} times as many"
        if self.low is None or self.high is None:
            return text
        return f"{text} (95% interval {self.low / self.tokens:.2f} to {self.high / self.tokens:.2f})"

    def to_json(self) -> dict[str, Any]:
        own = {key: getattr(self.subject, key) for key in SUBJECT if key != "objective"}
        values = {key: getattr(self, key) for key in ("arm", "tokens", "loss", "status", "plain", "low", "high")}
        return own | values | {"curve": {str(key): value for key, value in self.curve.items()}, "words": self.words}


@dataclass(frozen=True)
class FourArms:
    """The answers for one granularity in one setting.

    ``losses``: mean test losses by arm and objective, per method; ``runs``: those of every seed.
    """

    granularity: str
    setting: str
    dense: bool
    sparse: bool
    tokens: int
    effects: tuple[Effect, ...]
    losses: Mapping[str, Mapping[tuple[str, str], Sequence[float]]]
    worth: tuple[Worth, ...]

    @property
    def subject(self) -> str:
        return self.granularity.capitalize() + against_words(sparse=self.sparse, dense=self.dense)

    def to_json(self) -> dict[str, Any]:
        return {
            **{key: getattr(self, key) for key in ("granularity", "setting", "dense", "tokens")},
            "methods": list(self.losses),
            "losses": {
                name: {f"{arm}, {NAMES[what]}": list(values) for (arm, what), values in own.items()}
                for name, own in self.losses.items()
            },
            "effects": [one.to_json() for one in self.effects],
            "worth": [one.to_json() for one in self.worth],
            "words": [f"{self.subject}, {setting_words(self.setting)}: {e.claim}{e.words}" for e in self.effects],
        }


def answer(
    study: StudyConfig, compared: Sequence[Any], groups: Mapping[Any, Sequence[Any]],
    scatters: Sequence[Scatter | None], answers: Answers, records: Mapping[str, Record], match: Match,
) -> tuple[FourArms, ...]:  # fmt: skip
    """The answers, by setting and granularity; none for a study with one objective.

    ``compared``: all comparisons (``results.Compared``); ``groups``: the finished ones, with the variance that each
    shares. ``match`` raises AccountError for runs that differ in more than their teacher.
    """
    if len(study.objectives) < 2:
        return ()
    largest = max(budget for budget in study.budgets if study.distillation.at(budget))
    distilled = [one for one in compared if (one.comparison.budget, one.comparison.objective) == (largest, "distill")]
    planned = dict.fromkeys(map(_kind, distilled))
    pairs: dict[tuple[str, str, bool], list[dict[str, tuple[Sequence[Any], Scatter | None]]]] = {}
    for both in _twins(groups, scatters, largest):
        pairs.setdefault(_kind(both["lm"][0][0]), []).append(both)
    found = []
    for kind in planned:
        made = _four(kind, pairs.get(kind, []), groups, answers, records, match)
        found += [made] if made else []
    return _corrected(found, len(planned) * len(QUESTIONS))


def _kind(item: Any) -> tuple[str, str, bool]:
    made = item.comparison
    return made.setting, granularity(made.pruning), made.pruning.sparse and made.against == "dense"


def _twins(
    groups: Mapping[Any, Sequence[Any]], scatters: Sequence[Scatter | None], budget: int
) -> list[dict[str, tuple[Sequence[Any], Scatter | None]]]:
    """The finished comparisons of a budget that were made with both objectives."""
    found: dict[Any, dict[str, tuple[Sequence[Any], Scatter | None]]] = {}
    for items, scatter in zip(groups.values(), scatters, strict=True):
        if items[0].comparison.budget == budget:
            key = tuple(value for name, value in items[0].group.items() if name != "objective")
            found.setdefault(key, {})[items[0].comparison.objective] = items, scatter
    return [both for both in found.values() if len(both) == 2]


def _four(
    kind: tuple[str, str, bool], pairs: Sequence[Mapping[str, tuple[Sequence[Any], Scatter | None]]],
    groups: Mapping[Any, Sequence[Any]], answers: Answers, records: Mapping[str, Record], match: Match,
) -> FourArms | None:  # fmt: skip
    """None while a seed that all four arms share is missing."""
    by_seed = [{what: contrasts.runs_by_seed(items) for what, (items, _) in both.items()} for both in pairs]
    every = [set(own) for both in by_seed for own in both.values()]
    seeds = sorted(set.intersection(*every)) if every else []
    if not seeds:
        return None
    setting, of, dense = kind
    for own in by_seed:
        for seed in seeds:
            for run, plain in zip(own["distill"][seed], own["lm"][seed], strict=True):
                match(run, plain, setting)
    share = 1 / len(pairs)
    start: dict[str, list[Weighted]] = {"lm": [], "distill": []}
    teacher: dict[str, list[Weighted]] = {"pruned": [], "scratch": []}
    for both, own in zip(pairs, by_seed, strict=True):
        for what, gaps in start.items():
            gaps.append(Weighted(share, own[what], both[what][1]))
        for place, arm in enumerate(teacher):
            runs = {seed: (own["distill"][seed][place], own["lm"][seed][place]) for seed in seeds}
            teacher[arm].append(Weighted(share, runs, None))
    asked = {
        "start": [*_times(0.5, start["lm"]), *_times(0.5, start["distill"])],
        "teacher": [*_times(0.5, teacher["pruned"]), *_times(0.5, teacher["scratch"])],
        "interaction": [*start["distill"], *_times(-1, start["lm"])],
    }
    parts = {
        "start": {NAMES[what]: gaps for what, gaps in start.items()},
        "teacher": dict(teacher),
        "interaction": {},
    }

    def value(weighted: Sequence[Weighted]) -> tuple[Difference, OverDocuments | None]:
        return contrasts.of_losses(Measure("corpus", TEST), weighted, seeds, answers, records)

    effects = tuple(
        Effect(question, *value(asked[question]), {name: value(own)[0] for name, own in parts[question].items()})
        for question in QUESTIONS
    )
    losses = {
        _subject(both["lm"][0][0]).label: {
            (arm, what): [records[own[what][seed][arm == "scratch"]]["test_loss"] for seed in seeds]
            for arm, what in ARMS
        }
        for both, own in zip(pairs, by_seed, strict=True)
    }
    items = pairs[0]["lm"][0]
    worth = tuple(one for both in pairs for one in _worth(both["distill"][0], groups, records))
    sparse = items[0].comparison.pruning.sparse
    return FourArms(of, setting, dense, sparse, items[0].tokens, effects, losses, worth)


def _times(factor: float, weighted: Sequence[Weighted]) -> list[Weighted]:
    return [replace(one, weight=factor * one.weight) for one in weighted]


def _subject(item: Any) -> Subject:
    return Subject(**{key: item.group[key] for key in SUBJECT})


def _corrected(found: Sequence[FourArms], planned: int) -> tuple[FourArms, ...]:
    """With Holm's correction over the planned questions; those without a p value count with p = 1."""
    known = [effect for one in found for effect in one.effects if effect.gap.p is not None]
    values = iter(inference.holm_of_planned([effect.gap.p or 0.0 for effect in known], planned))
    return tuple(
        replace(one, effects=tuple(
            effect if effect.gap.p is None else replace(effect, family=planned, corrected=next(values))
            for effect in one.effects
        ))
        for one in found
    )  # fmt: skip


# What a teacher is worth in tokens of training on the text alone.


def _worth(distilled: Sequence[Any], groups: Mapping[Any, Sequence[Any]], records: Mapping[str, Record]) -> list[Worth]:
    """Of both arms; none where text alone was trained on one budget, or by other seeds."""
    same = [key for key in SUBJECT if key != "objective"]
    plain = [
        contrasts.runs_by_seed(items)
        for items in groups.values()
        if items[0].comparison.objective == "lm" and all(items[0].group[k] == distilled[0].group[k] for k in same)
    ]
    own = contrasts.runs_by_seed(distilled)
    seeds = sorted(set.intersection(set(own), *map(set, plain)))
    if len(plain) < 2 or not seeds:
        return []
    found = []
    arms: tuple[Literal["pruned", "scratch"], ...] = ("pruned", "scratch")
    for place, arm in enumerate(arms):
        first = [records[runs[seeds[0]][place]]["tokens"] for runs in plain]
        curve = np.array([[records[runs[seed][place]]["test_loss"] for runs in plain] for seed in seeds])
        losses = np.array([records[own[seed][place]]["test_loss"] for seed in seeds])
        tokens = records[own[seeds[0]][place]]["tokens"]
        found.append(worth(_subject(distilled[0]), arm, tokens, first, curve, losses))
    return found


def worth(
    subject: Subject, arm: Literal["pruned", "scratch"], tokens: int, budgets: Sequence[int], curves: np.ndarray,
    losses: np.ndarray,
) -> Worth:  # fmt: skip
    """What ``losses`` [seeds] of runs distilled on ``tokens`` are worth, by ``curves`` [seeds, budgets] of text alone.

    Stated only if the mean and every seed are inside.
    """
    order = np.argsort(budgets)
    logs, curves = np.log(np.array(budgets, dtype=np.float64)[order]), curves[:, order]
    mean, loss = curves.mean(axis=0), float(losses.mean())
    shown = dict(zip((int(budgets[place]) for place in order), mean.tolist(), strict=True))
    together = reached(logs, mean, loss)
    each = [reached(logs, curve, own) for curve, own in zip(curves, losses.tolist(), strict=True)]
    known = [one for one in each if isinstance(one, float)]
    if not isinstance(together, float) or len(known) < len(each):
        outside = together if not isinstance(together, float) else next(one for one in each if isinstance(one, str))
        assert not isinstance(outside, float)
        return Worth(subject, arm, tokens, loss, shown, outside)
    centre = inference.paired([0.0] * len(known), known)
    low, high = (None if end is None else math.exp(end) for end in (centre.low, centre.high))
    return Worth(subject, arm, tokens, loss, shown, "inside", math.exp(centre.mean), low, high)


def reached(logs: np.ndarray, curve: np.ndarray, loss: float) -> float | Literal["below", "beyond"]:
    """Where a curve of losses at ``logs`` (of tokens) first comes to ``loss``, on lines between its points.

    ``beyond`` if it never does, ``below`` if it begins below it.
    """
    if loss > curve[0]:
        return "below"
    for (a, b), (before, after) in zip(
        zip(logs, logs[1:], strict=False), zip(curve, curve[1:], strict=False), strict=True
    ):
        if after <= loss <= before:
            return float(a if before == after else a + (before - loss) / (before - after) * (b - a))
    return "beyond"


def _shown(found: Difference) -> str:
    """``+0.123 [+0.100, +0.146]``"""
    text = f"{found.mean:+.3f}"
    return text if found.low is None else f"{text} [{found.low:+.3f}, {found.high:+.3f}]"
