"""H = (2/n)·Σ X·Xᵀ over n sequences of a linear's inputs, and the factor of its inverse (SparseGPT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factor:
    """U, upper triangular with H⁻¹ = Uᵀ·U after damping: made once for all matrices that read one input."""

    upper: torch.Tensor  # fp32 [in, in]
    dead: torch.Tensor  # bool [in]: inputs that were always zero
    damping: float  # what was added to the diagonal, as a fraction of its mean


class Hessian:
    """``total`` (float64 [in, in], to be all-reduced with ``count`` over data parallel ranks) of X·Xᵀ."""

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.count = 0  # sequences

    def add(self, x: torch.Tensor) -> None:
        """Add one sequence of inputs, [tokens, in]."""
        raise NotImplementedError

    def factor(self) -> Factor:
        """The factor of the damped inverse. Frees nothing; call it when all sequences are added and reduced."""
        raise NotImplementedError
