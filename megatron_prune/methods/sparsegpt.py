"""SparseGPT (2301.00774): remove weights column by column, and adjust the remaining columns to compensate.

H is the Hessian of the layer's squared error, U the upper Cholesky factor of its inverse (methods/hessian.py).
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
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_prune.methods.base import InputMethod, Sparsity
from megatron_prune.methods.hessian import Factor
from megatron_prune.methods.selection import Rows, full_precision, lowest_of_planes, refuse_infinite

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
