"""Which of the candidates is chosen, and what it took to find out.

The lowest LM loss on the calibration windows wins; where a task decides, the highest accuracy; where
the best are retrained, the lowest loss after that. Every candidate's numbers are kept in the plan's table.
A loss that is not finite (an overflow, a training that diverged) is kept as infinite, and never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_prune import methods
from megatron_prune.calibrate.statistics import Statistics, StatisticsError
from megatron_prune.candidates import Candidate, Question
from megatron_prune.errors import PlanError
from megatron_prune.methods import NearTie
from megatron_prune.ranking import highest_accuracy, lowest_loss, lowest_losses


@dataclass(frozen=True)
class Scored:
    """A candidate's row in the table that a plan keeps."""

    candidate: str
    parameters: int
    loss: float  # infinite where it is not finite
    accuracy: float | None = None  # where a task decides
    retrained_loss: float | None = None  # of those that were retrained, one of which is chosen


def judge(
    question: Question, found: Sequence[Candidate], statistics: Statistics
) -> tuple[int, list[Scored], list[NearTie]]:
    """Index of the best of ``found``, the table of all, and what lies within rounding of the best.

    Where the best are retrained, which of them are is a cut too, between a ``finalist`` and one that is none.

    Judged by loss, by a task's accuracy, or, where the best are retrained, by their loss after that.
    PlanError where no loss is finite.
    """
    if missing := question.unscored(statistics):
        raise StatisticsError(f"{question.method}: {len(missing)} of {len(found)} candidates have no score yet")
    if waiting := question.unretrained(statistics):
        raise StatisticsError(f"{question.method}: {len(waiting)} candidates have not been retrained yet")
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
        raise StatisticsError("the candidates were not all retrained by the same recipe: run rescore again")
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
    """Places of the finite losses; PlanError where there is none."""
    if places := [i for i, loss in enumerate(losses) if math.isfinite(loss)]:
        return places
    raise PlanError(
        f"{nobody} has a finite loss on the calibration text: there is nothing to choose "
        "(try bf16 or fp32 in place of fp16, or a lower --lr where they were retrained)"
    )


def _renumbered(tie: NearTie, numbers: Sequence[int]) -> NearTie:
    """``tie`` between places of ``numbers`` as one between the candidates that stand there."""
    others = tuple(sorted(numbers[i] for i in tie.others))
    return replace(tie, kept=numbers[tie.kept], removed=numbers[tie.removed], others=others)


def spent(question: Question, found: Sequence[Candidate], statistics: Statistics) -> dict[str, Any]:
    """What judging ``found`` took, as entries of a plan's ``calibration``.

    ``scoring`` are forward passes, ``retraining`` is training: its tokens are what pruning itself trained on.
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
