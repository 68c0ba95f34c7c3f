"""The grid: every run of a study, with shared work once, and the comparisons that it is for.

    parent ─▶ calibration (one a set of windows) ─▶ pruning (method x ratio x seed) ─▶ pruned (x budget x rate)
                    ▲                                  ├─ retrained (between the links of a chain) ─┐
                    └──────────────────────────────────┼─────────────────◀──────────────────────────┘
                                                       ├─ shape ─▶ scratch (shape x setting x budget x rate x seed)
                                                       └─ masks ─▶ scratch (masks x setting x budget x rate x seed)

A sparse method leaves the parent's shape and makes masks. Its scratch runs are trained under these masks, every
parameter initialised again (``masked``); or without any (``dense``: all sparse methods of a study share that run). A
chain may retrain between two links: on the samples after the parent's, the same for all that share it, before those
of the runs that are compared, which begin where it ended. ``prunings`` (``prunings.py``) are known from study.yaml
alone. The training cells need the shapes that the plans chose, so ``expand`` takes them; before they are known,
``expand(study, lay, {}, {})`` names a scratch cell after its pruning. Equal FLOPs need what the prunings spent too.
Nothing here reads files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.study.budgets import Batch, Lay, SampleRange
from megatron_prune.study.schema import Study
from megatron_prune.study.sections import Method
from megatron_prune.study.values import Scratch, Setting

Shape = Mapping[str, Any]  # a ModelShape as JSON: a plan's ``target``


@dataclass(frozen=True)
class TrainingCell:
    """A run of ``pretrain`` and ``evaluate``: where it starts, what it consumes, under which seed, at which rate.

    ``source`` is the pruning whose checkpoint gives the weights (pruned) or only the shape (scratch); ``masked``:
    its masks too. ``others`` are prunings of the same shape, which a scratch run serves as well. ``retrained`` are
    those between links: nothing is compared with them, the next link starts from them.
    """

    id: str
    kind: Literal["pruned", "scratch", "retrained"]
    source: Pruning
    samples: SampleRange
    seed: int
    lr: float
    masked: bool = False
    others: tuple[Pruning, ...] = ()


@dataclass(frozen=True)
class Edge:
    """An arm's learning rate is at an end of those tried, so that a better one may lie beyond: ``add`` is the next."""

    arm: str  # pruned or scratch
    rate: float
    end: Literal["smallest", "largest"]
    add: float

    @property
    def words(self) -> str:
        return f"The {self.arm} arm's learning rate, {self.rate:g}, is the {self.end} that was tried: add {self.add:g}."


@dataclass(frozen=True)
class Comparison:
    """A pruned run and the scratch run that it is measured against.

    ``scratch`` is None where it is not run, and ``not_run`` says why; or where its length is not known yet. Of a
    sweep, ``pruned`` and ``scratch`` are the runs at the first rate until ``results`` has chosen the arms' own;
    ``swept`` has both by rate, ``chosen`` is False while runs that decide are missing, and ``edges`` says whose rate
    was the smallest or the largest of its grid.
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

    @property
    def runs(self) -> list[tuple[float | None, str, str | None]]:
        """Every rate's pruned run and scratch run; where nothing is swept the rate is None."""
        return list(self.swept) or [(None, self.pruned, self.scratch)]

    def group(self, tokens: int) -> dict[str, Any]:
        """What is the same for all seeds; ``tokens`` are those of the retraining."""
        method, pattern, ratio = self.pruning.subject
        return {
            "method": method,
            "pattern": pattern,
            "ratio": ratio,
            "setting": self.setting,
            "against": self.against,
            "sparse": self.pruning.sparse,
            "tokens": tokens,
        }


@dataclass(frozen=True)
class Grid:
    """All training cells, each once, and all comparisons between them."""

    cells: tuple[TrainingCell, ...]
    comparisons: tuple[Comparison, ...]


def expand(
    study: Study,
    lay: Lay,
    shapes: Mapping[str, Shape],
    consumed: Mapping[str, int],
    spent: Mapping[str, int] | None = None,
) -> Grid:
    """The training cells and comparisons.

    ``shapes`` maps a pruning's name to its target shape; ``consumed`` to the tokens that pruning read, ``spent`` to
    the FLOPs. Prunings of one shape share their dense scratch runs wherever those would consume the same samples.
    """
    cells: dict[str, TrainingCell] = {cell.id: cell for cell in between(study, lay)}
    comparisons = []
    for entry in study.methods:
        for pruning in of_method(study, entry):
            for budget in study.budgets:
                retrain = lay.retrain(budget, pruning.trained)
                pruned = _swept(study, f"pruned-{pruning.name}-t{retrain.steps * lay.batch.tokens}")
                for rate, name in pruned.items():
                    _add(cells, TrainingCell(name, "pruned", pruning, retrain, pruning.seed, rate, pruning.sparse))
                for setting, against in study.compared(entry):
                    reason = _not_run(study, lay, setting)
                    shape = shapes.get(pruning.name)
                    samples = None
                    if not reason:
                        samples = _samples(lay, setting, retrain, pruning, shapes, consumed, spent or {})
                    scratch: dict[float, str] = {}
                    if samples is not None:
                        what = f"{_scratch_tag(pruning, against, shape)}-{setting}-t{samples.steps * lay.batch.tokens}"
                        scratch = _swept(study, f"scratch-{what}-s{pruning.seed}")
                    for rate, name in scratch.items():
                        assert samples is not None
                        masked = against == "masked"
                        _add(cells, TrainingCell(name, "scratch", pruning, samples, pruning.seed, rate, masked))
                    swept = tuple((rate, name, scratch.get(rate)) for rate, name in pruned.items())
                    first = swept[0]
                    made = Comparison(pruning, setting, against, budget, pruning.seed, first[1], first[2], reason)
                    comparisons.append(replace(made, swept=swept) if len(swept) > 1 else made)
    return Grid(tuple(cells.values()), tuple(comparisons))


def between(study: Study, lay: Lay) -> Iterator[TrainingCell]:
    """The retrainings between the links of chains, each once and after what it starts from; of several rates they take
    the first."""
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
            one = ModelShape(**shapes[link.base.name]).training_flops(seq_length)
            total += link.retrained // seq_length * one
    return total


def _swept(study: Study, name: str) -> dict[float, str]:
    """A run's name at every rate of the recipe; at a single one it needs no mark."""
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
) -> SampleRange | None:
    """What a scratch run of a setting consumes; None while that is not known."""
    if setting == "equal-training":
        return retrain
    if setting == "equal-total":
        return lay.scratch_total(retrain.steps * lay.batch.tokens + pruning.trained, consumed.get(pruning.name, 0))
    shape, trained = shapes.get(pruning.name), between_flops(pruning, shapes, lay.batch.seq_length)
    if shape is None or trained is None or pruning.name not in spent:
        return None
    sequence = ModelShape(**shape).training_flops(lay.batch.seq_length)
    return lay.scratch_flops(retrain, spent[pruning.name], sequence, trained)


def _not_run(study: Study, lay: Lay, setting: Setting) -> str:
    """Why an arm is left out, or nothing. A number of tokens is never guessed."""
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


def notes(study: Study) -> list[str]:
    """What of study.yaml does not apply as it may seem to."""
    return [
        f"{method.tag} runs once, at {100 * method.own_ratio:g}%: {method.pattern} says how much is removed, "
        f"not ratios: {study.ratios}"
        for method in study.methods
        if method.own_ratio is not None and study.ratios != [method.own_ratio]
    ]


# The prunings of a study: every method at every ratio under every seed, and chains of them.
#
# A chain's links are prunings of their own, each of which starts from the one before it, or from what that is after a
# retraining, so that two chains, or a chain and a method, share what they have in common. Known from study.yaml alone.


@dataclass(frozen=True)
class Pruning:
    """One method at one ratio (None: at its explicit target) under one seed.

    ``base`` is the pruning that it starts from, None for the parent; ``retrained``: the tokens, whole global batches,
    that this was trained on before, 0 for none. The last link of a chain has the chain's
    ``title``, for rows, and its ``label``, for cells.
    """

    method: Method
    ratio: float | None
    seed: int
    base: Pruning | None = None
    title: str | None = None
    label: str | None = None
    retrained: int = 0

    @property
    def name(self) -> str:
        amount = "target" if self.ratio is None else f"r{100 * self.ratio:g}"
        before = ""
        if self.base is not None and not self.label:
            before = (
                self.base.name.removesuffix(f"s{self.seed}") + f"t{self.retrained}-" * bool(self.retrained) + "then-"
            )
        return f"{before}{self.label or self.method.tag}-{amount}-s{self.seed}"

    @property
    def cell(self) -> str:
        return f"pruning-{self.name}"

    @property
    def links(self) -> tuple[Pruning, ...]:
        """The prunings behind it in order, itself last."""
        return (*(self.base.links if self.base else ()), self)

    @property
    def begins_with(self) -> str | None:
        """What it starts from, for names of cells: its base, perhaps after a retraining. None for the parent."""
        if self.base is None:
            return None
        return self.base.name + (f"-t{self.retrained}" if self.retrained else "")

    @property
    def retraining_cell(self) -> str | None:
        """The cell of the retraining that it starts from."""
        return f"retrained-{self.begins_with}" if self.retrained else None

    @property
    def trained(self) -> int:
        """Tokens of all retrainings between the links behind it."""
        return sum(link.retrained for link in self.links)

    @property
    def sparse(self) -> bool:
        """True where there are masks on what comes out."""
        return any(link.method.pattern is not None for link in self.links)

    @property
    def subject(self) -> tuple[str, str | None, float | None]:
        """What is the same for all seeds: what it is called, its pattern, its ratio. Those of a chain's links are
        in its title, but for the last pattern."""
        if self.title is not None:
            return self.title, self.method.pattern, None
        return self.method.title, self.method.pattern, self.ratio


def of_method(study: Study, method: Method) -> list[Pruning]:
    """A method at every ratio under every seed; one with a target has no ratio, N:M its own, a chain its links'."""
    if method.chain:
        return [_chained(study, method, seed) for seed in study.seeds]
    ratios = [None] if method.target else [method.own_ratio] if method.own_ratio else study.ratios
    return [Pruning(method, ratio, seed) for ratio in ratios for seed in study.seeds]


def _chained(study: Study, method: Method, seed: int) -> Pruning:
    batch = Batch(study.recipe.global_batch_size, study.data.seq_length)
    made: Pruning | None = None
    retrained = 0
    for link in method.chain:
        one, last = link.method(), link is method.chain[-1]
        title, label = (method.title, method.label) if last else (None, None)
        made = Pruning(one, link.ratio or one.own_ratio, seed, made, title, label, retrained)
        where = f"methods.{method.tag}.chain.retrain"
        retrained = batch.steps(link.retrain, where) * batch.tokens if link.retrain else 0
    assert made is not None
    return made


def prunings(study: Study) -> list[Pruning]:
    """Those that are trained on and compared, in the study's order."""
    return [pruning for method in study.methods for pruning in of_method(study, method)]


def links(study: Study) -> list[Pruning]:
    """All of them, with what only others start from, each once and after what it starts from."""
    found: dict[str, Pruning] = {}
    for pruning in prunings(study):
        for link in pruning.links:
            if found.setdefault(link.name, link) != link:
                raise UsageError(
                    "methods", got=f"two prunings called {link.name} with different settings",
                    expected="a label for at least one of them",
                )  # fmt: skip
    return list(found.values())


def calibration_cell(study: Study, pruning: Pruning) -> str:
    """The cell whose statistics a pruning's plan reads: one for all seeds when neither windows nor parent change."""
    if pruning.base is not None:
        return f"calibration-{pruning.begins_with}"
    per_seed = study.calibration.sampling == "random" or study.parent_per_seed
    return f"calibration-s{pruning.seed}" if per_seed else "calibration"


def calibration_tokens(study: Study) -> int:
    return study.calibration.sequences * study.calibration_seq_length


def parent_cell(study: Study, seed: int) -> str:
    """The cell of the parent that a seed's prunings start from."""
    return f"parent-s{seed}" if study.parent_per_seed else "parent"


def source_cell(study: Study, pruning: Pruning) -> str:
    """The cell whose checkpoint a pruning starts from: its parent's, that of the link before it, or of the retraining
    between the two."""
    if pruning.base is None:
        return parent_cell(study, pruning.seed)
    return pruning.retraining_cell or pruning.base.cell


def parent_cells(study: Study) -> Iterator[tuple[str, int]]:
    """Every parent's cell, with what is added to ``parent.pretrain.seed`` to train it."""
    for seed in study.seeds if study.parent_per_seed else [0]:
        yield parent_cell(study, seed), seed


def flops_of(
    records: Mapping[str, Mapping[str, Any]], study: Study, pruning: Pruning, *, statistics: bool
) -> int | None:
    """FLOPs of one pruning with those of its ``statistics``; None before they are finished."""
    parts = [records.get(pruning.cell)] + [records.get(calibration_cell(study, pruning))] * statistics
    return None if None in parts else sum(part["flops"] for part in parts if part)
