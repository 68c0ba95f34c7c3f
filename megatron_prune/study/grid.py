"""The grid: every run of a study, with shared work once, and the comparisons that it is for.

    parent ─▶ calibration (one a set of windows) ─▶ pruning (method x ratio x seed) ─▶ pruned (x budget)
                                                       ├─ shape ─▶ scratch (shape x setting x budget x seed)
                                                       └─ masks ─▶ scratch (masks x setting x budget x seed)

A sparse method leaves the parent's shape and makes masks. Its scratch runs are trained under these
masks, every parameter initialised anew (``masked``); or without any (``dense``: all sparse methods of a
study share that run). ``prunings`` is known from study.yaml alone. The training cells need the shapes
that the plans chose, so ``expand`` takes them; before they are known, ``expand(study, lay, {})`` names a
scratch cell after its pruning. Nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_prune.study.budgets import Lay, SampleRange
from megatron_prune.study.config import Study
from megatron_prune.study.sections import Method
from megatron_prune.study.values import Scratch, Setting

Kind = Literal["parent", "calibration", "pruning", "pruned", "scratch"]
Shape = Mapping[str, Any]  # a ModelShape as JSON: a plan's ``target``


@dataclass(frozen=True)
class Pruning:
    """One method at one ratio (None: at its explicit target) under one seed."""

    method: Method
    ratio: float | None
    seed: int

    @property
    def name(self) -> str:
        amount = "target" if self.ratio is None else f"r{100 * self.ratio:g}"
        return f"{self.method.tag}-{amount}-s{self.seed}"

    @property
    def cell(self) -> str:
        return f"pruning-{self.name}"

    @property
    def subject(self) -> tuple[str, str | None, float | None]:
        """What is the same for all seeds: what it is called, its pattern, its ratio."""
        return self.method.title, self.method.pattern, self.ratio


@dataclass(frozen=True)
class TrainingCell:
    """A run of ``pretrain`` and ``evaluate``: where it starts, what it consumes, under which seed.

    ``source`` is the pruning whose checkpoint gives the weights (pruned) or only the shape (scratch);
    ``masked``: its masks too.
    """

    id: str
    kind: Literal["pruned", "scratch"]
    source: Pruning
    samples: SampleRange
    seed: int
    masked: bool = False


@dataclass(frozen=True)
class Comparison:
    """A pruned run and the scratch run that it is measured against; ``scratch`` None: not run, and why."""

    pruning: Pruning
    setting: Setting
    against: Scratch
    budget: int
    seed: int
    pruned: str
    scratch: str | None
    not_run: str = ""


@dataclass(frozen=True)
class Grid:
    """All training cells, each once, and all comparisons between them."""

    cells: tuple[TrainingCell, ...]
    comparisons: tuple[Comparison, ...]


def calibration_cell(study: Study, seed: int) -> str:
    """The cell whose statistics a seed's plans read: one for all seeds when the windows are."""
    return f"calibration-s{seed}" if study.calibration.sampling == "random" else "calibration"


def calibration_tokens(study: Study) -> int:
    return study.calibration.sequences * study.calibration_seq_length


def prunings(study: Study) -> list[Pruning]:
    """Every method at every ratio under every seed; a method with a target has no ratio, N:M its own."""
    return [
        Pruning(method, ratio, seed)
        for method in study.methods
        for ratio in ([None] if method.target else [method.own_ratio] if method.own_ratio else study.ratios)
        for seed in study.seeds
    ]


def notes(study: Study) -> list[str]:
    """What of study.yaml does not apply as it may seem to."""
    return [
        f"{method.tag} runs once, at {100 * method.own_ratio:g}%: {method.pattern} says how much is removed, "
        f"not ratios: {study.ratios}"
        for method in study.methods
        if method.own_ratio is not None and study.ratios != [method.own_ratio]
    ]


def expand(study: Study, lay: Lay, shapes: Mapping[str, Shape], consumed: Mapping[str, int]) -> Grid:
    """The training cells and comparisons.

    ``shapes`` maps a pruning's name to its target shape; ``consumed`` to the tokens that pruning read.
    Prunings of one shape share their dense scratch runs wherever those would consume the same samples.
    """
    cells: dict[str, TrainingCell] = {}
    comparisons = []
    for pruning in prunings(study):
        sparse, seed = pruning.method.pattern is not None, pruning.seed
        for budget in study.budgets:
            retrain = lay.retrain(budget)
            tokens = retrain.steps * lay.batch.tokens
            pruned = f"pruned-{pruning.name}-t{tokens}"
            cells[pruned] = TrainingCell(pruned, "pruned", pruning, retrain, seed, masked=sparse)
            for setting, against in study.compared(pruning.method):
                reason, scratch = _not_run(study, lay, setting), None
                if not reason:
                    samples = (
                        retrain
                        if setting == "equal-training"
                        else lay.scratch_total(tokens, consumed.get(pruning.name, 0))
                    )
                    tag = _scratch_tag(pruning, against, shapes.get(pruning.name))
                    scratch = f"scratch-{tag}-{setting}-t{samples.steps * lay.batch.tokens}-s{seed}"
                    cell = TrainingCell(scratch, "scratch", pruning, samples, seed, masked=against == "masked")
                    cells.setdefault(scratch, cell)
                comparisons.append(Comparison(pruning, setting, against, budget, seed, pruned, scratch, reason))
    return Grid(tuple(cells.values()), tuple(comparisons))


def _not_run(study: Study, lay: Lay, setting: Setting) -> str:
    """Why an arm is left out, or nothing. A number of tokens is never guessed."""
    if setting == "equal-training" or study.parent.pretrain is not None or study.parent.equal_total == "run":
        return ""
    if lay.parent_tokens is None:
        return "the parent's training tokens are unknown"
    return (
        f"the parent's {lay.parent_tokens:,} tokens are only declared, and parent.equal_total does not say "
        "that a scratch run on as many is to be made"
    )


def _scratch_tag(pruning: Pruning, against: Scratch, shape: Shape | None) -> str:
    """What a scratch run takes from a pruning: its masks, or only its shape, which others may have too."""
    name = pruning.name.rsplit("-s", 1)[0]
    if against == "masked":
        return f"masked-{name}"
    return shape_tag(shape) if shape else f"as-{name}"


def shape_tag(shape: Shape) -> str:
    """``L4h192H6G3d32F512``: layers, hidden, heads, groups, head size, FFN."""
    return "".join(
        f"{letter}{shape[key]}"
        for letter, key in (
            ("L", "num_layers"),
            ("h", "hidden_size"),
            ("H", "num_attention_heads"),
            ("G", "num_query_groups"),
            ("d", "kv_channels"),
            ("F", "ffn_hidden_size"),
        )
    )
