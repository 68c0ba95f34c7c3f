"""What TE's kernels compute outside of a model, in torch: casts to FP8 with one scale a tensor, and its optimizer.

Names and arguments are those of ``transformer_engine_torch``. Results go into the tensors that are passed, as there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

Lists = Sequence[Sequence[torch.Tensor]]


def install() -> None:
    """Put them in the place of those of TE's extension, wherever TE has taken them to."""
    extension = sys.modules["transformer_engine_torch"]
    modules = [module for name, module in sys.modules.items() if name.startswith("transformer_engine") and module]
    for function in (
        quantize, fp8_transpose, compute_amax, multi_tensor_scale, multi_tensor_scale_tensor, multi_tensor_l2norm,
        multi_tensor_compute_scale_and_scale_inv, multi_tensor_adam, multi_tensor_adam_param_remainder,
        multi_tensor_sgd,
    ):  # fmt: skip
        original = getattr(extension, function.__name__)
        for module in modules:
            if getattr(module, function.__name__, None) is original:
                setattr(module, function.__name__, function)


def quantize(source: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """``source`` as a Float8Tensor, scaled by what a delayed quantizer holds, or by its own largest value."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

    dtype = TE_DType_To_Torch[quantizer.dtype]
    largest = torch.finfo(dtype).max
    wide = source.detach().float()
    if isinstance(quantizer, Float8Quantizer):
        scale = quantizer.scale.reshape(1)
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, wide.abs().max()).view_as(quantizer.amax))
    else:
        scale = _scale(wide.abs().max().reshape(1), largest)
    data = (wide * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    if output is None:
        return Float8Tensor(
            shape=source.shape, dtype=source.dtype, data=data, fp8_scale_inv=1 / scale, fp8_dtype=quantizer.dtype,
            requires_grad=False, data_transpose=None, quantizer=quantizer, device=source.device,
        )  # fmt: skip
    output._data.copy_(data.view(output._data.shape))
    output._scale_inv.copy_((1 / scale).view_as(output._scale_inv))
    return output


def _scale(amax: torch.Tensor, largest: float) -> torch.Tensor:
    return torch.where(amax > 0, largest / amax, 1.0)


def fp8_transpose(data: torch.Tensor, dtype: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    turned = data.flatten(0, -2).t().contiguous()
    return turned if out is None else out.copy_(turned)


def compute_amax(source: torch.Tensor, amax: torch.Tensor) -> None:
    amax.copy_(source.abs().max())


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Any, lists: Lists, largest: float, powers_of_two: bool, epsilon: float
) -> None:
    assert not powers_of_two and epsilon == 0
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(amax, largest))
        inverse.copy_(1 / scale)


def multi_tensor_scale(chunk: int, noop: Any, lists: Lists, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, noop: Any, lists: Lists, scale: torch.Tensor) -> None:
    multi_tensor_scale(chunk, noop, lists, scale)  # type: ignore[arg-type]


def multi_tensor_l2norm(chunk: int, noop: Any, lists: Lists, each: bool) -> tuple[torch.Tensor, None]:
    assert not each
    return torch.stack([tensor.float().square().sum() for tensor in lists[0]]).sum().sqrt().view(1), None


def multi_tensor_adam(
    chunk: int, noop: Any, lists: Lists, lr: float, beta1: float, beta2: float, eps: float, step: int,
    decoupled: int, correct: int, decay: float,
) -> None:  # fmt: skip
    """AdamW on (gradients, parameters, first moments, second moments[, fp32 masters])."""
    assert decoupled and correct
    masters = lists[4] if len(lists) > 4 else lists[1]
    for gradient, parameter, first, second, master in zip(*lists[:4], masters, strict=True):
        wide = gradient.float()
        mean = first.float().lerp(wide, 1 - beta1)
        square = second.float() * beta2 + wide * wide * (1 - beta2)
        first.copy_(mean)
        second.copy_(square)
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps) + decay * master
        master.sub_(lr * update)
        parameter.copy_(master)


def multi_tensor_adam_param_remainder(chunk: int, noop: Any, lists: Lists, *more: Any) -> None:
    """The same where a master is its bf16 parameter's bits and 16 more: (…, int16 remainders)."""
    gradients, parameters, firsts, seconds, remainders = lists
    masters = [
        ((p.view(torch.int16).int() << 16) + r.int()).view(torch.float32)
        for p, r in zip(parameters, remainders, strict=True)
    ]
    multi_tensor_adam(chunk, noop, (gradients, masters, firsts, seconds), *more)
    for parameter, remainder, master in zip(parameters, remainders, masters, strict=True):
        bits = master.view(torch.int32)
        remainder.copy_(bits.to(torch.int16))  # the low bits, signed
        parameter.view(torch.int16).copy_((bits - remainder.int()) >> 16)


def multi_tensor_sgd(
    chunk: int, noop: Any, lists: Lists, decay: float, momentum: float, dampening: float, lr: float,
    nesterov: bool, first: bool, decay_after: bool, scale: float,
) -> None:  # fmt: skip
    """SGD on (gradients, parameters, momenta[, bf16 or fp16 copies of the parameters])."""
    assert not nesterov and not decay_after and dampening == 0
    for gradient, parameter, velocity, *copies in zip(*lists, strict=True):
        update = gradient.float() * scale + decay * parameter
        velocity.copy_(update if first else momentum * velocity + update)
        parameter.sub_(lr * (velocity if momentum else update))
        for copy in copies:
            copy.copy_(parameter)
