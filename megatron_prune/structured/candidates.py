"""The selections that a method offers if the model's loss is to choose among them, and ``candidates.json``.

If a task is to choose, a candidate's accuracy on the task is stored too (and the whole parent's, for comparison).

``plan`` writes ``candidates.json`` as the question for ``calibrate --score``: method, settings and target shapes.
Readers derive the selections again from these and the statistics. If the best candidates are to be retrained, it is
the question for ``retrain-candidates`` too.

All candidates are scored on all windows, except those of a search: ``methods/halving.py`` sorts most out on few. Those
of a search for every layer's sizes (``size_evolution.py``) follow from the scores of the ones before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_prune import artifacts, methods
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.errors import CheckpointError, PlanError, UsageError
from megatron_prune.methods import halving, options
from megatron_prune.methods.allocation import OUTLIERS
from megatron_prune.methods.base import (
    Budget,
    Method,
    PruningRequest,
    RankingMethod,
    Retraining,
    Selection,
)
from megatron_prune.methods.units import UnitMethod
from megatron_prune.settings import Settings
from megatron_prune.structured.candidate import Candidate, Run, Standing
from megatron_prune.structured.size_evolution import SearchState, SizeEvolution
from megatron_prune.structured.statistics import Statistics, StatisticsError
from megatron_prune.training.learned_file import LearnedMasks

VERSION = 1
FILE = "candidates.json"
_DEPTH = options.MinitronDepthOptions()


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
        for another target; or the scores that choose the layers of a search over depth and width.
        """
        method = methods.get(self.method)
        tensors, tokens = self._read(method, statistics)
        if self.searches_sizes:
            assert isinstance(statistics, Statistics)
            return self._progress(statistics).tried
        stay = self._layers(statistics) if isinstance(statistics, Statistics) else {}
        if (made := self.__dict__.get("_made")) and made[0] is tensors_of(statistics) and made[1] == stay:
            return list(made[2])
        found: list[Candidate] = []
        for target in self.targets:
            layers = stay.get(target.num_layers)
            request = PruningRequest(
                self.source, target, self.settings, tensors, self.seed, tokens, self.budget, layers
            )
            alike = not isinstance(self.source, HeterogeneousShape)
            if isinstance(method, RankingMethod) and self.budget is None and alike:
                found.append(Candidate(self.source, target, partial(method.select, request)))
                continue
            for selection in method.candidates(request):
                reached = target if alike and self.budget is None else selection.shape(self.source)
                if self.budget is not None:
                    _refuse_off_budget(reached, self.budget)
                found.append(Candidate.of(self.source, reached, selection))
        self.__dict__["_made"] = (tensors_of(statistics), stay, found)  # their keys take time to compute
        return list(found)

    def _read(
        self, method: Method[Any], statistics: Statistics | LearnedMasks | None
    ) -> tuple[Mapping[str, torch.Tensor], int]:
        """What the method reads of ``statistics``, and the tokens that its sums are over; raises as ``candidates``."""
        if statistics is None and uses_statistics(method, self.settings):
            made_by = "learn-masks" if method.learned else "calibrate"
            raise StatisticsError(
                f"--statistics: expected a file, which {self.method} reads, got none; make it with {made_by}"
            )
        if statistics is None:
            return {}, 0
        if statistics.parent != self.parent or statistics.shape != self.source:
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
            return statistics.tensors, 0
        needed = method.needs(self.settings)
        if OUTLIERS in needed and OUTLIERS not in statistics.tensors:
            raise StatisticsError(
                "--statistics: expected those of one calibration, since --allocation owl reads outliers, got merged "
                "ones; calibrate on all windows at once"
            )
        if not statistics.tensors.keys() >= set(needed):
            raise StatisticsError(
                f"--statistics: expected those with gradients, which {self.method} reads, got those without; make "
                "them with calibrate --gradients"
            )
        return {key: statistics.tensors[key] for key in needed}, statistics.tokens

    @property
    def searches_sizes(self) -> bool:
        """True if candidates follow from the scores of those before, until every layer's sizes are found."""
        return methods.get(self.method).evolution(self.settings) is not None

    def _progress(self, statistics: Statistics) -> SearchState:
        """How far the search for every layer's sizes has come."""
        if (made := self.__dict__.get("_evolution")) is None or made[0] is not statistics.tensors:
            method = methods.get(self.method)
            assert isinstance(method, UnitMethod)
            tensors, tokens = self._read(method, statistics)
            (target,) = self.targets
            request = PruningRequest(self.source, target, self.settings, tensors, self.seed, tokens, self.budget)
            made = statistics.tensors, SizeEvolution(method, request, statistics.sequences)
            self.__dict__["_evolution"] = made
        evolution: SizeEvolution = made[1]
        return evolution.progress(statistics.loss_on)

    @property
    def dense(self) -> Candidate:
        """The whole parent, to which a task's accuracies are compared."""
        whole = Selection(tuple(range(self.source.num_layers)))
        return Candidate.of(self.source, self.source, whole)

    @property
    def halves(self) -> bool:
        """True if only the better candidates are run on all windows."""
        search = methods.get(self.method).search(self.settings)
        return self.searches_sizes or (search is not None and not search.shapes)

    def runs_of_layers(self) -> list[Candidate]:
        """Candidates without consecutive layers, at full width, for every depth that a search of depth and width tries.

        The best of each depth is what that search removes with it.
        """
        if not self.halves or self.searches_sizes:
            return []
        depths = sorted({target.num_layers for target in self.targets} - {self.source.num_layers})
        asked = [PruningRequest(self.source, replace(self.source, num_layers=n), _DEPTH) for n in depths]
        depth = methods.get("minitron-depth")
        return [Candidate.of(self.source, one.target, run) for one in asked for run in depth.candidates(one)]

    def _layers(self, statistics: Statistics) -> dict[int, tuple[int, ...]]:
        """The layers that stay, by their number, where a search of depth and width has other depths than the parent's.

        StatisticsError if they are not scored yet.
        """
        best: dict[int, tuple[float, tuple[int, ...]]] = {}
        for run in self.runs_of_layers():
            loss = statistics.loss_on(run.key, self._schedule(statistics)[0].windows)
            if loss is None:
                raise StatisticsError(
                    f"{self.method}: expected a loss without each run of layers, got none: run calibrate --score"
                )
            if run.target.num_layers not in best or loss < best[run.target.num_layers][0]:
                best[run.target.num_layers] = (loss, run.selection.layers)
        return {number: layers for number, (_, layers) in best.items()}

    def _schedule(self, statistics: Statistics) -> tuple[halving.Round, ...]:
        last = max(halving.LAST, self.retraining.candidates if self.retraining else 0)
        return halving.schedule(len(self.targets), statistics.sequences, last)

    def rounds(self, statistics: Statistics) -> list[Standing]:
        """Every round as far as the losses decide who is in it; not of candidates that a task decides between."""
        found = self.candidates(statistics)
        if not self.halves:
            return [Standing(statistics.sequences, list(range(len(found))), [])]
        if self.searches_sizes:
            return _standings(found, statistics)
        standings = [Standing(self._schedule(statistics)[0].windows, list(range(len(found))), [])]
        for following in self._schedule(statistics)[1:]:
            windows, left = standings[-1].windows, standings[-1].candidates
            losses = [loss for i in left if (loss := statistics.loss_on(found[i].key, windows)) is not None]
            if len(losses) < len(left):
                break
            kept, ties = halving.better(losses, following.candidates)
            standings.append(
                Standing(following.windows, [left[i] for i in kept], [tie.renumbered(left) for tie in ties])
            )
        return standings

    def next_run(self, statistics: Statistics) -> Run | None:
        """What must be run next to choose by loss; None if nothing is missing."""
        if runs := self.runs_of_layers():
            windows = self._schedule(statistics)[0].windows
            if missing := [c for c in runs if statistics.loss_on(c.key, windows) is None]:
                return Run(missing, windows)
        if self.searches_sizes:
            progress = self._progress(statistics)
            return Run(progress.missing, progress.windows) if progress.missing else None
        found, current = self.candidates(statistics), self.rounds(statistics)[-1]
        asked = [found[i] for i in current.candidates]
        if self.task is not None:
            asked = [self.dense, *asked]
        missing = [c for c in asked if statistics.loss_on(c.key, current.windows) is None]
        return Run(missing, current.windows) if missing else None

    @property
    def retraining(self) -> Retraining | None:
        """The retraining of the best candidates before one is chosen."""
        search = methods.get(self.method).search(self.settings)
        return search.retraining if search else None

    def unscored(self, statistics: Statistics) -> list[Candidate]:
        """The candidates that must be run next on windows of ``statistics``, or on the task."""
        if self.task is None:
            run = self.next_run(statistics)
            return run.candidates if run else []
        return [c for c in (self.dense, *self.candidates(statistics)) if not _has_task(c, statistics, self.task)]

    def finalists(self, statistics: Statistics) -> list[Candidate]:
        """The candidates to retrain: those with the lowest finite loss, best first. All have scores."""
        if self.retraining is None:
            return []
        offered = self.candidates(statistics)
        found = [offered[i] for i in self.rounds(statistics)[-1].candidates]
        found = [c for c in found if math.isfinite(statistics.scores[c.key].loss)]
        found.sort(key=lambda c: statistics.scores[c.key].loss)  # stable: the first among equals
        return found[: self.retraining.candidates]

    def unretrained(self, statistics: Statistics) -> list[Candidate]:
        """The ``finalists`` that have not yet been trained on the requested number of tokens."""
        return [c for c in self.finalists(statistics) if not self._has_retrained(c, statistics)]

    def _has_retrained(self, candidate: Candidate, statistics: Statistics) -> bool:
        found, asked = statistics.scores[candidate.key].retrained, self.retraining
        return found is not None and asked is not None and found.tokens == asked.tokens

    def write(self, path: str | Path, statistics: Statistics) -> None:
        """Write ``candidates.json`` atomically."""
        fields = asdict(self)
        if self.budget is None:
            del fields["budget"]
        run = self.next_run(statistics)
        found = run.candidates if run and self.runs_of_layers() else self.candidates(statistics)
        content = {
            "version": VERSION,
            **fields,
            "statistics": statistics.hash,
            "candidates": [{"candidate": c.label, "key": c.key} for c in found],
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


def _refuse_off_budget(reached: ModelShape, budget: Budget) -> None:
    """PlanError if the shape ``reached`` is off the budget."""
    if abs(error := budget.error(reached)) > budget.TOLERANCE:
        raise PlanError(
            f"expected layers that keep {budget.parameters:.0f} of the parameters ({budget.of}) within "
            f"{budget.TOLERANCE:.1%}, got layers that keep {budget.count(reached)}, {error:+.2%}"
        )


def _standings(found: Sequence[Candidate], statistics: Statistics) -> list[Standing]:
    """Which of ``found`` were run on how many windows; the last are those that were run on all."""
    known = {windows for c in found if (score := statistics.scores.get(c.key)) for windows in score.rounds}
    return [
        Standing(n, [i for i, c in enumerate(found) if statistics.loss_on(c.key, n) is not None], [])
        for n in sorted(known | {statistics.sequences})
    ]


def tensors_of(statistics: Statistics | LearnedMasks | None) -> object:
    """The object that says whether two statistics hold the same sums; scores may differ."""
    return None if statistics is None else statistics.tensors


def uses_statistics(method: Method[Any], settings: Settings) -> bool:
    """True if the method reads activations or scores, which are both in the statistics."""
    return bool(method.needs(settings)) or method.needs_scores(settings)


def _has_task(candidate: Candidate, statistics: Statistics, task: str) -> bool:
    score = statistics.scores.get(candidate.key)
    return score is not None and task in score.tasks
