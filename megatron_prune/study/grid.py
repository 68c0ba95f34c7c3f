"""The grid: every run of a study, with shared work done once, and the comparisons between them.

    parent ─▶ calibration (one per window set) ───▶ pruning (method x ratio x seed) ─▶ pruned (x budget x rate)
                    ▲                                  ├─ retrained (between the links of a chain) ─┐
                    └──────────────────────────────────┼─────────────────◀──────────────────────────┘
                                                       ├─ shape ─▶ scratch (shape x setting x budget x rate x seed)
                                                       └─ masks ─▶ scratch (masks x setting x budget x rate x seed)

A sparse method keeps the parent's shape and makes masks. Its scratch runs are trained under these masks from newly
initialised weights (``masked``), or without masks (``dense``: a study's sparse methods share that run). A chain may
retrain between two links, on the samples after the parent's; the compared runs begin after those samples.
``prunings`` (``prunings.py``) are known from study.yaml alone. The training cells need the shapes that the plans chose,
so ``expand`` takes them; before they are known, ``expand(study, lay, {}, {})`` names a scratch cell after its pruning.
Equal FLOPs also need the FLOPs of the prunings. With several objectives every compared run is made once for each;
those that distil learn from the parent of their seed. Nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.study.objectives import ObjectiveName
from megatron_prune.study.prunings import Pruning, granularity, links, of_method
from megatron_prune.study.sample_ranges import Lay, SampleRange
from megatron_prune.study.schema import GapSelection, StudyConfig
from megatron_prune.study.values import Scratch, Setting

Shape = Mapping[str, Any]  # a ModelShape as JSON: a plan's ``target``


@dataclass(frozen=True)
class TrainingCell:
    """A run of ``pretrain`` and ``evaluate``: its start, samples, seed and learning rate.

    ``source`` is the pruning whose checkpoint gives the weights (pruned) or only the shape (scratch); ``masked``: its
    masks too. ``others`` are prunings of the same shape that share a scratch run. ``retrained`` marks runs between
    links: they are not compared, and the next link starts from them. ``follows``: the cell whose schedule of batches a
    scratch run follows. ``taught``: the cell that writes what its teacher says, if that is in a cache.
    """

    id: str
    kind: Literal["pruned", "scratch", "retrained"]
    source: Pruning
    samples: SampleRange
    seed: int
    lr: float
    masked: bool = False
    others: tuple[Pruning, ...] = ()
    follows: str | None = None
    objective: ObjectiveName = "lm"
    taught: str | None = None


@dataclass(frozen=True)
class Teaching:
    """A run of ``teach``: the parent of ``seed`` on ``samples``, for all distilled runs inside them."""

    id: str
    seed: int
    samples: SampleRange


# Comparisons that agree in these are one; a verdict on one budget also has its tokens.
SUBJECT = ("method", "pattern", "ratio", "setting", "against", "sparse", "objective")
GROUP = (*SUBJECT, "tokens")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One method at one ratio in one setting against one kind of scratch.

    ``pattern`` is the method's, or that of a chain's last link; ``sparse``: the retrained model has masks (in a chain,
    possibly from an earlier link).
    """

    method: str
    pattern: str | None
    ratio: float | None
    setting: str
    against: str  # masked or dense
    sparse: bool
    objective: str = "lm"

    @property
    def label(self) -> str:
        return label(self.method, self.pattern, self.ratio, self.objective)

    @property
    def dense(self) -> bool:
        """True if a sparse model is compared with one that has all its weights."""
        return self.sparse and self.against == "dense"

    @property
    def subject(self) -> str:
        """``shortgpt, 50% removed, equal training tokens``"""
        return f"{self.label}, {setting_words(self.setting)}{', against dense scratch' * self.dense}"


def setting_words(setting: str) -> str:
    """``equal training tokens``"""
    return "equal FLOPs" if setting == "equal-flops" else f"{setting.replace('-', ' ')} tokens"


def label(method: str, pattern: str | None, ratio: float | None, objective: str = "lm") -> str:
    """``shortgpt, 50% removed``; ``wanda 2:4, 50% removed, distilled``"""
    name = method if pattern is None else f"{method} {pattern}"
    name = name if ratio is None else f"{name}, {100 * ratio:g}% removed"
    return name + ", distilled" * (objective == "distill")


def against_words(*, sparse: bool, dense: bool) -> str:
    """With which scratch a sparse model is compared; empty for others, which have one."""
    if not sparse:
        return ""
    return ", against dense scratch" if dense else ", against scratch under the same masks"


@dataclass(frozen=True)
class Edge:
    """An arm's best learning rate is at an end of the grid: a better one may lie beyond. ``add`` is the next to try."""

    arm: str  # pruned or scratch
    rate: float
    end: Literal["smallest", "largest"]
    add: float

    @property
    def words(self) -> str:
        return f"The {self.arm} arm's learning rate, {self.rate:g}, is the {self.end} that was tried: add {self.add:g}."


@dataclass(frozen=True)
class Comparison:
    """A pruned run and the scratch run that it is compared with.

    ``scratch`` is None if it is not run (``not_run`` says why) or its length is not known yet. In a sweep, ``pruned``
    and ``scratch`` are the runs at the first rate until ``results`` has chosen each arm's rate; ``swept`` has both by
    rate, ``chosen`` is False while required runs are missing, and ``edges`` lists arms whose rate is at an end of the
    grid.
    """

    pruning: Pruning
    setting: Setting
    against: Scratch
    budget: int
    seed: int
    pruned: str
    scratch: str | None
    not_run: str = ""
    swept: tuple[tuple[float, str, str | None], ...] = ()
    chosen: bool = True
    edges: tuple[Edge, ...] = ()
    objective: ObjectiveName = "lm"

    @property
    def subject(self) -> tuple[str, str | None, float | None, str]:
        """The arguments of ``label``."""
        return (*self.pruning.subject, self.objective)

    @property
    def runs(self) -> list[tuple[float | None, str, str | None]]:
        """The pruned and scratch run of every rate; without a sweep the rate is None."""
        return list(self.swept) or [(None, self.pruned, self.scratch)]

    def group(self, tokens: int) -> dict[str, Any]:
        """The fields that all seeds share; ``tokens``: of retraining."""
        method, pattern, ratio = self.pruning.subject
        return {
            "method": method,
            "pattern": pattern,
            "ratio": ratio,
            "setting": self.setting,
            "against": self.against,
            "sparse": self.pruning.sparse,
            "objective": self.objective,
            "tokens": tokens,
        }


@dataclass(frozen=True)
class Grid:
    """All training cells, each once, all comparisons between them, and what teachers write for them."""

    cells: tuple[TrainingCell, ...]
    comparisons: tuple[Comparison, ...]
    teachings: tuple[Teaching, ...] = ()


def expand(
    study: StudyConfig,
    lay: Lay,
    shapes: Mapping[str, Shape],
    consumed: Mapping[str, int],
    spent: Mapping[str, int] | None = None,
    teacher: int | None = None,
) -> Grid:
    """The training cells and comparisons.

    ``shapes`` maps a pruning's name to its target shape, ``consumed`` to the tokens that pruning read, ``spent`` to
    its FLOPs. ``teacher``: FLOPs of the parent's forward pass over a sequence. Prunings of one shape share their dense
    scratch runs if those consume the same samples.
    """
    cells: dict[str, TrainingCell] = {cell.id: cell for cell in between(study, lay)}
    comparisons = []
    by_flops: set[str] = set()
    for entry in study.methods:
        for pruning in of_method(study, entry):
            for budget, objective in study.trainings:
                retrain = lay.retrain(budget, pruning.trained)
                distilled = "-distill" * (objective == "distill")
                pruned = _swept(study, f"pruned-{pruning.name}-t{retrain.steps * lay.batch.tokens}{distilled}")
                asked = study.asked_of(entry, pruning.subject[2], budget, objective, pruning.seed)
                for rate, name in pruned.items() if asked else ():
                    cell = TrainingCell(name, "pruned", pruning, retrain, pruning.seed, rate, pruning.sparse)
                    _add(cells, replace(cell, objective=objective))
                for setting, against in asked:
                    reason = _not_run(study, lay, setting)
                    shape = shapes.get(pruning.name)
                    samples = None
                    if not reason:
                        each = teacher if distilled else 0
                        samples = _samples(lay, setting, retrain, pruning, shapes, consumed, spent or {}, each)
                    scratch: dict[float, str] = {}
                    if samples is not None:
                        tag = _scratch_tag(pruning, against, shape)
                        if follows(study, setting):  # its samples are those of one pruned run
                            tag += f"-follows-{pruning.name.rsplit('-s', 1)[0]}-t{retrain.steps * lay.batch.tokens}"
                        elif pruning.trained and setting == "equal-training":  # it begins with the chain's samples
                            tag += f"-after-t{pruning.trained}"
                        what = f"{tag}-{setting}-t{samples.steps * lay.batch.tokens}{distilled}"
                        scratch = _swept(study, f"scratch-{what}-s{pruning.seed}")
                    for rate, name in scratch.items():
                        assert samples is not None
                        masked, leader = against == "masked", pruned[rate] if follows(study, setting) else None
                        cell = TrainingCell(name, "scratch", pruning, samples, pruning.seed, rate, masked, (), leader)
                        _add(cells, replace(cell, objective=objective))
                        by_flops |= {name} if setting == "equal-flops" else set()
                    swept = tuple((rate, name, scratch.get(rate)) for rate, name in pruned.items())
                    first = swept[0]
                    made = Comparison(pruning, setting, against, budget, pruning.seed, first[1], first[2], reason)
                    made = replace(made, objective=objective)
                    comparisons.append(replace(made, swept=swept) if len(swept) > 1 else made)
    teachings = _teachings(study, lay, cells, by_flops) if study.distillation.cached else []
    return Grid(tuple(cells.values()), tuple(comparisons), tuple(teachings))


def _teachings(study: StudyConfig, lay: Lay, cells: dict[str, TrainingCell], by_flops: set[str]) -> list[Teaching]:
    """What `teach` writes for the distilled ``cells``, each of which is told its own: as few ranges as are known early.

    Runs of one parent that begin with the same sample share the longest of their ranges. The length of one ``by_flops``
    is known only once others have finished, so that it has a range of its own.
    """
    own = {name: cell for name, cell in cells.items() if cell.objective == "distill"}

    def parent_of(cell: TrainingCell) -> int:
        return cell.seed if study.parent_per_seed else 0

    ends: dict[tuple[int, int], int] = {}
    for name, cell in own.items():
        if name not in by_flops:
            key = parent_of(cell), cell.samples.start
            ends[key] = max(ends.get(key, 0), cell.samples.end)
    found: dict[str, Teaching] = {}
    for name, cell in own.items():
        seed, start = parent_of(cell), cell.samples.start
        end = cell.samples.end if name in by_flops else ends[seed, start]
        tag = f"teach-{start}-{end}" + f"-s{seed}" * study.parent_per_seed
        found.setdefault(tag, Teaching(tag, seed, SampleRange(start, end, (end - start) // lay.batch.samples)))
        cells[name] = replace(cell, taught=tag)
    return list(found.values())


def follows(study: StudyConfig, setting: Setting) -> bool:
    """Whether a setting's scratch runs follow the schedule of batches of their pruned run."""
    dynamic = study.recipe.dynamic_batch
    return dynamic is not None and dynamic.scratch == "follow" and setting == "equal-training"


def between(study: StudyConfig, lay: Lay) -> Iterator[TrainingCell]:
    """The retrainings between the links of chains, each once and in order, at the first of several rates."""
    for link in links(study):
        if link.base is not None and link.retraining_cell is not None:
            samples = lay.retrain(link.retrained, link.base.trained)
            rate = study.recipe.rates[0]
            yield TrainingCell(link.retraining_cell, "retrained", link.base, samples, link.seed, rate, link.base.sparse)


def between_flops(pruning: Pruning, shapes: Mapping[str, Shape], seq_length: int) -> int | None:
    """FLOPs of the retrainings between a pruning's links; None while a shape is not known."""
    total = 0
    for link in pruning.links:
        if link.base is not None and link.retrained:
            if link.base.name not in shapes:
                return None
            one = ModelShape.read(shapes[link.base.name]).training_flops(seq_length)
            total += link.retrained // seq_length * one
    return total


def _swept(study: StudyConfig, name: str) -> dict[float, str]:
    """A run's name at every rate of the recipe; a single rate is not in the name."""
    rates = study.recipe.rates
    return {rate: name if len(rates) == 1 else f"{name}-lr{rate:g}" for rate in rates}


def _add(cells: dict[str, TrainingCell], cell: TrainingCell) -> None:
    known = cells.setdefault(cell.id, cell)
    if known.source != cell.source:
        cells[cell.id] = replace(known, others=(*known.others, cell.source))


def _samples(
    lay: Lay,
    setting: Setting,
    retrain: SampleRange,
    pruning: Pruning,
    shapes: Mapping[str, Shape],
    consumed: Mapping[str, int],
    spent: Mapping[str, int],
    teacher: int | None,
) -> SampleRange | None:
    """The samples of a setting's scratch run; None while they are not known. ``teacher``: its FLOPs per sequence."""
    if setting == "equal-training":  # what masks were learned on is training too
        return lay.batch.range(retrain.start, retrain.steps + pruning.learned // lay.batch.tokens)
    if setting == "equal-total":
        return lay.scratch_total(retrain.steps * lay.batch.tokens + pruning.trained, consumed.get(pruning.name, 0))
    shape, trained = shapes.get(pruning.name), between_flops(pruning, shapes, lay.batch.seq_length)
    if shape is None or trained is None or teacher is None or pruning.name not in spent:
        return None
    sequence = ModelShape.read(shape).training_flops(lay.batch.seq_length) + teacher
    return lay.scratch_flops(retrain, spent[pruning.name], sequence, trained)


def _not_run(study: StudyConfig, lay: Lay, setting: Setting) -> str:
    """Why an arm is not run, or an empty string. A number of tokens is never guessed."""
    if setting == "equal-training" or study.parent.pretrain is not None or study.parent.equal_total == "run":
        return ""
    if lay.parent_tokens is None:
        return "the parent's training tokens are unknown"
    tokens = f"the parent's {lay.parent_tokens:,} tokens"
    if not lay.declared:  # by its account
        return f"parent.equal_total does not say that a scratch run on {tokens} is to be made"
    part = f"{lay.declared:,} of " if lay.declared < lay.parent_tokens else ""
    return (
        f"{part}{tokens} are only declared, and parent.equal_total does not say that a scratch run on as many is to be "
        "made"
    )


def _scratch_tag(pruning: Pruning, against: Scratch, shape: Shape | None) -> str:
    """The name of what a scratch run takes from a pruning: its masks, or only its shape, which others may share."""
    name = pruning.name.rsplit("-s", 1)[0]
    if against == "masked":
        return f"masked-{name}"
    return shape_tag(shape) if shape else f"as-{name}"


def shape_tag(shape: Shape) -> str:
    """``L4h192H6G3d32F512``: layers, hidden, heads, groups, head size, FFN; with ``b`` for biases on the linears. If
    layers differ, the sizes are of the largest, and a number after ``v`` (varied) tells such shapes apart."""
    varied = f"v{int(artifacts.sha256_json(shape['layers'])[:8], 16)}" if "layers" in shape else ""
    sizes = "".join(
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
    return sizes + varied + "b" * bool(shape.get("linear_bias"))


def notes(study: StudyConfig) -> list[str]:
    """Notes on parts of study.yaml that do not apply as one might expect."""
    return [
        f"{method.tag} runs once, at {100 * method.own_ratio:g}%: {method.pattern} says how much is removed, "
        f"not ratios: {study.ratios}"
        for method in study.methods
        if method.own_ratio is not None and study.ratios != [method.own_ratio]
    ]


def selects(study: StudyConfig, selection: GapSelection, made: Comparison, *, every_budget: bool = False) -> bool:
    """Whether a selection of ``compare`` has a comparison."""
    if not selection.holds(made.group(0) | {"budget": made.budget}):
        return False
    if selection.budgets is None and not every_budget and made.budget != max(study.budgets):
        return False
    if selection.against is not None and made.pruning.sparse and made.against != selection.against:
        return False
    return selection.granularities is None or granularity(made.pruning) in selection.granularities
