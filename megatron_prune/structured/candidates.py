"""Candidates: the selections that a method offers if the model's loss is to choose, and ``candidates.json``.

A candidate is a selection of layers, hidden channels, heads and FFN channels to keep. Its score is the parent's mean
loss on the calibration windows with only these running. If a task is to choose, its accuracy on the task is stored
too (and the whole parent's, for comparison). The statistics store scores under the selection's key, so that a score
made for one plan serves every other plan that asks about the same selection.

``plan`` writes ``candidates.json`` as the question for ``calibrate --score``: method, settings and target shapes.
Readers derive the selections again from these and the statistics. If the best candidates are to be retrained, it is
the question for ``retrain-candidates`` too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, methods
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import CheckpointError, PlanError, UsageError
from megatron_prune.methods import options
from megatron_prune.methods.base import DIMENSIONS, Budget, Method, NearTie, PruningRequest, Retraining, Selection
from megatron_prune.methods.ranking import highest_accuracy, lowest_loss, lowest_losses
from megatron_prune.settings import Settings
from megatron_prune.structured.statistics import Score, Statistics, StatisticsError, TaskScore, loss_of
from megatron_prune.training.learned_file import LearnedMasks

VERSION = 1
FILE = "candidates.json"


@dataclass(frozen=True)
class Candidate:
    """One of the selections among which the model's loss chooses."""

    source: ModelShape
    target: ModelShape
    selection: Selection

    @property
    def label(self) -> str:
        """What it removes or keeps, in words."""
        kept, shape = self.selection, self.target
        if shape == self.source:
            return "dense"
        if kept.hidden is None and kept.heads is None and kept.ffn is None:
            return f"without layers {numbers_in_words(sorted(set(range(self.source.num_layers)) - set(kept.layers)))}"
        heads, groups, ffn = map(shape.range_of, DIMENSIONS[2:])
        return f"hidden {shape.hidden_size}, {heads} heads in {groups} groups, FFN {ffn}"

    def scoring_flops(self, seq_length: int) -> int:
        """FLOPs of one sequence through it: removed layers are skipped, but channels are only masked."""
        sizes = self.source.by_layer()
        return self.source.with_layers([sizes[layer] for layer in self.selection.layers]).forward_flops(seq_length)


@dataclass(frozen=True)
class Question:
    """Which of these shapes, and which of a method's selections for them, is best?"""

    method: str
    settings: Settings  # the method's own
    source: ModelShape
    targets: tuple[ModelShape, ...]
    parent: str  # fingerprint
    seed: int | None = None
    task: str | None = None  # fingerprint of the task whose accuracy decides; None: the loss decides
    budget: Budget | None = None  # where layers may differ

    def candidates(self, statistics: Statistics | LearnedMasks | None) -> list[Candidate]:
        """The candidates that the method offers, in order; one if nothing competes.

        Raises StatisticsError if it needs statistics that are missing, of another parent, or masks that were learned
        for another target.
        """
        method = methods.get(self.method)
        if statistics is None and uses_statistics(method, self.settings):
            made_by = "learn-masks" if method.learned else "calibrate"
            raise StatisticsError(
                f"--statistics: expected a file, which {self.method} reads, got none; make it with {made_by}"
            )
        if statistics is not None and (statistics.parent != self.parent or statistics.shape != self.source):
            raise StatisticsError(
                f"the statistics are of another parent: expected the fingerprint {self.parent}, got "
                f"{statistics.parent}; run calibrate on this parent"
            )
        if isinstance(statistics, LearnedMasks):
            if statistics.target not in self.targets:
                raise StatisticsError(
                    f"--statistics: expected masks for {self.targets[0]}, got masks that were learned for "
                    f"{statistics.target}; ask for that target, or learn others"
                )
            tensors, tokens = statistics.tensors, 0
        else:
            needed = method.needs(self.settings) if statistics else ()
            if statistics is not None and not statistics.tensors.keys() >= set(needed):
                raise StatisticsError(
                    f"--statistics: expected those with gradients, which {self.method} reads, got those without; make "
                    "them with calibrate --gradients"
                )
            tensors = {key: statistics.tensors[key] for key in needed} if statistics else {}
            tokens = statistics.tokens if statistics else 0
        found = []
        for target in self.targets:
            request = PruningRequest(self.source, target, self.settings, tensors, self.seed, tokens, self.budget)
            for selection in method.candidates(request):
                reached = target if self.budget is None else _on_budget(selection.shape(self.source), self.budget)
                found.append(Candidate(self.source, reached, selection))
        return found

    @property
    def dense(self) -> Candidate:
        """The whole parent, to which a task's accuracies are compared."""
        return Candidate(self.source, self.source, Selection(tuple(range(self.source.num_layers))))

    @property
    def retraining(self) -> Retraining | None:
        """The retraining of the best candidates before one is chosen."""
        search = methods.get(self.method).search(self.settings)
        return search.retraining if search else None

    def unscored(self, statistics: Statistics) -> list[Candidate]:
        """The candidates without a score on the windows of ``statistics``, or without one on the task."""
        asked = self.candidates(statistics)
        if self.task is None:
            return [c for c in asked if c.selection.key not in statistics.scores]
        return [c for c in (self.dense, *asked) if not _has_task(c, statistics, self.task)]

    def finalists(self, statistics: Statistics) -> list[Candidate]:
        """The candidates to retrain: those with the lowest finite loss, best first. All have scores."""
        if self.retraining is None:
            return []
        found = [c for c in self.candidates(statistics) if math.isfinite(statistics.scores[c.selection.key].loss)]
        found.sort(key=lambda c: statistics.scores[c.selection.key].loss)  # stable: the first among equals
        return found[: self.retraining.candidates]

    def unretrained(self, statistics: Statistics) -> list[Candidate]:
        """The ``finalists`` that have not yet been trained on the requested number of tokens."""
        return [c for c in self.finalists(statistics) if not self._has_retrained(c, statistics)]

    def _has_retrained(self, candidate: Candidate, statistics: Statistics) -> bool:
        found, asked = statistics.scores[candidate.selection.key].retrained, self.retraining
        return found is not None and asked is not None and found.tokens == asked.tokens

    def write(self, path: str | Path, statistics: Statistics) -> None:
        """Write ``candidates.json`` atomically."""
        fields = asdict(self)
        if self.budget is None:
            del fields["budget"]
        content = {
            "version": VERSION,
            **fields,
            "statistics": statistics.hash,
            "candidates": [{"candidate": c.label, "key": c.selection.key} for c in self.candidates(statistics)],
        }
        artifacts.write_json(path, content)


def read(path: str | Path) -> tuple[Question, str]:
    """A ``candidates.json`` and the hash of the statistics that it is about; PlanError if it is damaged."""
    content = artifacts.read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise PlanError(f"{path}: expected candidates of version {VERSION}, got another file: run plan again")
    try:
        fields = {key: content[key] for key in Question.__dataclass_fields__ if key != "budget"}
        budget = content.get("budget")
        typed = {
            "settings": options.STRUCTURED[fields["method"]].read(fields["settings"]),
            "source": ModelShape.read(fields["source"]),
            "targets": tuple(ModelShape.read(target) for target in fields["targets"]),
            "budget": None if budget is None else Budget(**budget),
        }
        if not isinstance(content["statistics"], str):
            raise TypeError("statistics")
        return Question(**{**fields, **typed}), content["statistics"]
    except (KeyError, TypeError, ValueError, AttributeError, CheckpointError, UsageError) as error:
        why = str(error) if isinstance(error, CheckpointError) else repr(error)
        raise PlanError(f"{path} is damaged: {why}; run plan again") from error


def _on_budget(reached: ModelShape, budget: Budget) -> ModelShape:
    """``reached``; PlanError if it is off the budget."""
    if abs(error := budget.error(reached)) > budget.TOLERANCE:
        raise PlanError(
            f"expected layers that keep {budget.parameters:.0f} of the parameters ({budget.of}) within "
            f"{budget.TOLERANCE:.1%}, got layers that keep {budget.count(reached)}, {error:+.2%}"
        )
    return reached


def uses_statistics(method: Method[Any], settings: Settings) -> bool:
    """True if the method reads activations or scores, which are both in the statistics."""
    return bool(method.needs(settings)) or method.needs_scores(settings)


def _has_task(candidate: Candidate, statistics: Statistics, task: str) -> bool:
    score = statistics.scores.get(candidate.selection.key)
    return score is not None and task in score.tasks


def with_scores(statistics: Statistics, found: Sequence[Candidate], losses: Sequence[float]) -> Statistics:
    """``statistics`` with the losses of these candidates added."""
    scores = {
        candidate.selection.key: Score(candidate.label, loss_of(loss))
        for candidate, loss in zip(found, losses, strict=True)
    }
    return replace(statistics, scores={**statistics.scores, **scores})


def with_accuracies(
    statistics: Statistics, found: Sequence[Candidate], task: str, accuracies: Sequence[TaskScore]
) -> Statistics:
    """``statistics`` with the accuracies on ``task`` (a fingerprint) of these candidates, which have losses, added."""
    scores = dict(statistics.scores)
    for candidate, score in zip(found, accuracies, strict=True):
        earlier = scores[candidate.selection.key]
        scores[candidate.selection.key] = replace(earlier, tasks={**earlier.tasks, task: score})
    return replace(statistics, scores=scores)


def numbers_in_words(numbers: Sequence[int]) -> str:
    """``(0, 1, 2, 5)`` → ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# Choosing among candidates, and the cost of it. The lowest LM loss on the calibration windows wins; with a task, the
# highest accuracy; with retraining, the lowest loss after it. The plan's table keeps every candidate's numbers. A loss
# that is not finite (an overflow, a training that diverged) is stored as infinite and never chosen.


@dataclass(frozen=True)
class Scored:
    """A candidate's row in the table that a plan keeps."""

    candidate: str
    parameters: int
    loss: float  # infinite if it was not finite
    accuracy: float | None = None  # if a task decides
    retrained_loss: float | None = None  # of the retrained ones, of which one is chosen


def judge(
    question: Question, found: Sequence[Candidate], statistics: Statistics
) -> tuple[int, list[Scored], list[NearTie]]:
    """Index of the best of ``found``, the table of all, and the near-ties of the choice.

    The best has the lowest loss, the highest accuracy on a task, or, if the best are retrained, the lowest loss after
    that. Choosing which candidates to retrain is a cut too, between a ``finalist`` and the rest.
    PlanError if no loss is finite.
    """
    if missing := question.unscored(statistics):
        raise StatisticsError(
            f"{question.method}: expected scores for all {len(found)} candidates, got none for {len(missing)}: run "
            "calibrate --score"
        )
    if waiting := question.unretrained(statistics):
        raise StatisticsError(
            f"{question.method}: expected retrained candidates, got {len(waiting)} that are not: run retrain-candidates"
        )
    scores = [statistics.scores[c.selection.key] for c in found]
    table = [Scored(c.label, c.target.parameters(), s.loss) for c, s in zip(found, scores, strict=True)]
    usable = _finite([row.loss for row in table], f"{question.method}: no candidate")
    if task := methods.get(question.method).task(question.settings):
        assert question.task is not None
        accuracies = [score.tasks[question.task].accuracies[task.metric] for score in scores]
        table = [replace(row, accuracy=a.share) for row, a in zip(table, accuracies, strict=True)]
        best, ties = highest_accuracy([accuracies[i] for i in usable], [table[i].loss for i in usable])
        return usable[best], table, [_renumbered(tie, usable) for tie in ties]
    if not (finalists := question.finalists(statistics)):
        best, ties = lowest_loss([table[i].loss for i in usable])
        return usable[best], table, [_renumbered(tie, usable) for tie in ties]
    keys = {c.selection.key for c in finalists}
    tried = [i for i, c in enumerate(found) if c.selection.key in keys]
    after = {i: retrained for i in tried if (retrained := scores[i].retrained)}
    assert question.retraining is not None
    _, cut = lowest_losses([table[i].loss for i in usable], question.retraining.candidates, "finalist")
    if len({one.recipe for one in after.values()}) > 1:
        raise StatisticsError(
            "expected one recipe for all retrained candidates, got several: run retrain-candidates again"
        )
    table = [replace(row, retrained_loss=after[i].loss if i in after else None) for i, row in enumerate(table)]
    trained = _finite([after[i].loss for i in tried], f"{question.method}: no candidate that was retrained")
    trained = [tried[i] for i in trained]
    best, ties = lowest_loss([after[i].loss for i in trained])
    ties = [_renumbered(tie, trained) for tie in ties]
    return trained[best], table, [*ties, *(_renumbered(tie, usable) for tie in cut)]


def loss_text(loss: float) -> str:
    """A loss for people."""
    return f"{loss:.5f}" if math.isfinite(loss) else "not finite"


def _finite(losses: Sequence[float], nobody: str) -> list[int]:
    """Indices of the finite losses; PlanError if there are none."""
    if places := [i for i, loss in enumerate(losses) if math.isfinite(loss)]:
        return places
    raise PlanError(
        f"{nobody} has a finite loss on the calibration text, expected at least one: use bf16 or fp32 in place of "
        "fp16, or a lower --lr if they were retrained"
    )


def _renumbered(tie: NearTie, numbers: Sequence[int]) -> NearTie:
    """``tie`` between indices of ``numbers`` as one between the candidates with these numbers."""
    others = tuple(sorted(numbers[i] for i in tie.others))
    return replace(tie, kept=numbers[tie.kept], removed=numbers[tie.removed], others=others)


def spent(question: Question, found: Sequence[Candidate], statistics: Statistics) -> dict[str, Any]:
    """The cost of scoring ``found``, as entries of a plan's ``calibration``.

    ``scoring`` counts forward passes, ``retraining`` training, whose tokens count as trained on by pruning itself.
    """
    flops = statistics.sequences * sum(c.scoring_flops(statistics.seq_length) for c in found)
    scoring: dict[str, Any] = {"candidates": len(found), "flops": flops}
    if task := methods.get(question.method).task(question.settings):
        assert question.task is not None
        judged = [statistics.scores[c.selection.key].tasks[question.task] for c in (question.dense, *found)]
        scoring["flops"] += sum(score.flops for score in judged)
        scoring["flops"] += statistics.sequences * question.dense.scoring_flops(statistics.seq_length)
        scoring["task"] = {
            "path": task.path,
            "fingerprint": question.task,
            "metric": task.metric,
            "dense": asdict(judged[0].accuracies[task.metric]),
        }
    entries: dict[str, Any] = {"scoring": scoring}
    if finalists := question.finalists(statistics):
        after = [one for c in finalists if (one := statistics.scores[c.selection.key].retrained)]
        entries["retraining"] = {
            "candidates": len(after),
            "tokens": sum(one.tokens for one in after),
            "flops": sum(one.flops for one in after),
            "recipe": after[0].recipe,
        }
    return entries
