"""Where a study's files lie, under ``runs/<study>``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.checkpoint import tracker
from megatron_prune.masks import MASKS
from megatron_prune.structured import candidates
from megatron_prune.study.grid import Pruning, parent_cell, source_cell
from megatron_prune.study.schema import Study


@dataclass(frozen=True)
class Places:
    """Where a study's files lie."""

    root: Path  # runs/<study>

    def cell(self, name: str) -> Path:
        return self.root / "cells" / name

    def checkpoint(self, cell: str) -> Path:
        return self.cell(cell) / "checkpoint"

    def masks(self, pruning: Pruning) -> Path:
        """What a sparse pruning removed."""
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

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def overlap(self) -> Path:
        """The report on near duplicates between the study's corpora, where it looks for them."""
        return self.root / "overlap.json"

    def parent(self, study: Study, seed: int = 0) -> Path:
        """A seed's parent checkpoint: the study's own, or where study.yaml says that it lies."""
        return Path(study.parent.load) if study.parent.load else self.checkpoint(parent_cell(study, seed))

    def beside_parent(self, study: Study, seed: int = 0) -> Path:
        """Where a seed's parent has its account and its losses, if study.yaml names one of its iterations too."""
        return tracker.root_of(self.parent(study, seed))

    def source(self, study: Study, pruning: Pruning) -> Path:
        """The checkpoint that a pruning starts from: its parent's, or that of the link, or retraining, before it."""
        return self.checkpoint(source_cell(study, pruning)) if pruning.base else self.parent(study, pruning.seed)
