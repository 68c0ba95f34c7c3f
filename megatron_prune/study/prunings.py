"""The prunings of a study, the names of its cells, and where their files are.

A study prunes by every method at every ratio with every seed, and by chains of methods. Each link of a chain is a
pruning that starts from the one before it, or from its retraining, so that chains and methods share common work. All
of this is known from study.yaml alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune import methods
from megatron_prune.checkpoint import tracker
from megatron_prune.errors import UsageError
from megatron_prune.masks import MASKS
from megatron_prune.methods import options
from megatron_prune.methods.base import DEPTH, DIMENSIONS, WIDTH
from megatron_prune.structured import candidates
from megatron_prune.study.sample_ranges import Batch, Lay, SampleRange
from megatron_prune.study.schema import StudyConfig
from megatron_prune.study.sections import MethodSection
from megatron_prune.study.values import GRANULARITIES


@dataclass(frozen=True)
class Pruning:
    """One method at one ratio (None: at its explicit target) under one seed.

    ``base`` is the pruning that it starts from, None for the parent; ``retrained``: tokens (whole global batches) that
    the base was trained on first, or 0. The last link of a chain has the chain's ``title``, for rows, and its
    ``label``, for cells.
    """

    method: MethodSection
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
        """The chain of prunings in order, this one last."""
        return (*(self.base.links if self.base else ()), self)

    @property
    def begins_with(self) -> str | None:
        """What it starts from, for cell names: its base, possibly retrained. None for the parent."""
        if self.base is None:
            return None
        return self.base.name + (f"-t{self.retrained}" if self.retrained else "")

    @property
    def retraining_cell(self) -> str | None:
        """The cell of the retraining that it starts from."""
        return f"retrained-{self.begins_with}" if self.retrained else None

    @property
    def trained(self) -> int:
        """Tokens of all earlier retrainings between links."""
        return sum(link.retrained for link in self.links)

    @property
    def learned(self) -> int:
        """Tokens that its masks were learned on, and those of the links before it."""
        return sum(link.method.tokens or 0 for link in self.links)

    @property
    def sparse(self) -> bool:
        """True if the result has masks."""
        return any(link.method.pattern is not None for link in self.links)

    @property
    def subject(self) -> tuple[str, str | None, float | None]:
        """Name, pattern and ratio, the same for all seeds. A chain's title has those of its links, except the last
        pattern."""
        if self.title is not None:
            return self.title, self.method.pattern, None
        return self.method.title, self.method.pattern, self.ratio


def of_method(study: StudyConfig, method: MethodSection) -> list[Pruning]:
    """A method at every ratio with every seed, without those that ``leave_out`` leaves nothing to compare. A target has
    no ratio, N:M its own, a chain those of its links."""
    if method.chain:
        made = [_chained(study, method, seed) for seed in study.seeds]
    else:
        ratios = [None] if method.target else [method.own_ratio] if method.own_ratio else study.ratios
        made = [Pruning(method, ratio, seed) for ratio in ratios for seed in study.seeds]
    return [
        one for one in made
        if any(study.asked_of(method, one.subject[2], *training, one.seed) for training in study.trainings)
    ]  # fmt: skip


def _chained(study: StudyConfig, method: MethodSection, seed: int) -> Pruning:
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


def prunings(study: StudyConfig) -> list[Pruning]:
    """The prunings that are retrained and compared, in the study's order."""
    return [pruning for method in study.methods for pruning in of_method(study, method)]


def links(study: StudyConfig) -> list[Pruning]:
    """All prunings, including earlier links, each once and in order of dependency."""
    found: dict[str, Pruning] = {}
    for pruning in prunings(study):
        for link in pruning.links:
            if found.setdefault(link.name, link) != link:
                raise UsageError(
                    "methods", got=f"two prunings called {link.name} with different settings",
                    expected="a label for at least one of them",
                )  # fmt: skip
    return list(found.values())


def learning_samples(study: StudyConfig, lay: Lay, pruning: Pruning) -> SampleRange:
    """What masks are learned on: samples after those of the longest retraining, which all prunings share, and after
    what earlier links of a chain learned theirs on.

    Under dynamic batch loading nobody knows how much of a corpus a retraining will read. There they come first, and the
    retraining takes of every corpus the samples after these.
    """
    if study.recipe.dynamic_batch is not None:
        longest = max(lay.parent_end + each.trained // lay.batch.seq_length for each in prunings(study))
    else:
        longest = max(lay.retrain(budget, each.trained).end for budget in study.budgets for each in prunings(study))
    start = longest + (pruning.base.learned if pruning.base else 0) // lay.batch.seq_length
    samples = (pruning.method.tokens or 0) // lay.batch.seq_length
    return SampleRange(start, start + samples, samples // learning_batch(study, pruning.method))


def learning_batch(study: StudyConfig, method: MethodSection) -> int:
    """Samples of a global batch while masks are learned: they need many steps, and few tokens."""
    own: Any = method.settings.get("global-batch-size", study.recipe.global_batch_size)
    return int(own)


def calibration_cell(study: StudyConfig, pruning: Pruning) -> str:
    """The cell with a pruning's statistics: one for all seeds if windows and parent are the same."""
    kind = "gradients" if reads_gradients(pruning) else "calibration"
    if pruning.base is not None:
        return f"{kind}-{pruning.begins_with}"
    per_seed = study.calibration.sampling == "random" or study.parent_per_seed
    return f"{kind}-s{pruning.seed}" if per_seed else kind


def reads_gradients(pruning: Pruning) -> bool:
    """True if its calibration needs a backward pass: then it is a cell of its own, whose cost only these methods
    have."""
    return pruning.method.name in options.READ_GRADIENTS


def calibration_tokens(study: StudyConfig) -> int:
    return study.calibration.sequences * study.calibration_seq_length


def parent_cell(study: StudyConfig, seed: int) -> str:
    """The cell of the parent that a seed's prunings start from."""
    return f"parent-s{seed}" if study.parent_per_seed else "parent"


def source_cell(study: StudyConfig, pruning: Pruning) -> str:
    """The cell whose checkpoint a pruning starts from: the parent, the link before it, or that link's retraining."""
    if pruning.base is None:
        return parent_cell(study, pruning.seed)
    return pruning.retraining_cell or pruning.base.cell


def parent_cells(study: StudyConfig) -> Iterator[tuple[str, int]]:
    """Every parent's cell, with the offset added to ``parent.pretrain.seed``."""
    for seed in study.seeds if study.parent_per_seed else [0]:
        yield parent_cell(study, seed), seed


def flops_of(
    records: Mapping[str, Mapping[str, Any]], study: StudyConfig, pruning: Pruning, *, statistics: bool
) -> int | None:
    """FLOPs of one pruning including its ``statistics``; None before they are finished."""
    parts = [records.get(pruning.cell)] + [records.get(calibration_cell(study, pruning))] * statistics
    return None if None in parts else sum(part["flops"] for part in parts if part)


@dataclass(frozen=True)
class Places:
    """Paths of a study's files, under ``runs/<study>``."""

    root: Path  # runs/<study>

    def cell(self, name: str) -> Path:
        return self.root / "cells" / name

    def checkpoint(self, cell: str) -> Path:
        return self.cell(cell) / "checkpoint"

    def masks(self, pruning: Pruning) -> Path:
        """The masks of a sparse pruning."""
        return self.checkpoint(pruning.cell) / MASKS

    def account(self, cell: str) -> Path:
        return self.checkpoint(cell) / "account.json"

    def losses(self, cell: str) -> Path:
        return self.checkpoint(cell) / "losses.csv"

    def scores(self, cell: str) -> Path:
        return self.cell(cell) / "scores.json"

    def statistics(self, cell: str) -> Path:
        return self.cell(cell) / "statistics.safetensors"

    def plan(self, pruning: Pruning) -> Path:
        return self.cell(pruning.cell) / "plan.json"

    def candidates(self, pruning: Pruning) -> Path:
        return self.cell(pruning.cell) / candidates.FILE

    def learned(self, pruning: Pruning) -> Path:
        """The checkpoint that was trained under the masks of a pruning which learns them."""
        return self.cell(pruning.cell) / "learned"

    def taught(self, cell: str) -> Path:
        """What a teacher says, as `teach` writes it."""
        return self.cell(cell) / "taught"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def overlap(self) -> Path:
        """The report on near-duplicates between the study's corpora, if it is requested."""
        return self.root / "overlap.json"

    @property
    def quoted(self) -> Path:
        """The report on questions of tasks in the study's training and calibration text."""
        return self.root / "quoted-questions.json"

    def parent(self, study: StudyConfig, seed: int = 0) -> Path:
        """A seed's parent checkpoint: the study's own, or the one named in study.yaml."""
        return Path(study.parent.load) if study.parent.load else self.checkpoint(parent_cell(study, seed))

    def beside_parent(self, study: StudyConfig, seed: int = 0) -> Path:
        """The folder with a seed's parent's account and losses, even if study.yaml names one of its iterations."""
        return tracker.root_of(self.parent(study, seed))

    def source(self, study: StudyConfig, pruning: Pruning) -> Path:
        """The checkpoint that a pruning starts from: the parent's, or that of the previous link or retraining."""
        return self.checkpoint(source_cell(study, pruning)) if pruning.base else self.parent(study, pruning.seed)


def granularity(pruning: Pruning) -> str:
    """What is removed: ``depth`` (layers), ``width`` (channels, heads), ``sparse`` (single weights), or ``depth and
    width``."""
    found: set[str] = set()
    for link in pruning.links:
        if link.method.pattern is not None:
            found.add("sparse")
            continue
        sizes = {name.removeprefix("target-").replace("-", "_") for name in link.method.target}
        if not sizes & set(DIMENSIONS):
            own = options.STRUCTURED[link.method.name]
            known = {flag.name for flag in own.flags()}
            given = {key: value for key, value in link.method.settings.items() if key.replace("-", "_") in known}
            sizes = set(methods.get(link.method.name).free_dimensions(own.read(given)))
        found |= {kind for kind, own in (("depth", DEPTH), ("width", WIDTH)) if sizes & set(own)}
    return " and ".join(kind for kind in GRANULARITIES if kind in found)
