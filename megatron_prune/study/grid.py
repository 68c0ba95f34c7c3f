"""The grid: every run of a study, with shared work once, and the comparisons that it is for.

    parent ─▶ calibration (one a set of windows) ─▶ pruning (method x ratio x seed) ─▶ pruned (x budget)
                                                       └─ shape ─▶ scratch (shape x setting x budget x seed)

``prunings`` is known from study.yaml alone. The training cells need the shapes that the plans chose,
so ``expand`` takes them; before they are known, ``expand(study, lay, {})`` names a scratch cell after
its pruning. Nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_prune.study.budgets import Lay, SampleRange
from megatron_prune.study.config import Method, Setting, Study

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


@dataclass(frozen=True)
class TrainingCell:
    """A run of ``pretrain`` and ``evaluate``: where it starts, what it consumes, under which seed.

    ``source`` is the pruning whose checkpoint gives the weights (pruned) or only the shape (scratch).
    """

    id: str
    kind: Literal["pruned", "scratch"]
    source: Pruning
    samples: SampleRange
    seed: int
    budget: int


@dataclass(frozen=True)
class Comparison:
    """A pruned run and the scratch run that it is measured against; ``scratch`` None: not run, and why."""

    pruning: Pruning
    setting: Setting
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
    """Every method at every ratio under every seed; a method with a target has no ratio."""
    return [
        Pruning(method, ratio, seed)
        for method in study.methods
        for ratio in ([None] if method.target else study.ratios)
        for seed in study.seeds
    ]


def expand(study: Study, lay: Lay, shapes: Mapping[str, Shape], consumed: Mapping[str, int]) -> Grid:
    """The training cells and comparisons.

    ``shapes`` maps a pruning's name to its target shape; ``consumed`` to the tokens that pruning read.
    Prunings of one shape share their scratch runs wherever those would consume the same samples.
    """
    cells: dict[str, TrainingCell] = {}
    comparisons = []
    for pruning in prunings(study):
        shape = shapes.get(pruning.name)
        tag = shape_tag(shape) if shape else f"as-{pruning.name.rsplit('-s', 1)[0]}"
        for budget in study.budgets:
            retrain = lay.retrain(budget)
            tokens = retrain.steps * lay.batch.tokens
            pruned = TrainingCell(f"pruned-{pruning.name}-t{tokens}", "pruned", pruning, retrain, pruning.seed, budget)
            cells[pruned.id] = pruned
            for setting in study.settings:
                reason = _not_run(study, lay, setting)
                scratch = None
                if not reason:
                    samples = (
                        retrain
                        if setting == "equal-training"
                        else lay.scratch_total(tokens, consumed.get(pruning.name, 0))
                    )
                    scratch = f"scratch-{tag}-{setting}-t{samples.steps * lay.batch.tokens}-s{pruning.seed}"
                    cells.setdefault(scratch, TrainingCell(scratch, "scratch", pruning, samples, pruning.seed, budget))
                comparisons.append(Comparison(pruning, setting, budget, pruning.seed, pruned.id, scratch, reason))
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
