"""random: a uniform choice under the same constraints, as a baseline for every other method.

Structured (depth, width or both): explicit ``--target-…`` sizes may cut any dimension; ``--ratio`` and
``--target-params`` need ``--axis depth|width``. Sparse: exactly ⌊n·s⌋ weights of a matrix, or M − N of every M
consecutive inputs of a row.

Numbers come from numpy's PCG64 seeded with ``--seed``: layer by layer in a fixed order, or weight by weight of a
matrix that has its own seed. So a seed makes the same choice on every machine and layout.
"""

from __future__ import annotations

import numpy
import torch

from megatron_prune.errors import UsageError
from megatron_prune.methods.base import (
    DEPTH,
    DIMENSIONS,
    WIDTH,
    PruningRequest,
    RankingMethod,
    Selection,
    WeightMethod,
)
from megatron_prune.methods.options import RandomOptions
from megatron_prune.methods.ranking import keep_heads, keep_highest


class Random(RankingMethod[RandomOptions]):
    dimensions = DIMENSIONS
    random = True

    def free_dimensions(self, settings: RandomOptions) -> tuple[str, ...]:
        if settings.axis is None:
            raise UsageError(
                "--axis",
                got="nothing",
                expected="depth or width",
                why="random can cut either of them to meet --ratio or --target-params",
            )
        return DEPTH if settings.axis == "depth" else WIDTH

    def needs(self, settings: RandomOptions) -> tuple[str, ...]:
        return ()

    def select(self, request: PruningRequest[RandomOptions]) -> Selection:
        source, target = request.source, request.target
        generator = numpy.random.Generator(numpy.random.PCG64(request.seed))

        def scores(count: int) -> torch.Tensor:
            # A random permutation makes every subset equally likely: of heads inside groups, and of groups.
            return torch.from_numpy(generator.random(count))

        layers, _ = keep_highest(scores(source.num_layers), target.num_layers, "layer")
        hidden = None
        if target.hidden_size < source.hidden_size:
            hidden, _ = keep_highest(scores(source.hidden_size), target.hidden_size, "hidden")
        heads = None
        if target.num_attention_heads < source.num_attention_heads:
            heads = tuple(keep_heads(scores(source.num_attention_heads), source, target, layer)[0] for layer in layers)
        ffn = None
        if target.ffn_hidden_size < source.ffn_hidden_size:
            ffn = tuple(keep_highest(scores(source.ffn_hidden_size), target.ffn_hidden_size, "ffn")[0] for _ in layers)
        return Selection(layers, hidden, heads, ffn)


class RandomWeights(WeightMethod):
    random = True

    def scores(self, weight: torch.Tensor, first: int, seed: tuple[int, ...]) -> torch.Tensor:
        # One draw per weight of the whole matrix; skip the draws of the rows before these.
        bits = numpy.random.PCG64(seed).advance(first * weight.shape[1])
        return torch.from_numpy(numpy.random.Generator(bits).random(weight.shape)).float()  # [rows, in]


METHOD = Random()
SPARSE = RandomWeights()
