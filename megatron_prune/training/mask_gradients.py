"""The gradients of one step of learned masks and their multipliers, summed over the ranks that share them.

Three sums take what differs between ranks, each over all ranks that need the result, so that these have the same bits:

1. within a pipeline stage: the expected sizes of rows whose units are on several tensor-parallel ranks, from the first
   replica, and gradients of masks of a stage that tensor-parallel ranks share;
2. over replicas: the loss's gradients of masks that are sharded with their weights;
3. over all ranks: those of layers and hidden channels, what the multipliers ascend, and the squares for the norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prune.methods import sheared_llama
from megatron_prune.training.mask_shards import REPLICATED, MaskShards

type Masks = Mapping[str, torch.nn.Parameter]  # by kind


@dataclass(frozen=True)
class Ranks:
    """This rank's place, and the groups to sum over: of its stage, of its replicas, and all (None: it is alone)."""

    tensor: int = 0
    replica: int = 0
    replicas: int = 1
    stage_group: Any = None
    replica_group: Any = None
    world: Any = None

    @staticmethod
    def of_megatron() -> Ranks:
        from megatron.core import parallel_state as mpu

        return Ranks(
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_data_parallel_rank(),
            mpu.get_data_parallel_world_size(),
            mpu.get_tensor_and_data_parallel_group(),
            mpu.get_data_parallel_group(),
            torch.distributed.group.WORLD,
        )


@dataclass(frozen=True)
class StepOfMasks:
    """``history``: by kind ŝ, t, λ₁, λ₂, before the step. ``square``: of the norm of all gradients; fp32 []."""

    history: list[tuple[float, ...]]
    square: torch.Tensor


def take(
    shards: MaskShards,
    ranks: Ranks,
    log_alpha: Masks,
    multipliers: Masks,
    of_loss: Mapping[str, torch.Tensor],
    targets: Sequence[float],
) -> StepOfMasks:
    """Set the gradient of every mask and multiplier. Collective.

    ``of_loss`` has this rank's gradients of its own samples, which are changed: of what ranks share, parts that add up
    to the whole. ``targets`` are the sparsities t of this step, by kind.
    """
    kinds = list(zip(shards.kinds, targets, strict=True))
    sharded = [(number, kind, t) for number, (kind, t) in enumerate(kinds) if kind.name not in REPLICATED]
    shared = [(number, kind, t) for number, (kind, t) in enumerate(kinds) if kind.name in REPLICATED]
    like = next(iter(multipliers.values())).detach()
    own = {
        kind.name: shards.row_sums(kind, sheared_llama.probability(log_alpha[kind.name])) / kind.size
        for kind, _ in kinds
    }  # this rank's part of the fraction that is expected to stay, of every row
    stays = {name: part.detach().clone() for name, part in own.items()}
    counts = {kind.name: ranks.tensor == 0 or shards.is_split(kind) for _, kind, _ in sharded}
    for name, counted in counts.items():
        if not counted or ranks.replica:
            stays[name].zero_()
    whole = [of_loss[kind.name] for _, kind, _ in sharded if not shards.is_split(kind)]
    _add([*(stays[name] for name in counts), *whole], ranks.stage_group)
    _add([of_loss[kind.name] for _, kind, _ in sharded if shards.is_split(kind)], ranks.replica_group)

    moments = like.new_zeros(len(kinds), 2)  # the mean over rows of ŝ − t, and of its square
    square = like.new_zeros(())

    def descend(number: int, kind: sheared_llama.Kind, target: float) -> None:
        """The gradient of a kind's masks, from the loss and the penalty, and its part of the moments."""
        excess, count = 1 - stays[kind.name] - target, kind.rows
        parameter, (one, two) = log_alpha[kind.name], multipliers[kind.name].detach()
        parameter.grad = of_loss[kind.name].div_(ranks.replicas)
        own[kind.name].backward(-(one + 2 * two * excess) / count)  # type: ignore[no-untyped-call]
        moments[number] = torch.stack([excess.sum(), excess.square().sum()]) / count

    for number, kind, target in sharded:
        descend(number, kind, target)
        if counts[kind.name] and not ranks.replica:
            gradient = log_alpha[kind.name].grad
            assert gradient is not None
            square += gradient.square().sum()
    if ranks.tensor or ranks.replica:
        moments.zero_()
    _add([moments, square, *(of_loss[kind.name] for _, kind, _ in shared)], ranks.world)
    for number, kind, target in shared:
        descend(number, kind, target)
        gradient = log_alpha[kind.name].grad
        assert gradient is not None
        square += gradient.square().sum()
    for (kind, _), ascent in zip(kinds, moments, strict=True):
        multipliers[kind.name].grad = ascent.clone()
    square += moments.square().sum()
    numbers = torch.cat([moments[:, :1], torch.stack([multipliers[kind.name].detach() for kind, _ in kinds])], 1)
    history: list[tuple[float, ...]] = [
        (excess + t, t, one, two) for (excess, one, two), t in zip(numbers.tolist(), targets, strict=True)
    ]
    return StepOfMasks(history, square)


def _add(tensors: Sequence[torch.Tensor], group: Any) -> None:
    """Sum each tensor over the ranks of a group, in place, in one collective."""
    if not tensors or group is None or torch.distributed.get_world_size(group) == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
