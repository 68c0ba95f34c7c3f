"""magnitude: remove the weights with the smallest absolute values.

Unstructured: exactly ⌊n·s⌋ smallest |w| of a matrix's n weights are removed. N:M: the N largest of every M
consecutive inputs of a row are kept. Published code removes all weights below a threshold, which removes too many
when weights tie, and bf16 weights tie often; here, among equal weights the lower index stays.
"""

from __future__ import annotations

import torch

from megatron_prune.methods.base import WeightMethod


class Magnitude(WeightMethod):
    def scores(self, weight: torch.Tensor, first: int, seed: tuple[int, ...]) -> torch.Tensor:
        return weight.abs()


SPARSE = Magnitude()
