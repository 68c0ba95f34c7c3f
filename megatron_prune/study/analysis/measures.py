"""What models are scored on next to the test loss: further corpora, tasks and suites; a verdict for each comparison.

A measure has a *gap* that is positive where pruning won: scratch minus pruned of a loss, pruned minus scratch of an
accuracy. Gaps of losses have a t interval over seeds and a bootstrap over documents; gaps of accuracies have one
interval over seeds and questions (``over_questions``). p values are corrected by Holm over the study's family,
separately for corpora, suites and single tasks. The verdicts of the study (``verdicts``) rest on the test loss alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from megatron_prune.evaluation import suites
from megatron_prune.study import custody
from megatron_prune.study.analysis import inference
from megatron_prune.study.analysis.conclusions import DocumentWindows
from megatron_prune.study.analysis.inference import (
    CONFIDENCE,
    FEWEST_QUESTIONS,
    Difference,
    OverDocuments,
    over_questions,
)
from megatron_prune.study.analysis.verdicts import p_value
from megatron_prune.study.grid import Subject, setting_words
from megatron_prune.study.prunings import Places
from megatron_prune.study.schema import StudyConfig

Record = Mapping[str, Any]
KINDS = ("suite", "task", "corpus")
TEST = "test"


@dataclass(frozen=True)
class Measure:
    """A corpus by its label, or tasks with the metric that counts of each: a suite's, or one."""

    kind: Literal["suite", "task", "corpus"]
    name: str
    metrics: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``paper-zero-shot, accuracy of 8 tasks``; ``piqa, acc_norm``; ``c4, loss``"""
        if self.kind == "corpus":
            return f"{self.name}, loss"
        if self.kind == "task":
            return f"{self.name}, {next(iter(self.metrics.values()))}"
        return f"{self.name}, accuracy of {len(self.metrics)} tasks"

    def accuracy(self, record: Record) -> float:
        """The mean over the tasks of a run's record."""
        tasks = record["tasks"]
        return float(np.mean([tasks[task]["metrics"][metric]["value"] for task, metric in self.metrics.items()]))

    def shown(self, gap: float, digits: int = 3) -> str:
        """A gap with its unit: ``+0.012 nats``, ``+1.2 points`` (of a hundred)."""
        return f"{gap:+.{digits}f} nats" if self.kind == "corpus" else f"{100 * gap:+.{digits - 1}f} points"


class Answers:
    """The scores of runs, read once each: losses of windows, and of every question."""

    def __init__(self, study: StudyConfig, places: Places, test: DocumentWindows):
        self.study, self.places = study, places
        self.windows = {TEST: test} | {
            label: DocumentWindows(study, places, label) for label in study.evaluation.corpora
        }
        self._tasks: dict[str, Mapping[str, Any]] = {}

    def of(self, cell: str) -> Mapping[str, Any]:
        """The entry ``tasks`` of a run's scores; empty if there is none."""
        if cell not in self._tasks:
            path = self.places.scores(cell)
            self._tasks[cell] = custody.read_scores(path).get("tasks", {}) if path.is_file() else {}
        return self._tasks[cell]

    def measures(self, cells: Sequence[str]) -> list[Measure]:
        """The study's measures, suites first; tasks by what a finished run has answered."""
        found = [Measure("corpus", label) for label in self.study.evaluation.corpora]
        answered = next((self.of(cell) for cell in cells if self.of(cell)), None)
        if answered is None:
            return found
        own, single = self.study.evaluation.suites, answered["single"]
        for name in self.study.evaluation.tasks:
            metrics = dict(suites.metrics_of(name, own) or {})
            for task in single.get(name, ()) if not metrics else ():
                if metric := suites.metric_that_counts(answered["questions"][task]["scores"]):
                    metrics[task] = metric
            if len(metrics) > 1 or (metrics and [*metrics] != [name]):
                found.append(Measure("suite", name, metrics))
            found += [Measure("task", task, {task: metric}) for task, metric in metrics.items()]
        once = {(one.kind, one.name): one for one in reversed(found)}
        return sorted(reversed(once.values()), key=lambda one: KINDS.index(one.kind))

    def questions(self, measure: Measure, cell: str) -> list[np.ndarray]:
        """The scores of every question [questions], task by task."""
        own = self.of(cell)["questions"]
        return [np.array(own[task]["scores"][metric]) for task, metric in measure.metrics.items()]

    def value(self, measure: Measure, cell: str, record: Record) -> float:
        """A run's score: a loss, or an accuracy."""
        if measure.kind == "corpus":
            return float(record["test_loss"] if measure.name == TEST else record["corpora"][measure.name])
        return measure.accuracy(record)

    def gaps(self, measure: Measure, pruned: str, scratch: str) -> list[np.ndarray]:
        """Gaps of every question of a pair of runs, task by task."""
        pairs = zip(self.questions(measure, pruned), self.questions(measure, scratch), strict=True)
        return [one - other for one, other in pairs]


@dataclass(frozen=True)
class MeasureVerdict(Subject):
    """One measure of one comparison, over all finished seeds: mean scores of both arms, and the gap."""

    tokens: int
    budget: int
    measure: Measure
    pruned: float
    scratch: float
    gap: Difference
    documents: OverDocuments | None = None
    questions: int | None = None
    family: int = 0
    corrected: float | None = None

    @property
    def winner(self) -> str:
        """``pruned``, ``scratch`` or ``neither``, by every interval and by the corrected p value."""
        if self.gap.low is None or (self.corrected is not None and self.corrected >= 1 - CONFIDENCE):
            return "neither"
        return "neither" if self.documents is not None and self.documents.holds_zero else self.gap.winner

    @property
    def words(self) -> str:
        """``shortgpt, 50% removed, equal total tokens: …``"""
        subject = f"{self.label}, {setting_words(self.setting)}{', against dense scratch' * self.dense}"
        names = {"pruned": "the pruned model is ahead", "scratch": "training from scratch is ahead",
                 "neither": "pruned and scratch cannot be told apart"}  # fmt: skip
        scores = (f"{self.pruned:.3f} against {self.scratch:.3f} nats" if self.measure.kind == "corpus"
                  else f"{self.pruned:.1%} against {self.scratch:.1%}")  # fmt: skip
        text = f"{subject}: {self.measure.title}: {names[self.winner]}, {scores}"
        if self.gap.low is not None and self.gap.high is not None:
            ends = f"{self.measure.shown(self.gap.low).partition(' ')[0]} to {self.measure.shown(self.gap.high)}"
            over = f"{self.gap.seeds} seed{'s' * (self.gap.seeds > 1)}"
            over += "" if self.questions is None else f" and {self.questions:,} questions"
            text += f"; gap {self.measure.shown(self.gap.mean)}, 95% interval {ends} over {over}"
        if self.questions is not None and self.gap.low is None:
            text += f"; no interval, which needs {FEWEST_QUESTIONS} questions in every task"
        if self.corrected is not None:
            text += f"; p {p_value(self.corrected)} by Holm over {self.family}"
        return f"{text}."

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"winner": self.winner, "words": self.words}


def judge(
    answers: Answers, groups: Mapping[Any, Sequence[Any]], records: Mapping[str, Record], planned: int
) -> tuple[MeasureVerdict, ...]:
    """A verdict for every measure of every group of matched comparisons (``results.Compared``).

    ``planned``: comparisons of the study's family, finished or not.
    """
    cells = [item.comparison.pruned for items in groups.values() for item in items]
    measures = answers.measures(cells)
    found = [
        one for measure in measures for items in groups.values() for one in _judge(answers, measure, items, records)
    ]
    for kind in KINDS:
        family = planned * sum(measure.kind == kind for measure in measures)
        own = [
            place
            for place, one in enumerate(found)
            if one.measure.kind == kind and one.gap.p is not None and answers.study.family.holds(vars(one))
        ]
        corrected = inference.holm_of_planned([found[place].gap.p or 0.0 for place in own], family)
        for place, p in zip(own, corrected, strict=True):
            found[place] = replace(found[place], family=max(family, len(own)), corrected=p)
    return tuple(found)


def _judge(
    answers: Answers, measure: Measure, items: Sequence[Any], records: Mapping[str, Record]
) -> Iterator[MeasureVerdict]:
    pairs = [(item.comparison.pruned, item.comparison.scratch) for item in items]
    scores = [[answers.value(measure, cell, records[cell]) for cell in pair] for pair in pairs]
    pruned, scratch = (list(arm) for arm in zip(*scores, strict=True))
    documents, questions = None, None
    if measure.kind == "corpus":
        gap = inference.paired(pruned, scratch)
        documents = answers.windows[measure.name].interval([one for one, _ in pairs], [other for _, other in pairs])
    else:
        of_pairs = [answers.gaps(measure, *pair) for pair in pairs]
        tables = [np.stack(task) for task in zip(*of_pairs, strict=True)]
        gap, questions = over_questions(tables), sum(table.shape[1] for table in tables)
    yield MeasureVerdict(
        **items[0].group,
        budget=items[0].comparison.budget,
        measure=measure,
        pruned=float(np.mean(pruned)),
        scratch=float(np.mean(scratch)),
        gap=gap,
        documents=documents,
        questions=questions,
    )
