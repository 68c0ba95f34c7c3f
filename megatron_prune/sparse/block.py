"""One block: statistics of the inputs of its linears, and the pruning that reads them.

While ``Inputs`` is open, its hooks see the input of each linear that is to be pruned, one sequence per forward pass.
Tensor-parallel ranks divide the sequences: rank i adds every TP-th whole sequence. Each rank holds only a slice of a
row-parallel linear's inputs, and in a sequence-parallel model a slice of the tokens of the other linears' inputs:
the ranks then send their slices to the rank that adds the sequence. ``reduce`` sums over all ranks of the pipeline
stage, where tensor-parallel ranks act as additional data-parallel ranks. The sum does not depend on which rank adds
which sequence, so it is the same under every layout.

In ``prune_block`` replica i mod R of R data-parallel replicas prunes module i, so that replicas share the work and
cannot end up with different weights; the others receive the result. Inside a replica every tensor-parallel rank prunes
its share of whole rows. One rank factorizes a Hessian and sends the factor to the ranks that share it.

A pruned weight is rounded to the type that the model computes in and to the type that it is stored in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine import outliers, spec
from megatron_prune.methods.accumulators import SquareSums
from megatron_prune.methods.base import InputMethod, SparseMethod, Sparsity
from megatron_prune.methods.selection import Rows, filled_bins, full_precision, histogram
from megatron_prune.methods.sparsegpt import Factor, Hessian
from megatron_prune.sparse.matrices import Matrix, local_rows, matrices, to_columns, to_rows
from megatron_prune.sparse.request import SparsifyRequest, Sums

Statistic = SquareSums | Hessian


class Inputs:
    """Statistics of the inputs of ``modules`` of ``block``: ``with Inputs(…) as inputs: forward; inputs.reduce(n)``.

    ``kind`` is a sparse method's ``statistic``, ``tokens`` the number of tokens over all ranks.
    Do not read the block's output meanwhile: unless it is ``advancing``, its last product is skipped.
    """

    def __init__(self, block: Any, modules: Sequence[str], kind: str, tokens: int, *, advancing: bool = False):
        self._advancing = advancing
        self.of: dict[str, Statistic] = {}
        self._group = mpu.get_tensor_model_parallel_group()
        self._handles = []
        found = spec.linears(block)
        self._last = found["fc2"] if "fc2" in found else found["proj"]
        self._token_ranks = spec.sequence_ranks(self._last.config)
        for module in modules:
            weight = found[module].weight
            inputs = weight.shape[1] * (self._group.size() if module in spec.ROW_PARALLEL else 1)
            self.of[module] = (
                Hessian(inputs, tokens, weight.device) if kind == "hessian" else SquareSums(inputs, weight.device)
            )
            if module in spec.ROW_PARALLEL:
                hook = self._sharded(module, axis=-1)
            else:
                own = self._whole(module) if self._token_ranks == 1 else self._sharded(module, axis=0)
                hook = spec.multiplied(found[module], own)
            self._handles.append(found[module].register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0])))

    def __enter__(self) -> Inputs:
        if self._advancing:
            return self
        hidden, ranks = self._last.config.hidden_size, self._token_ranks
        # (output, bias), as Megatron's do; [s, 1, in/TP] to [s, 1, h] or [s/TP, 1, h]
        self._last.forward = lambda x: (x.new_empty(len(x) // ranks, *x.shape[1:-1], hidden), None)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._advancing:
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


def count_outliers(block: Any, statistics: Mapping[str, Statistic], threshold: float) -> tuple[int, int]:
    """How many weights of the modules in ``statistics`` have a score |W_ij|·√a_j above ``threshold`` times the mean of
    all of them, and how many weights there are.

    The same on every rank. Collective over the tensor-parallel ranks.
    """
    (found,), size = outliers.count(block, _roots(statistics), [threshold])
    return found, size


@torch.no_grad()
def count_scores(block: Any, statistics: Mapping[str, Statistic]) -> list[list[int]]:
    """How many weights of the modules in ``statistics`` have their score |W_ij|·√a_j in each bin that is not empty.

    The same on every rank. Collective over the tensor-parallel ranks.
    """
    group = mpu.get_tensor_model_parallel_group()
    counts = sum(map(histogram, outliers.scores(block, _roots(statistics))), torch.zeros((), dtype=torch.int64))
    if group.size() > 1:
        torch.distributed.all_reduce(counts, group=group)
    return filled_bins(counts)


def _roots(statistics: Mapping[str, Statistic]) -> dict[str, torch.Tensor]:
    """√a_j of every module's inputs."""
    found = {}
    for module, statistic in statistics.items():
        assert isinstance(statistic, SquareSums)
        found[module] = statistic.mean().sqrt()
    return found


def prune_block(
    block: Any,
    shape: ModelShape,
    request: SparsifyRequest,
    layer: int,
    statistics: Mapping[str, Statistic],
    stored: torch.dtype,
) -> tuple[dict[str, torch.Tensor], list[Sums]]:
    """Prune ``block``, number ``layer``, in place as ``request`` says. Collective over the pipeline stage.

    ``shape`` is that of the block; ``statistics`` have the modules that are pruned. Returns, on every rank, the masks
    of its shards (bool, on the weights' device) by module, and the sums.
    """
    found = spec.linears(block)
    replicas, replica = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    all_matrices = [matrix for module in statistics for matrix in matrices(module, shape)]
    device = found[next(iter(statistics))].weight.device
    sums = torch.zeros(len(all_matrices), 3, dtype=torch.float64, device=device)  # removed, error, reference
    masks: dict[str, torch.Tensor] = {}
    for number, module in enumerate(statistics):
        weight = found[module].weight
        if number % replicas == replica:
            sparsity = request.sparsity(layer, module)
            solver = _Solver(module, shape, request.method, sparsity, statistics[module], number)
            masks[module] = solver.prune(weight, stored)
            for matrix, values in solver.sums.items():
                sums[all_matrices.index(matrix)] = torch.stack(values)
        else:
            masks[module] = torch.empty(weight.shape, dtype=torch.bool, device=device)
    if replicas > 1:
        group = mpu.get_data_parallel_group()
        for number, module in enumerate(statistics):
            torch.distributed.broadcast(found[module].weight.data, group=group, group_src=number % replicas)
            torch.distributed.broadcast(masks[module], group=group, group_src=number % replicas)
    stage = mpu.get_tensor_and_data_parallel_group()
    if stage.size() > 1:
        torch.distributed.all_reduce(sums, group=stage)
    return masks, [
        Sums(matrix, int(removed), error / of if of > 0 else None)
        for matrix, (removed, error, of) in zip(all_matrices, sums.tolist(), strict=True)
    ]


@torch.no_grad()
def stays_at(
    block: Any,
    shape: ModelShape,
    method: InputMethod,
    statistics: Mapping[str, Statistic],
    wanted: Mapping[str, Sequence[Sparsity]],
) -> dict[str, torch.Tensor]:
    """Of every weight of this rank's shards, by module: at how many of the ``wanted`` sparsities it stays, uint8.

    They are ascending, and what goes at one goes at all after it. The block is left as it is. Collective over the
    tensor-parallel ranks.
    """
    found: dict[str, torch.Tensor] = {}
    for number, (module, sparsities) in enumerate(wanted.items()):
        weight = spec.linears(block)[module].weight
        found[module] = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
        for sparsity in sparsities:
            solver = _Solver(module, shape, method, sparsity, statistics[module], number)
            found[module] += solver.prune(weight.detach().clone(), weight.dtype)
    return found


class _Solver:
    """Prunes the matrices of one module on the ranks of one replica."""

    def __init__(
        self,
        module: str,
        shape: ModelShape,
        method: SparseMethod,
        sparsity: Sparsity,
        statistic: Statistic,
        number: int,
    ):
        assert isinstance(method, InputMethod)
        self.method, self.sparsity = method, sparsity
        self.module, self.shape, self.statistic = module, shape, statistic
        self.group = mpu.get_tensor_model_parallel_group()
        self.maker = number % self.group.size()  # computes the factor
        self.sums: dict[Matrix, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def prune(self, weight: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
        """Prune this rank's shard of ``weight`` [rows, in] in place; returns its mask."""
        ranks, rank = self.group.size(), self.group.rank()
        sharded_inputs = self.module in spec.ROW_PARALLEL and ranks > 1
        whole = to_rows(weight.float(), self.group) if sharded_inputs else weight.detach().float()  # [rows, in]
        kept = torch.empty(whole.shape, dtype=torch.bool, device=whole.device)
        shared = self._shared_statistic(whole.device)
        measure = _Measure(self.statistic)
        for matrix in matrices(self.module, self.shape):
            local = local_rows(matrix, self.shape, rank, ranks)
            rows = Rows(local.first, matrix.rows, self.group if ranks > 1 else None)
            before = whole[local.places].clone()  # [rows of the matrix here, in]
            pruned, stays = self.method.prune(before.clone(), shared, self.sparsity, rows)
            pruned = pruned.to(weight.dtype).to(stored).float()
            whole[local.places], kept[local.places] = pruned, stays
            self.sums[matrix] = ((~stays).sum().double(), *measure(before, pruned))
            del before, pruned, stays  # free them before the next matrix
        if sharded_inputs:
            whole = to_columns(whole, len(weight), self.group)
            kept = to_columns(kept.to(torch.uint8), len(weight), self.group).bool()
        weight.data.copy_(whole)
        return kept

    def _shared_statistic(self, device: torch.device) -> torch.Tensor | Factor:
        """The statistic that the method reads, the same on all tensor-parallel ranks."""
        if isinstance(self.statistic, SquareSums):
            return self.statistic.mean()
        if self.group.size() == 1:
            return self.statistic.factor()
        made = self.statistic.factor() if self.group.rank() == self.maker else None
        inputs = len(self.statistic.total)
        # Collectives ignore strides: a column-major factor would arrive transposed.
        upper = made.upper.contiguous() if made else torch.empty(inputs, inputs, dtype=torch.float32, device=device)
        dead = made.dead if made else torch.empty(inputs, dtype=torch.bool, device=device)
        damping = torch.tensor(made.damping if made else 0.0, dtype=torch.float64, device=device)
        for tensor in (upper, dead, damping):
            torch.distributed.broadcast(tensor, group=self.group, group_src=self.maker)
        return Factor(upper, dead, float(damping))


class _Measure:
    """tr(ΔW·H·ΔWᵀ) and tr(W·H·Wᵀ) over some rows, with the H that the method had: whole, or its diagonal."""

    def __init__(self, statistic: Statistic):
        self._whole = isinstance(statistic, Hessian)
        self._h = statistic.total.float()
        if self._whole:  # symmetric: entries right of the diagonal count twice
            self._h.triu_().diagonal().mul_(0.5)

    def __call__(self, before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._weigh(before - after), self._weigh(before)

    def _weigh(self, rows: torch.Tensor) -> torch.Tensor:
        if self._whole:
            with full_precision():
                return 2 * ((rows @ self._h) * rows).sum(dtype=torch.float64)
        return (rows.square() * self._h).sum(dtype=torch.float64)
