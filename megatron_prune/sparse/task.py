"""What a pruning is to do, and what it did to a matrix: the words that its parts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.layout import layer_name
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.data.windows import Windows
from megatron_prune.masks import Masks, find_masks, open_masks, verify
from megatron_prune.sparse.matrices import SUFFIXES, Matrix
from megatron_prune.sparse.request import Request


@dataclass(frozen=True)
class Task:
    """What is to be done: prune ``parent`` as ``request`` says, by what it does with ``windows`` (None: unread)."""

    parent: Checkpoint
    request: Request
    windows: Windows | None
    question: Mapping[str, Any]  # all that decides the result, as JSON
    save: Path

    @property
    def layers(self) -> tuple[int, ...]:
        return self.request.chosen(self.parent.shape)

    @property
    def patterns(self) -> dict[str, str]:
        """The patterns of the weights that are pruned, by logical name."""
        return {
            layer_name(layer, SUFFIXES[module]): str(self.request.of[module].pattern)
            for layer in self.layers
            for module in self.request.modules
        }

    def held_masks(self) -> Masks | None:
        """The masks that the parent has already: those of weights that are not pruned now stay."""
        folder = find_masks(self.parent.root)
        return None if folder is None else open_masks(folder)

    def check_held_masks(self) -> None:
        """MasksError where masks of the parent that stay are damaged, or do not fit its weights: they would be hashed
        anew as they are."""
        held = self.held_masks()
        if held is not None:
            verify(held, self.parent, but=self.patterns)


@dataclass(frozen=True)
class Sums:
    """What pruning did to one matrix, over all its rows."""

    matrix: Matrix
    removed: int
    error: float | None  # tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ); None where W·H·Wᵀ is zero

    def row(self) -> dict[str, Any]:
        """Its row of the table ``pruning/sparsity.json``, but for the layer."""
        matrix = self.matrix
        return {
            "matrix": matrix.name,
            "rows": matrix.rows,
            "inputs": matrix.inputs,
            "removed": self.removed,
            "error": self.error,
        }
