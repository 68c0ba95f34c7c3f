"""Make a plan from statistics and a target, or the candidates among which the model must choose first.

Needs no model and no GPU: only the parent's shape and fingerprint are read. One calibration serves every method and
every ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune import methods, verbs
from megatron_prune.artifacts import refuse_unwritable
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import UsageError
from megatron_prune.settings import Settings
from megatron_prune.structured import choice as choices
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidate import Candidate
from megatron_prune.structured.candidates import FILE, Question
from megatron_prune.structured.plan import PruningPlan
from megatron_prune.training import learned_file


@dataclass(frozen=True)
class Unscored:
    """Candidates written to ``file``, among which the model must choose; ``missing`` lack a score or, with
    ``retraining``, their retraining on that many tokens each."""

    file: Path
    missing: Sequence[Candidate]
    retraining: int | None


def make_plan(asked: verbs.PlanSettings, own: Settings) -> PruningPlan | Unscored:
    """The plan that ``asked`` and the method's ``own`` settings describe, written to ``asked.output``."""
    method = methods.get(asked.method)
    if asked.seed is not None and not method.draws(own):
        expected = f"no such flag with --method {asked.method}, which draws no random numbers"
        raise UsageError("--seed", got=asked.seed, expected=expected)
    if asked.seed is not None and asked.seed < 0:
        raise UsageError("--seed", got=asked.seed, expected="0 or more")
    choice = choices.choose(
        asked.method, asked, own, tensor_parallel=asked.tensor_model_parallel_size, seed=asked.seed or 0,
        exportable=asked.exportable,
    )  # fmt: skip
    if asked.statistics and not choice.needs_statistics:
        raise UsageError(
            "--statistics",
            got=" ".join(asked.statistics),
            expected=f"no such flag with --method {asked.method}, which needs no statistics",
        )
    if choice.needs_statistics and not asked.statistics:
        raise UsageError(
            "--statistics",
            got="nothing",
            expected=f"a file of statistics, which --method {asked.method} reads",
            do=f"make one with {'learn-masks' if method.learned else 'calibrate'}",
        )
    refuse_unwritable("--output", asked.output)
    if Path(asked.output).resolve() in [Path(path).resolve() for path in asked.statistics]:
        raise UsageError("--output", got=asked.output, expected="another file than --statistics")
    parent = open_checkpoint(asked.load)
    if asked.verify_integrity:
        parent.verify(hashes=True)
    question = choice.question(parent)  # refuse an impossible target before reading statistics
    if method.learned:
        made = choice.make(question, _masks(asked))
        made.write(asked.output)
        return made
    statistics = None
    if asked.statistics:
        statistics = statistics_file.merge([statistics_file.read(path) for path in asked.statistics])
    if choice.needs_scores:
        assert statistics is not None
        if missing := question.unscored(statistics):
            return _ask(question, statistics, asked, missing, retrain=False)
        if missing := question.unretrained(statistics):
            return _ask(question, statistics, asked, missing, retrain=True)
    made = choice.make(question, statistics)
    made.write(asked.output)
    return made


def _masks(asked: verbs.PlanSettings) -> learned_file.LearnedMasks:
    if len(asked.statistics) > 1:
        raise UsageError("--statistics", got=" ".join(asked.statistics), expected="one file of learned masks")
    return learned_file.read(asked.statistics[0])


def unsettled(asked: verbs.PlanSettings) -> list[str]:
    """What of learned masks says something else than the plan that was made of them; nothing of other statistics."""
    return [str(row) for row in _masks(asked).unsettled()] if methods.get(asked.method).learned else []


def _ask(
    question: Question,
    statistics: statistics_file.Statistics,
    asked: verbs.PlanSettings,
    missing: Sequence[Candidate],
    *,
    retrain: bool,
) -> Unscored:
    """Write the candidates; the ``missing`` ones must be run."""
    path = Path(asked.output).with_name(FILE)
    question.write(path, statistics)
    if len(asked.statistics) > 1:
        lack = "have not been retrained" if retrain else "have no score"
        raise UsageError(
            "--statistics",
            got=" ".join(asked.statistics),
            expected="one file until its candidates are scored",
            why=f"{len(missing)} candidates {lack} in all of them",
        )
    retraining = question.retraining
    return Unscored(path, missing, retraining.tokens if retrain and retraining else None)
