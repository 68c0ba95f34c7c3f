"""One candidate of a choice by loss, and the scores that statistics hold of it.

A candidate is a selection of layers, hidden channels, heads and FFN channels to keep. Its score is the parent's mean
loss on the calibration windows with only these running. The statistics store it under the selection's key, so that a
score made for one plan serves every other plan that asks about the same selection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.methods.base import DIMENSIONS, NearTie, Selection
from megatron_prune.structured.statistics import Score, Statistics, TaskScore, loss_of


@dataclass(frozen=True)
class Candidate:
    """One of the selections among which the model's loss chooses.

    ``choose`` makes the selection when it is asked for: a large model has too many indices to hold those of a whole
    search at once.
    """

    source: ModelShape
    target: ModelShape
    choose: Callable[[], Selection]

    @staticmethod
    def of(source: ModelShape, target: ModelShape, selection: Selection) -> Candidate:
        """One whose selection is made already."""
        return Candidate(source, target, partial(_same, selection))

    @property
    def selection(self) -> Selection:
        return self.choose()

    @cached_property
    def key(self) -> str:
        """Its selection's, under which scores are stored."""
        return self.selection.key

    @property
    def skips_layers_only(self) -> bool:
        """True if every layer that stays is whole."""
        if isinstance(self.source, HeterogeneousShape):
            kept = self.selection
            return kept.hidden is None and kept.heads is None and kept.ffn is None
        return replace(self.source, num_layers=self.target.num_layers) == self.target

    @property
    def label(self) -> str:
        """What it removes or keeps, in words."""
        shape, layers = self.target, self.source.num_layers
        if shape == self.source:
            return "dense"
        if self.skips_layers_only:
            return f"without layers {numbers_in_words(sorted(set(range(layers)) - set(self.selection.layers)))}"
        fewer = f"{shape.num_layers} layers, " if shape.num_layers < layers else ""
        heads, groups, ffn = map(shape.range_of, DIMENSIONS[2:])
        return f"{fewer}hidden {shape.hidden_size}, {heads} heads in {groups} groups, FFN {ffn}"

    def scoring_flops(self, seq_length: int) -> int:
        """FLOPs of one sequence through it: removed layers are skipped, but channels are only masked."""
        if self.target.num_layers == self.source.num_layers:
            return self.source.forward_flops(seq_length)
        sizes = self.source.by_layer()
        return self.source.with_layers([sizes[layer] for layer in self.selection.layers]).forward_flops(seq_length)


@dataclass(frozen=True)
class Run:
    """What must be run next: these candidates, on the first ``windows`` calibration windows."""

    candidates: list[Candidate]
    windows: int


@dataclass(frozen=True)
class Standing:
    """A round of a search: the candidates in it, by number, on the first ``windows`` windows; and the near-ties of the
    cut that they survived."""

    windows: int
    candidates: list[int]
    ties: list[NearTie]


def _same(selection: Selection) -> Selection:
    return selection


def with_scores(
    statistics: Statistics, found: Sequence[Candidate], losses: Sequence[float], windows: int | None = None
) -> Statistics:
    """``statistics`` with the losses of these candidates added: on all windows, or on the first ``windows``."""
    scores = dict(statistics.scores)
    for candidate, loss in zip(found, losses, strict=True):
        score, loss = scores.get(candidate.key), loss_of(loss)
        if windows is None or windows == statistics.sequences:
            new = Score(candidate.label, loss) if score is None else replace(score, loss=loss, windows=None)
        elif score is None:
            new = Score(candidate.label, loss, windows=windows, rounds={windows: loss})
        else:
            new = replace(score, rounds={**score.rounds, windows: loss})
            if score.windows is not None and windows > score.windows:
                new = replace(new, loss=loss, windows=windows)
        scores[candidate.key] = new
    return replace(statistics, scores=scores)


def with_accuracies(
    statistics: Statistics, found: Sequence[Candidate], task: str, accuracies: Sequence[TaskScore]
) -> Statistics:
    """``statistics`` with the accuracies on ``task`` (a fingerprint) of these candidates, which have losses, added."""
    scores = dict(statistics.scores)
    for candidate, score in zip(found, accuracies, strict=True):
        earlier = scores[candidate.key]
        scores[candidate.key] = replace(earlier, tasks={**earlier.tasks, task: score})
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
