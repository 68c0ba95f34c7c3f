"""Choosing among candidates, and the cost of it.

The lowest LM loss on the calibration windows wins; with a task, the highest accuracy; with retraining, the lowest loss
after it. The plan's table keeps every candidate's numbers, those of a search in every round that it was in. A loss that
is not finite (an overflow, a training that diverged) is stored as infinite and never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_prune import methods
from megatron_prune.errors import PlanError
from megatron_prune.methods.base import NearTie
from megatron_prune.methods.ranking import highest_accuracy, lowest_loss, lowest_losses
from megatron_prune.structured.candidate import Candidate, Standing
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics, StatisticsError, loss_of


@dataclass(frozen=True)
class Scored:
    """A candidate's row in the table that a plan keeps."""

    candidate: str
    parameters: int
    loss: float  # infinite if it was not finite
    accuracy: float | None = None  # if a task decides
    rounds: tuple[tuple[int, float], ...] | None = None  # in a search: windows, and the loss on the first so many
    retrained_loss: float | None = None  # of the retrained ones, of which one is chosen

    @property
    def windows(self) -> int:
        """The windows that ``loss`` is on, in a search; else 0."""
        return self.rounds[-1][0] if self.rounds else 0


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
    rounds = question.rounds(statistics)
    scores = [statistics.scores[c.key] for c in found]
    table = [Scored(c.label, c.target.parameters(), s.loss) for c, s in zip(found, scores, strict=True)]
    if question.halves:
        table = [_in_rounds(row, i, c, rounds, statistics) for i, (row, c) in enumerate(zip(table, found, strict=True))]
    standing = rounds[-1].candidates
    usable = [standing[i] for i in _finite([table[i].loss for i in standing], f"{question.method}: no candidate")]
    survived = [tie for each in rounds for tie in each.ties]
    if task := methods.get(question.method).task(question.settings):
        assert question.task is not None
        accuracies = [score.tasks[question.task].accuracies[task.metric] for score in scores]
        table = [replace(row, accuracy=a.share) for row, a in zip(table, accuracies, strict=True)]
        best, ties = highest_accuracy([accuracies[i] for i in usable], [table[i].loss for i in usable])
        return usable[best], table, [tie.renumbered(usable) for tie in ties]
    if not (finalists := question.finalists(statistics)):
        best, ties = lowest_loss([table[i].loss for i in usable])
        return usable[best], table, [*(tie.renumbered(usable) for tie in ties), *survived]
    keys = {c.key for c in finalists}
    tried = [i for i, c in enumerate(found) if c.key in keys]
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
    ties = [tie.renumbered(trained) for tie in ties]
    return trained[best], table, [*ties, *(tie.renumbered(usable) for tie in cut), *survived]


def _in_rounds(
    row: Scored, number: int, candidate: Candidate, rounds: Sequence[Standing], statistics: Statistics
) -> Scored:
    """``row`` with the losses of the rounds that its candidate was in."""
    entered = [each.windows for each in rounds if number in each.candidates]
    losses = tuple((windows, loss_of(statistics.loss_on(candidate.key, windows))) for windows in entered)
    return replace(row, loss=losses[-1][1], rounds=losses)


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


def spent(question: Question, found: Sequence[Candidate], statistics: Statistics) -> dict[str, Any]:
    """The cost of scoring ``found``, as entries of a plan's ``calibration``.

    ``scoring`` counts forward passes, ``retraining`` training, whose tokens count as trained on by pruning itself.
    """
    runs = {c.key: c for c in (*found, *question.runs_of_layers())}.values()
    flops = sum(_windows(c, statistics) * c.scoring_flops(statistics.seq_length) for c in runs)
    scoring: dict[str, Any] = {"candidates": len(found), "flops": flops}
    if task := methods.get(question.method).task(question.settings):
        assert question.task is not None
        judged = [statistics.scores[c.key].tasks[question.task] for c in (question.dense, *found)]
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
        after = [one for c in finalists if (one := statistics.scores[c.key].retrained)]
        entries["retraining"] = {
            "candidates": len(after),
            "tokens": sum(one.tokens for one in after),
            "flops": sum(one.flops for one in after),
            "recipe": after[0].recipe,
        }
    return entries


def _windows(candidate: Candidate, statistics: Statistics) -> int:
    """The calibration windows on which it was run."""
    windows = statistics.scores[candidate.key].windows
    return statistics.sequences if windows is None else windows
