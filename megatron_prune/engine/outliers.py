"""Scores of a layer's weights, and the outliers among them, by which OWL divides a ratio (``methods/allocation.py``).

A weight's score is |W_ij|·‖X_j‖ (Wanda's), and it is an outlier if that is more than M times the mean over all weights
of its block's linears. Import after ``runtime.start``: Megatron must be ready.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine import spec
from megatron_prune.methods.allocation import THRESHOLDS

SITES = {"qkv": "input_layernorm", "proj": "attention", "fc1": "pre_mlp_layernorm", "fc2": "mlp"}  # of their inputs
_SLICE = 1 << 22  # weights whose scores are in memory at a time, in float64


@torch.no_grad()
def counts(stage: Any, shape: ModelShape, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The statistic ``outliers`` of a model of ``shape``, from its sums of squares: float64 [L, 1 + thresholds] on the
    CPU, the same on every rank. Collective."""
    blocks = unwrap_model(stage).decoder.layers
    device = next(stage.parameters()).device
    found = torch.zeros(shape.num_layers, 1 + len(THRESHOLDS), dtype=torch.float64, device=device)
    counts_here = mpu.get_data_parallel_rank() == 0 and mpu.get_tensor_model_parallel_rank() == 0
    for block in blocks:
        layer = block.layer_number - 1  # Megatron counts layers of all stages from 1
        here = spec.linears(block)
        roots = {name: sums[f"{site}.sum_sq"][layer].sqrt().to(device) for name, site in SITES.items() if name in here}
        some, size = count(block, roots, THRESHOLDS)
        if counts_here:
            found[layer] = torch.tensor([size, *some], dtype=torch.float64)
    torch.distributed.all_reduce(found)
    return found.cpu()


@torch.no_grad()
def count(block: Any, roots: Mapping[str, torch.Tensor], thresholds: Sequence[float]) -> tuple[list[int], int]:
    """How many weights of the linears in ``roots`` have a score |W_ij|·roots_j above each of ``thresholds`` times the
    mean of all of them, and how many weights there are.

    ``roots`` are float64 [inputs of the whole linear], or longer. The same on every rank of the tensor-parallel group.
    Collective over it.
    """
    group, found = mpu.get_tensor_model_parallel_group(), spec.linears(block)
    if not roots:
        return [0] * len(thresholds), 0

    def total(value: torch.Tensor) -> torch.Tensor:
        if group.size() > 1:
            torch.distributed.all_reduce(value, group=group)
        return value

    zero = torch.zeros((), dtype=torch.float64, device=found[next(iter(roots))].weight.device)
    size = int(total(zero + sum(found[module].weight.numel() for module in roots)))
    mean = total(sum((some.sum() for some in scores(block, roots)), zero)) / size
    limits = mean * torch.tensor(thresholds, dtype=torch.float64, device=zero.device)
    above = torch.zeros(len(thresholds), dtype=torch.float64, device=zero.device)
    for some in scores(block, roots):
        above += torch.stack([(some > limit).sum() for limit in limits])
    return [int(number) for number in total(above)], size


def scores(block: Any, roots: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """|W_ij|·roots_j of this rank's shards of the linears in ``roots``, some rows at a time: float64 [rows, in]."""
    group, found = mpu.get_tensor_model_parallel_group(), spec.linears(block)
    for module, whole in roots.items():
        weight = found[module].weight
        first = group.rank() * weight.shape[1] if module in spec.ROW_PARALLEL else 0
        own = whole[first : first + weight.shape[1]]
        for rows in weight.detach().split(max(1, _SLICE // weight.shape[1])):
            yield rows.double().abs_().mul_(own)
