"""TE's kernels outside of a model, in torch: casts to FP8 with one scale per tensor or block, and its optimizer.

Names and arguments are those of ``transformer_engine_torch``. Results go into the tensors that are passed, as there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

Lists = Sequence[Sequence[torch.Tensor]]
BLOCK = 128


def install() -> None:
    """Replace those of TE's extension, wherever TE has imported them."""
    extension = sys.modules["transformer_engine_torch"]
    modules = [module for name, module in sys.modules.items() if name.startswith("transformer_engine") and module]
    for function in (
        quantize, fp8_transpose, compute_amax, fp8_block_scaling_compute_partial_amax, fp8_block_scaling_partial_cast,
        multi_tensor_scale, multi_tensor_scale_tensor, multi_tensor_l2norm, multi_tensor_compute_scale_and_scale_inv,
        multi_tensor_adam, multi_tensor_adam_param_remainder, multi_tensor_sgd,
    ):  # fmt: skip
        original = getattr(extension, function.__name__)
        for module in modules:
            if getattr(module, function.__name__, None) is original:
                setattr(module, function.__name__, function)


def quantize(source: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """``source`` as a Float8Tensor, scaled by what a delayed quantizer holds, or by its own largest value; as a
    Float8BlockwiseQTensor by the largest value of each block."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor

    if isinstance(quantizer, Float8BlockQuantizer):
        return _quantize_blocks(source, quantizer, output)
    dtype = _torch_dtype(quantizer.dtype)
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


def _quantize_blocks(source: torch.Tensor, quantizer: Any, output: Any) -> Any:
    """[…, w] as [h, w] with a scale for each 128 x 128; scales [⌈h/128⌉, ⌈w/128⌉ padded to 4], the columnwise half
    transposed."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    assert quantizer.block_scaling_dim == 2
    if output is None:
        made = {name: torch.zeros(shape, dtype=dtype)
                for name, (shape, dtype) in quantizer.inner_tensor_specs(source.shape).items()}  # fmt: skip
        output = Float8BlockwiseQTensor(
            shape=source.shape, dtype=source.dtype, rowwise_data=made.get("_rowwise_data"),
            rowwise_scale_inv=made.get("_rowwise_scale_inv"), columnwise_data=made.get("_columnwise_data"),
            columnwise_scale_inv=made.get("_columnwise_scale_inv"), fp8_dtype=quantizer.dtype, quantizer=quantizer,
            is_2D_scaled=True, requires_grad=False,
        )  # fmt: skip
    height, width = source.shape[:-1].numel(), source.shape[-1]
    scale_shape = quantizer.get_scale_shape(source.shape, columnwise=False)
    amax, scale, inverse = (torch.zeros(scale_shape) for _ in range(3))
    flat = source.detach().reshape(-1)
    fp8_block_scaling_compute_partial_amax(flat, amax, height, width, 0, BLOCK)
    largest = torch.finfo(_torch_dtype(quantizer.dtype)).max
    lists = [[amax], [scale], [inverse]]
    multi_tensor_compute_scale_and_scale_inv(
        0, None, lists, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon
    )
    data = torch.empty(height * width, dtype=torch.uint8)
    fp8_block_scaling_partial_cast(flat, data, scale, height, width, 0, BLOCK, quantizer.dtype)
    if output._rowwise_data is not None:
        output._rowwise_data.copy_(data.view(source.shape))
        output._rowwise_scale_inv.copy_(inverse)
    if output._columnwise_data is not None:
        rows, columns = -(-height // BLOCK), -(-width // BLOCK)
        output._columnwise_data.copy_(data.view(height, width).t().reshape(output._columnwise_data.shape))
        output._columnwise_scale_inv.zero_()[:, :rows].copy_(inverse[:, :columns].t())
    return output


def _torch_dtype(kind: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[kind]


def fp8_block_scaling_compute_partial_amax(
    part: torch.Tensor, amax: torch.Tensor, height: int, width: int, start: int, block: int
) -> None:
    """Largest values of the blocks of [height, width]; only ``part`` is given, from flat index ``start`` on."""
    rows, columns = -(-height // block), -(-width // block)
    padded = torch.zeros(rows * block, columns * block)
    whole = torch.zeros(height * width)
    whole[start : start + part.numel()] = part.detach().float().view(-1)
    padded[:height, :width] = whole.view(height, width)
    amax[:, :columns] = padded.view(rows, block, columns, block).abs().amax((1, 3))


def fp8_block_scaling_partial_cast(
    part: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, height: int, width: int, start: int, block: int,
    kind: Any,
) -> None:  # fmt: skip
    """``part`` in FP8 into ``out``, each value by its block's scale."""
    dtype = _torch_dtype(kind)
    largest = torch.finfo(dtype).max
    each = scale.repeat_interleave(block, 0)[:height].repeat_interleave(block, 1)[:, :width].reshape(-1)
    scaled = part.detach().float().view(-1) * each[start : start + part.numel()]
    out.view(-1).copy_(scaled.clamp(-largest, largest).to(dtype).view(torch.uint8))


def _scale(amax: torch.Tensor, largest: float, powers_of_two: bool = False) -> torch.Tensor:
    scale = torch.where(amax > 0, largest / amax, 1.0)
    return torch.ldexp(torch.ones_like(scale), scale.frexp().exponent - 1) if powers_of_two else scale  # rounded down


def fp8_transpose(data: torch.Tensor, dtype: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    turned = data.flatten(0, -2).t().contiguous()
    return turned if out is None else out.copy_(turned)


def compute_amax(source: torch.Tensor, amax: torch.Tensor) -> None:
    amax.copy_(source.abs().max())


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Any, lists: Lists, largest: float, powers_of_two: bool, epsilon: float
) -> None:
    assert epsilon == 0
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(amax, largest, powers_of_two))
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
