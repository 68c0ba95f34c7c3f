"""magnitude: remove the smallest weights, whatever they are multiplied by.

Unstructured, exactly ⌊n·s⌋ smallest |w| of a matrix's n weights go; N:M keeps the N largest of every M
consecutive inputs of a row. Published code removes all below a threshold, which overshoots where
weights tie, and bf16 weights tie often; here the weight of the lower index stays.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_prune.methods import SparseMethod, Sparsity
from megatron_prune.sparse.choose import lowest_in_groups
from megatron_prune.sparse.rows import Rows


class Magnitude(SparseMethod):
    statistic = "none"

    def prune(
        self, weight: torch.Tensor, statistic: Any, sparsity: Sparsity, rows: Rows, seed: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, m = sparsity.pattern.n, sparsity.pattern.m
        if n is None or m is None:
            removed = rows.lowest(weight.abs(), sparsity.removed(rows.total * weight.shape[1]))
        else:
            removed = lowest_in_groups(weight.abs(), m - n, m)
        return weight.masked_fill_(removed, 0), removed.logical_not_()


SPARSE = Magnitude()
