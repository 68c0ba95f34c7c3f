"""Taylor saliencies of every channel of a block's linears, from one backward pass over calibration text.

With W a weight, g_n the gradient of window n's mean loss, g the mean of g_n over windows and h the mean of their
squares (the diagonal of the empirical Fisher matrix, in the place of the Hessian's), a channel's saliency is, over the
weights w of its row (``linear_qkv``, ``linear_fc1``) or column (``linear_proj``, ``linear_fc2``):

    vector   |Σ w·g|
    first    Σ |w·g|
    second   Σ w²·h
    mixed    Σ |w·g − ½·w²·h|

A micro-batch is one window, so a weight's gradient is that of a window when autograd has accumulated it: a hook adds it
and its square to two sums in fp32 and frees it, so that only one weight's gradient exists at a time and several windows
may be in the pipeline. Every weight here is whole in the direction that is summed, on every tensor-parallel rank.
Import after ``runtime.start``: Megatron must be ready.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine import spec
from megatron_prune.methods.accumulators import SALIENCIES
from megatron_prune.structured.statistics import saliency_shapes

_ROWS = ("qkv", "fc1")  # whose channels are rows
_SLICE = 1 << 22  # weights that are widened to float64 at a time


@dataclass
class _Sums:
    """Of one weight: its gradients over windows, and their squares."""

    module: str
    layer: int
    weight: torch.nn.Parameter
    gradient: torch.Tensor
    square: torch.Tensor

    def add(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        new = weight.grad.float()
        self.gradient += new
        self.square.addcmul_(new, new)
        weight.grad = None

    def saliencies(self, windows: int) -> torch.Tensor:
        """float64 [4, channels here], in the order of ``SALIENCIES``."""
        weight, by_rows = self.weight.detach(), self.module in _ROWS
        channels = weight.shape[0 if by_rows else 1]
        found = torch.zeros(len(SALIENCIES), channels, dtype=torch.float64, device=weight.device)
        step = max(1, _SLICE // weight.shape[1])
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            w = weight[part].double()
            first = self.gradient[part].double().mul_(w).div_(windows)  # w·g
            second = self.square[part].double().mul_(w.square_()).div_(windows)  # w²·h
            terms = (first, first.abs(), second, (first - second / 2).abs())
            if by_rows:
                found[:, part] = torch.stack([term.sum(1) for term in terms])
            else:
                found += torch.stack([term.sum(0) for term in terms])
        found[0].abs_()
        return found


class GradientRecorder:
    """Attached to this rank's stage while open: ``with GradientRecorder(stage, shape) as recorder: backward …``.

    Only the linears' weights have gradients meanwhile.
    """

    def __init__(self, stage: torch.nn.Module, shape: ModelShape):
        self.shape = shape
        self._frozen = [p for p in stage.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        model: Any = unwrap_model(stage)
        self._sums = [
            _Sums(
                module,
                block.layer_number - 1,  # Megatron counts layers of all stages from 1
                linear.weight,
                torch.zeros_like(linear.weight, dtype=torch.float32),
                torch.zeros_like(linear.weight, dtype=torch.float32),
            )
            for block in model.decoder.layers
            for module, linear in spec.linears(block).items()
        ]
        self._handles = []
        for sums in self._sums:
            sums.weight.requires_grad_(True)
            weight: Any = sums.weight  # torch does not type its hooks
            self._handles.append(weight.register_post_accumulate_grad_hook(sums.add))

    def __enter__(self) -> GradientRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def gather(self, windows: int) -> dict[str, torch.Tensor]:
        """Whole saliencies over ``windows`` of all replicas, on every rank. Collective."""
        rank, ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        sizes = saliency_shapes(self.shape)
        device = torch.device(torch.cuda.current_device())
        tensors = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
        replicas = mpu.get_data_parallel_group()
        for sums in self._sums:
            for total in (sums.gradient, sums.square):
                if replicas.size() > 1:
                    torch.distributed.all_reduce(total, group=replicas)
            found = sums.saliencies(windows)
            places = self._places(sums.module, found.shape[1], rank, ranks)
            for name, values in zip(SALIENCIES, found, strict=True):
                if replicas.rank() == 0:  # the others have the same
                    tensors[f"{sums.module}.{name}"][sums.layer, places] = values
        for tensor in tensors.values():
            torch.distributed.all_reduce(tensor)
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _places(self, module: str, here: int, rank: int, ranks: int) -> torch.Tensor:
        """The channels of a module's whole weight that this rank's shard has, in the shard's order."""
        whole = torch.arange(here * ranks)
        if module == "fc1" and self.shape.gated:  # gate rows, then up rows, on every rank
            return whole.view(2, ranks, -1)[:, rank].flatten()
        return whole.view(ranks, -1)[rank]
