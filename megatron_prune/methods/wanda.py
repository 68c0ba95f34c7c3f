"""Wanda (2306.11695): remove the weights that contribute least to their own output.

The score of a weight is |W_ij|·√a_j, with a_j the mean over sequences of ‖X_j‖². Every row (one output) loses its
⌊in·s⌋ lowest; N:M removes the M − N lowest of every M consecutive inputs. Remaining weights are not updated.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_prune.methods.base import InputMethod, Sparsity
from megatron_prune.methods.selection import Rows, lowest_in_groups, lowest_in_rows


class Wanda(InputMethod):
    statistic = "square_sums"

    def prune(
        self, weight: torch.Tensor, statistic: Any, sparsity: Sparsity, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = weight.abs().mul_(statistic.sqrt().float())  # [rows, in]
        n, m = sparsity.pattern.n, sparsity.pattern.m
        if n is None or m is None:
            removed = lowest_in_rows(scores, sparsity.removed(weight.shape[1]))
        else:
            removed = lowest_in_groups(scores, m - n, m)
        return weight.masked_fill_(removed, 0), removed.logical_not_()


SPARSE = Wanda()
