"""Statistics of the inputs of a block's linears, over all sequences of all ranks of its pipeline stage.

While ``Inputs`` is open, its hooks see the input of each linear that is to be pruned, one sequence per forward pass.
Tensor-parallel ranks divide the sequences: rank i adds every TP-th whole sequence. Each rank holds only a slice of a
row-parallel linear's inputs, and in a sequence-parallel model a slice of the tokens of the other linears' inputs:
the ranks then send their slices to the rank that adds the sequence. ``reduce`` sums over the stage's ranks, where
tensor-parallel ranks act as additional data-parallel ranks.

The sum does not depend on which rank adds which sequence, so it is the same under every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from megatron_prune.engine import spec
from megatron_prune.methods.accumulators import SquareSums
from megatron_prune.methods.hessian import Hessian
from megatron_prune.sparse.matrices import ROW_PARALLEL

Statistic = SquareSums | Hessian


def linears(block: Any) -> dict[str, Any]:
    """The linears of a Megatron transformer layer, by module name."""
    attention, mlp = block.self_attention, block.mlp
    return {
        "qkv": attention.linear_qkv,
        "proj": attention.linear_proj,
        "fc1": mlp.linear_fc1,
        "fc2": mlp.linear_fc2,
    }


class Inputs:
    """Statistics of the inputs of ``modules`` of ``block``: ``with Inputs(…) as inputs: forward; inputs.reduce(n)``.

    ``kind`` is a sparse method's ``statistic``, ``tokens`` the number of tokens over all ranks.
    Do not read the block's output meanwhile: its last product is skipped.
    """

    def __init__(self, block: Any, modules: Sequence[str], kind: str, tokens: int):
        self.of: dict[str, Statistic] = {}
        self._group = mpu.get_tensor_model_parallel_group()
        self._handles = []
        found = linears(block)
        self._last = found["fc2"]
        self._token_ranks = spec.sequence_ranks(self._last.config)
        for module in modules:
            weight = found[module].weight
            inputs = weight.shape[1] * (self._group.size() if module in ROW_PARALLEL else 1)
            self.of[module] = (
                Hessian(inputs, tokens, weight.device) if kind == "hessian" else SquareSums(inputs, weight.device)
            )
            if module in ROW_PARALLEL:
                hook = self._sharded(module, axis=-1)
            else:
                own = self._whole(module) if self._token_ranks == 1 else self._sharded(module, axis=0)
                hook = spec.multiplied(found[module], own)
            self._handles.append(found[module].register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0])))

    def __enter__(self) -> Inputs:
        hidden, ranks = self._last.config.hidden_size, self._token_ranks
        # (output, bias), as Megatron's do; [s, 1, in/TP] to [s, 1, h] or [s/TP, 1, h]
        self._last.forward = lambda x: (x.new_empty(len(x) // ranks, *x.shape[1:-1], hidden), None)
        return self

    def __exit__(self, *_: object) -> None:
        del self._last.forward  # uncovers the class's own
        for handle in self._handles:
            handle.remove()

    def _whole(self, module: str) -> Any:
        """Takes inputs [s, 1, in] that all tensor-parallel ranks hold."""
        sequences = 0

        def add(x: torch.Tensor) -> None:
            nonlocal sequences
            if sequences % self._group.size() == self._group.rank():
                self.of[module].add(x.flatten(0, 1))  # [s, in]
            sequences += 1

        return add

    def _sharded(self, module: str, axis: int) -> Any:
        """Takes inputs [s, 1, in] of which this rank holds a slice along ``axis``."""
        add, ranks = self._whole(module), self._group.size()
        if ranks == 1:
            return add
        sequences = 0

        def gather(x: torch.Tensor) -> None:
            nonlocal sequences
            taker = sequences % ranks
            parts = [torch.empty_like(x) for _ in range(ranks)] if taker == self._group.rank() else None
            torch.distributed.gather(x.contiguous(), parts, group=self._group, group_dst=taker)
            add(x if parts is None else torch.cat(parts, dim=axis))
            sequences += 1

        return gather

    def reduce(self, sequences: int) -> None:
        """Turn every statistic into that of all ``sequences``, the same on all ranks of the stage. Collective."""
        group = mpu.get_tensor_and_data_parallel_group()
        for statistic in self.of.values():
            if group.size() > 1:
                torch.distributed.all_reduce(statistic.total, group=group)
            statistic.count = sequences
