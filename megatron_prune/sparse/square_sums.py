"""Σ‖X_j‖² of a linear's inputs, which Wanda weighs its weights by."""

from __future__ import annotations

import torch

from megatron_prune.calibrate.accumulators import Workspace
from megatron_prune.errors import CheckpointError


class SquareSums:
    """``total`` (float64 [in], to be all-reduced with ``count`` over data parallel ranks) of ‖X_j‖²."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.count = 0  # sequences
        self._workspace = Workspace()

    def add(self, x: torch.Tensor) -> None:
        """Add one sequence of inputs, [tokens, in]."""
        for part, wide, squares, ones in self._workspace.slices(x.shape[0], x.shape[1], x.device):
            wide.copy_(x[part])
            torch.mul(wide, wide, out=squares)
            self.total.addmv_(squares.t(), ones[: len(wide)])
        self.count += 1

    def mean(self) -> torch.Tensor:
        """Mean over sequences of ‖X_j‖², float64 [in]; CheckpointError where inputs were not finite."""
        if not bool(self.total.isfinite().all()):
            raise CheckpointError("the inputs of a linear are not finite: the model cannot be pruned by them")
        return self.total / self.count
