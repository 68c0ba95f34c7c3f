"""H = (2/n)·Σ X·Xᵀ over n sequences of a linear's inputs, and the factor of its inverse (SparseGPT).

A sequence's product is made in fp32 and summed into float64, so that neither the order of sequences nor
which rank saw them can matter. It is symmetric: only strips right of the diagonal are computed. Where tokens
are too few to fill H, damping alone decides in what they leave out, and fp32's noise is not far below it (1e-7 of
the largest eigenvalue, and a few inputs of a real model are thousands of times larger than the rest): the
product is made in float64 then, which at that size costs no more than the factorization.

The method asks for U, upper triangular, with H⁻¹ = Uᵀ·U. With J the reversal of rows and columns and
J·H·J = L·Lᵀ that is U = J·L⁻¹·J: one Cholesky factorization and one triangular inverse, where forming H⁻¹ and
factoring it again takes twice the work and the condition number twice over. Both are done in float64: in fp32, U
is off by 1e-4 at the condition numbers of a real model's inputs (2e4), and SparseGPT's masks by a thousandth.

A square is large (1.6 GB for the 14,336 inputs of an 8B model's fc2), so L takes H's place, and is inverted by strips:
``PEAK`` squares in float64 at once, the sum among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_prune.errors import CheckpointError
from megatron_prune.methods.selection import full_precision

DAMPING = 0.01  # of the mean of the diagonal
PEAK = 2.75  # float64 squares that ``factor`` holds at most, ``total`` among them; measured by a test
AMPLE = 2  # tokens an input, from which on H is taken to be full


@dataclass(frozen=True)
class Factor:
    """U, upper triangular with H⁻¹ = Uᵀ·U after damping: made once for all matrices that read one input."""

    upper: torch.Tensor  # fp32 [in, in]
    dead: torch.Tensor  # bool [in]: inputs that were always zero
    damping: float  # what was added to the diagonal, as a fraction of its mean: DAMPING unless that was too little


class Hessian:
    """``total`` (float64 [in, in], to be all-reduced with ``count`` over data parallel ranks) of X·Xᵀ.

    Below the diagonal ``total`` means nothing. ``tokens`` is how many all ranks will add together.
    """

    def __init__(self, inputs: int, tokens: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.count = 0  # sequences
        self._dtype = torch.float64 if tokens < AMPLE * inputs else torch.float32
        # Sixteen strips compute 17/32 of the square; narrower ones would make matrix products slower.
        self._strip = max(128, -(-inputs // 16))

    def add(self, x: torch.Tensor) -> None:
        """Add one sequence of inputs, [tokens, in]."""
        x = x.to(self._dtype)
        with full_precision():
            for start in range(0, x.shape[1], self._strip):
                stop = min(start + self._strip, x.shape[1])
                self.total[start:stop, start:] += x[:, start:stop].t() @ x[:, start:]  # [strip, in - start]
        self.count += 1

    def factor(self) -> Factor:
        """The factor of the damped inverse; ``total`` and ``count`` stay as they are.

        Dead inputs (H_jj = 0) get H_jj = 1. DAMPING·mean(diag H) is added to the diagonal; where rounding
        leaves the matrix indefinite all the same, it is doubled until it does not, and ``Factor.damping``
        says so. CheckpointError where inputs were not finite.
        """
        inputs = len(self.total)
        scale = 2 / self.count
        diagonal = self.total.diagonal().flip(0) * scale
        if not bool(diagonal.isfinite().all()):  # |h_ij| cannot exceed the larger of h_ii and h_jj
            raise CheckpointError("the inputs of a linear are not finite: the model cannot be pruned by them")
        dead = diagonal == 0
        diagonal[dead] = 1
        mean, damping = diagonal.mean(), DAMPING
        # Reversed, its lower triangle counts. Column-major, so that LAPACK's factor can take its place.
        h = torch.empty_like(self.total).t()
        info = torch.empty((), dtype=torch.int32, device=h.device)
        while True:
            for start in range(0, inputs, self._strip):
                stop = min(start + self._strip, inputs)
                h[start:stop] = self.total[inputs - stop : inputs - start].flip(0, 1).mul_(scale)
            h.diagonal().copy_(diagonal + damping * mean)
            torch.linalg.cholesky_ex(h, out=(h, info))
            if int(info) == 0:
                break
            damping *= 2
            if damping > 1:
                raise CheckpointError("the inputs of a linear have no positive definite Hessian, however damped")
        return Factor(self._reversed_inverse(h), dead.flip(0), damping)

    def _reversed_inverse(self, lower: torch.Tensor) -> torch.Tensor:
        """J·L⁻¹·J in fp32, by strips of columns: L⁻¹ has zeros above its diagonal, so each is shorter than the last.

        A strip is solved for block by block, since what solves by a part of ``lower`` copies that part.
        """
        inputs, size = len(lower), self._strip
        reversed_inverse = torch.zeros(inputs, inputs, device=lower.device)
        for start in range(0, inputs, size):
            stop = min(start + size, inputs)
            columns = torch.eye(inputs - start, stop - start, dtype=lower.dtype, device=lower.device)
            for top in range(start, inputs, size):
                bottom = min(top + size, inputs)
                rows = columns[top - start : bottom - start]
                rows.addmm_(lower[top:bottom, start:top], columns[: top - start], alpha=-1)
                rows.copy_(torch.linalg.solve_triangular(lower[top:bottom, top:bottom], rows, upper=False))
            # [inputs - start, stop - start], from L⁻¹'s rows and columns ``start``; reversed they come last first.
            reversed_inverse[: inputs - start, inputs - stop : inputs - start] = columns.flip(0, 1)
        return reversed_inverse
