"""magnitude: remove the smallest weights, whatever they are multiplied by.

Unstructured, exactly ⌊n·s⌋ smallest |w| of a matrix's n weights go; N:M keeps the N largest of every M
consecutive inputs of a row. Published code removes all below a threshold, which overshoots where
weights tie, and bf16 weights tie often; here the weight of the lower index stays.
"""

from __future__ import annotations

import torch

from megatron_prune.methods.base import WeightMethod


class Magnitude(WeightMethod):
    def scores(self, weight: torch.Tensor, first: int, seed: tuple[int, ...]) -> torch.Tensor:
        return weight.abs()


SPARSE = Magnitude()
