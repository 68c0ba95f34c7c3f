"""SparseGPT (2301.00774): remove weights column by column, and adjust the remaining columns to compensate.

H is the Hessian of the layer's squared error, U the upper Cholesky factor of its inverse.
Removing w in column i costs (w / U_ii)²; the best compensation subtracts (w / U_ii)·U[i, i:] from the weights of
the same row.

Columns are processed in blocks of 128 (N:M: the largest multiple of M up to 128). Unstructured pruning chooses when
it reaches a block: the lowest costs over all rows and the block's columns jointly. Up to column c of a matrix of R
rows, ⌊R·c·s⌋ weights are removed, so the counts of all blocks add up to exactly ⌊n·s⌋. N:M chooses at each M-th
column, by the costs of the already updated weights.

A block is stored transposed, so that a column is contiguous, and its columns are updated in strips: a column's error
is applied to the rest of its strip at once, to the rest of the block by one matrix product per strip, and to the
rest of the matrix by one per block. This is the same arithmetic in another order. Rows depend on each other only
through the joint choice, so ranks that hold different rows exchange nothing else.

The Hessian is H = (2/n)·Σ X·Xᵀ over n sequences of a linear's inputs.

Each sequence's product is computed in fp32 and summed in float64, so that the result depends neither on the order
of sequences nor on which rank read them. H is symmetric, so only strips right of the diagonal are computed. With
too few tokens, H is singular and only the damping determines the rest; fp32 noise is close to the damping (1e-7 of
the largest eigenvalue, and a few inputs of a real model are thousands of times larger than the rest). Then the
product is computed in float64, which at that size costs no more than the factorization.

The method needs U, upper triangular, with H⁻¹ = Uᵀ·U. With J the reversal of rows and columns and
J·H·J = L·Lᵀ, U = J·L⁻¹·J: one Cholesky factorization and one triangular inverse. Forming H⁻¹ and factoring it
again would take twice the work and square the error's dependence on the condition number. Both steps run in
float64: in fp32, U is off by 1e-4 at the condition number of a real model's inputs (2e4), and 0.1% of SparseGPT's
mask changes.

H is large (1.6 GB for the 14,336 inputs of an 8B model's fc2), so L overwrites H and is inverted in strips. At
most ``PEAK`` float64 matrices of H's size exist at once, including the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_prune.errors import CheckpointError
from megatron_prune.methods.base import InputMethod, Sparsity
from megatron_prune.methods.selection import Rows, full_precision, lowest_of_planes, refuse_infinite

DAMPING = 0.01  # of the mean of the diagonal
PEAK = 2.75  # peak of ``factor`` in float64 matrices of H's size, with ``total``; measured by a test
AMPLE = 2  # tokens per input from which H is taken to have full rank


@dataclass(frozen=True)
class Factor:
    """U, upper triangular with H⁻¹ = Uᵀ·U after damping: computed once for all matrices that read the same input."""

    upper: torch.Tensor  # fp32 [in, in]
    dead: torch.Tensor  # bool [in]: inputs that were always zero
    damping: float  # added to the diagonal, as a fraction of its mean; above DAMPING if that was not enough


class Hessian:
    """X·Xᵀ in ``total`` (float64 [in, in]); all-reduce it with ``count`` over data-parallel ranks.

    Below the diagonal ``total`` is undefined. ``tokens`` is the number that all ranks add together.
    """

    def __init__(self, inputs: int, tokens: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.count = 0  # sequences
        self._dtype = torch.float64 if tokens < AMPLE * inputs else torch.float32
        # Sixteen strips compute 17/32 of the matrix; narrower strips would slow the matrix products.
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
        """The factor of the damped inverse; ``total`` and ``count`` are unchanged.

        Dead inputs (H_jj = 0) get H_jj = 1. DAMPING·mean(diag H) is added to the diagonal. If rounding still
        leaves the matrix indefinite, the damping is doubled until it is definite, and recorded in
        ``Factor.damping``. CheckpointError if the inputs were not finite.
        """
        inputs = len(self.total)
        scale = 2 / self.count
        diagonal = self.total.diagonal().flip(0) * scale
        if not bool(diagonal.isfinite().all()):  # |h_ij| cannot exceed the larger of h_ii and h_jj
            raise CheckpointError(
                "a linear's inputs are not finite, expected finite ones: use another calibration text, or bf16 or fp32"
            )
        dead = diagonal == 0
        diagonal[dead] = 1
        mean, damping = diagonal.mean(), DAMPING
        # LAPACK reads the lower triangle of the reversed matrix. Column-major, so that it factors in place.
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
                raise CheckpointError(
                    "expected inputs of a linear whose damped Hessian can be factored, got others: use more "
                    "calibration text"
                )
        return Factor(self._reversed_inverse(h), dead.flip(0), damping)

    def _reversed_inverse(self, lower: torch.Tensor) -> torch.Tensor:
        """J·L⁻¹·J in fp32, in strips of columns: L⁻¹ is zero above its diagonal, so each strip is shorter.

        A strip is solved block by block, because the solver copies the part of ``lower`` that it reads.
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
            # [inputs - start, stop - start], from row and column ``start`` of L⁻¹; reversed, the last come first.
            reversed_inverse[: inputs - start, inputs - stop : inputs - start] = columns.flip(0, 1)
        return reversed_inverse


BLOCK = 128
STRIP = 32


class SparseGPT(InputMethod):
    statistic = "hessian"

    def prune(
        self, weight: torch.Tensor, statistic: Any, sparsity: Sparsity, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        factor: Factor = statistic
        inputs, m = weight.shape[1], sparsity.pattern.m or 1
        weight.masked_fill_(factor.dead, 0)
        if sparsity.pattern.m is not None:  # the joint choice checks this itself, on all ranks at once
            refuse_infinite(weight)
        kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        with full_precision():
            for start in range(0, inputs, BLOCK // m * m):
                stop = min(start + BLOCK // m * m, inputs)
                block = weight[:, start:stop].t().contiguous()  # [columns, rows]
                upper = factor.upper[start:stop, start:stop]
                if sparsity.pattern.m is None:
                    costs = (block / upper.diagonal()[:, None]).square_()  # [columns, rows]
                    count = sparsity.removed(rows.total * stop) - sparsity.removed(rows.total * start)
                    removed = rows.lowest(costs.t(), count).t()
                else:
                    removed = torch.zeros_like(block, dtype=torch.bool)
                errors = _prune_block(block, upper, removed, sparsity)
                weight[:, start:stop] = block.t()
                kept[:, start:stop] = ~removed.t()
                weight[:, stop:].addmm_(errors.t(), factor.upper[start:stop, stop:], alpha=-1)
        return weight, kept


def _prune_block(block: torch.Tensor, upper: torch.Tensor, removed: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Prune a block [columns, rows] in place; returns the columns' errors, (w − q) / U_ii, in the same shape.

    ``removed`` marks the weights to remove; for N:M this function fills it in, M columns at a time.
    """
    n, m = sparsity.pattern.n or 0, sparsity.pattern.m
    columns = len(block)
    inverse = upper.diagonal().reciprocal()[:, None]  # [columns, 1]
    scale = removed * inverse  # 1 / U_ii for a removed weight, 0 for a kept one
    errors = torch.empty_like(block)
    strip = STRIP // (m or 1) * (m or 1)
    for left in range(0, columns, strip):
        right = min(left + strip, columns)
        for i in range(left, right):
            if m is not None and i % m == 0:
                costs = (block[i : i + m] * inverse[i : i + m]).square_()  # [m, rows]
                removed[i : i + m] = lowest_of_planes(costs, m - n)
                scale[i : i + m] = removed[i : i + m] * inverse[i : i + m]
            torch.mul(block[i], scale[i], out=errors[i])
            # addcmul rounds an element the same way wherever it is in memory; addr does not.
            block[i + 1 : right].addcmul_(upper[i, i + 1 : right, None], errors[i], value=-1)
        block[right:].addmm_(upper[left:right, right:].t(), errors[left:right], alpha=-1)
    block.masked_fill_(removed, 0)
    return errors


SPARSE = SparseGPT()
