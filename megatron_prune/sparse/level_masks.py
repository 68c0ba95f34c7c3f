"""The dense model with the masks of an allocation of levels, for ``methods/level_search.py``: no checkpoint, one load.

Masks of every level of the grid are computed once, from the dense model: by magnitude for ``magnitude``, else by
Wanda's scores with the inputs of the dense model. A higher level removes all that a lower one removes, so one byte per
weight, the number of levels at which it stays, holds them all. An allocation is applied by products with the dense
weights, of which a copy is kept.

Import after ``runtime.start``: Megatron must be ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune import methods
from megatron_prune.data.windows import Windows
from megatron_prune.engine import forward, fp8, spec
from megatron_prune.methods.allocation import whole_inputs
from megatron_prune.methods.base import InputMethod, Sparsity
from megatron_prune.methods.level_search import LevelGrid, Levels
from megatron_prune.methods.selection import Rows
from megatron_prune.sparse.block import Statistic, stays_at
from megatron_prune.sparse.matrices import matrices
from megatron_prune.sparse.request import SparsifyTask


class _Magnitude(InputMethod):
    """``magnitude`` of weights in memory."""

    statistic = "square_sums"  # is not read

    def prune(
        self, weight: torch.Tensor, statistic: Any, sparsity: Sparsity, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        removed = rows.lowest(weight.abs(), sparsity.removed(rows.total * weight.shape[1]))
        return weight.masked_fill_(removed, 0), removed.logical_not_()


class LevelMasks:
    """Of this rank's blocks. ``add`` every block that is pruned, then ask for ``losses``, then ``restore``."""

    def __init__(self, model: list[Any], task: SparsifyTask, grid: LevelGrid):
        self._model, self._task, self._grid = model, task, grid
        wanda = methods.get_sparse("wanda")
        assert isinstance(wanda, InputMethod)
        self._method = _Magnitude() if task.request.name == "magnitude" else wanda
        self._dense: dict[tuple[int, str], torch.Tensor] = {}  # by layer and module, this rank's shard
        self._stays: dict[tuple[int, str], torch.Tensor] = {}  # uint8, alike
        self._linears: dict[tuple[int, str], Any] = {}
        self._now: dict[int, int] = {}  # the level that is applied, by layer

    def add(self, layer: int, block: Any, statistics: Mapping[str, Statistic]) -> None:
        """Compute the masks of one block from its inputs. Collective over the tensor-parallel ranks."""
        shape, request, found = self._task.parent.shape, self._task.request, spec.linears(block)
        place = self._task.layers.index(layer)
        wanted: dict[str, list[Sparsity]] = {}
        for module, asked in request.of.items():
            inputs = matrices(module, shape)[0].inputs
            alike, shifts = [(1, inputs)] * len(self._task.layers), [Fraction(0)] * len(self._task.layers)
            base = whole_inputs(alike, float(asked.ratio), shifts)[place]
            counts = [base + int(level * self._grid.step * inputs) for level in self._grid.levels]
            wanted[module] = [Sparsity(Fraction(count, inputs), asked.pattern) for count in counts]
        for module, stays in stays_at(block, shape, self._method, statistics, wanted).items():
            self._linears[layer, module], self._stays[layer, module] = found[module], stays
            self._dense[layer, module] = found[module].weight.detach().clone()

    def losses(self, allocations: Sequence[Levels], first: int, last: int) -> list[float]:
        """Mean loss of each allocation on the calibration windows from ``first`` to ``last``, the same on every rank.
        Collective."""
        windows = self._task.windows
        assert windows is not None
        return [self._loss(levels, windows[first:last]) for levels in allocations]

    def restore(self) -> None:
        """The dense weights."""
        for place, dense in self._dense.items():
            self._linears[place].weight.data.copy_(dense)

    def _loss(self, levels: Levels, windows: Windows) -> float:
        for (layer, module), stays in self._stays.items():
            level = levels[self._task.layers.index(layer)]
            if self._now.get(layer) != level:
                weight = self._linears[layer, module].weight
                torch.mul(self._dense[layer, module], stays > level - self._grid.lowest, out=weight.data)
        self._now = dict(zip(self._task.layers, levels, strict=True))
        fp8.cast_weights_again(unwrap_model(self._model[0]))
        own = range(mpu.get_data_parallel_rank(), len(windows), mpu.get_data_parallel_world_size())
        found = forward.run(self._model, (windows[n] for n in own))
        sums = torch.zeros(len(windows), dtype=torch.float64)
        sums[own] = torch.tensor(found or [0.0] * len(own), dtype=torch.float64)
        return float(forward.total(sums).mean())
