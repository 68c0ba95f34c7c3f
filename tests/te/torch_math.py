"""Transformer Engine without a GPU: its real modules, with the arithmetic of their kernels written in torch.

``install()`` comes before the first import of Megatron. TE's own constructors, parameters, names, state dicts and
quantized tensors are used as they are; ``forward`` of its linears, norm and attention are replaced, and kernels that
cast and optimize (``kernels.py``). Under FP8 a linear multiplies the cast copy of its weight, kept from one
micro-batch to the next as TE keeps it. Activations are never FP8. Nothing here claims TE's speed or rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_prune.engine import arguments, cpu
from tests.te import kernels


def install() -> None:
    cpu.GPU_LIBRARIES.remove("transformer_engine")
    cpu.prepare()
    hopper = SimpleNamespace(
        major=9, minor=0, name="a Hopper that is not there", total_memory=80 << 30, multi_processor_count=132
    )
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: hopper
    with _as_if_available():
        import transformer_engine.pytorch as te

    kernels.install()
    base = te.module.base.TransformerEngineBaseModule
    base.__init__ = _as_if_available()(base.__init__)

    te.Linear.forward = _linear
    te.LayerNormLinear.forward = _norm_linear
    te.RMSNorm.forward = lambda self, x: _norm(self, self.weight, x)
    te.DotProductAttention.forward = _attention
    _save_what_a_gpu_would()
    _gather_bytes_alone()
    arguments._refuse_missing_gpu = lambda args: None
    local = cpu.flags
    cpu.flags = lambda: ["transformer_engine" if word == "local" else word for word in local()]


def _save_what_a_gpu_would() -> None:
    """Megatron dequantizes what it saves if it is on a GPU."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    resolve = DefaultSavePlanner.resolve_data
    DefaultSavePlanner.resolve_data = lambda self, item: _plain(resolve(self, item))


def _gather_bytes_alone() -> None:
    """NCCL can gather FP8 and bf16 weights in one coalesced call; gloo treats all as the first one's type."""
    from megatron.core.distributed import param_and_grad_buffer

    gather = param_and_grad_buffer.dist_all_gather_func

    def alone(out: torch.Tensor, own: torch.Tensor, *, group: Any, async_op: bool) -> Any:
        if out.dtype != torch.uint8:
            return gather(out, own, group=group, async_op=async_op)
        return group._allgather_base(out, own).wait()

    param_and_grad_buffer.dist_all_gather_func = alone


@contextlib.contextmanager
def _as_if_available() -> Iterator[None]:
    """TE checks for CUDA when it is imported and when a module is made; torch must not see the faked answer."""
    own, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = own


def _norm(module: Any, gain: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gain = gain.float() + int(module.zero_centered_gamma)
    return F.rms_norm(x.float(), x.shape[-1:], gain, module.eps).to(x.dtype)


def _norm_linear(self: Any, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
    assert self.normalization == "RMSNorm"
    return _linear(self, _norm(self, self.layer_norm_weight, x), is_first_microbatch)


def _linear(self: Any, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
    """[s, b, in] to [s, b, out]; one of the two is [s/TP, …] where a model is sequence parallel."""
    from megatron.core.tensor_parallel import mappings
    from transformer_engine.pytorch.tensor import QuantizedTensor

    if self.tp_size > 1 and self.parallel_mode == "column":
        x = (
            mappings.gather_from_sequence_parallel_region(x)
            if self.sequence_parallel
            else mappings.copy_to_tensor_model_parallel_region(x)
        )
    multiplied = _cast(self, is_first_microbatch)
    if multiplied is self.weight and not self.fuse_wgrad_accumulation and not isinstance(self.weight, QuantizedTensor):
        out = F.linear(x, self.weight)
    else:
        out = _Linear.apply(x, self.weight, self.fuse_wgrad_accumulation, _plain(multiplied))
    if self.tp_size > 1 and self.parallel_mode == "row":
        out = (
            mappings.reduce_scatter_to_sequence_parallel_region(out)
            if self.sequence_parallel
            else mappings.reduce_from_tensor_model_parallel_region(out)
        )
    return out


def _cast(self: Any, is_first_microbatch: bool | None) -> torch.Tensor:
    """What a linear multiplies: its weight, or under FP8 the cast copy, by TE's own rule of when it is cast again."""
    from transformer_engine.pytorch.module.base import quantize_weight
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    from transformer_engine.pytorch.tensor import QuantizedTensor

    if isinstance(self.weight, QuantizedTensor) or not FP8GlobalStateManager.is_fp8_enabled():
        return self.weight
    self.init_fp8_metadata(num_gemms=1)
    (quantizer,) = self._get_weight_quantizers()
    quantizer.set_usage(rowwise=True, columnwise=False)
    caching = is_first_microbatch is not None
    found, new = quantize_weight(
        tensor=self.weight.detach(), quantizer=quantizer, cache=caching,
        workspace=self._fp8_workspaces.get("weight") if caching else None,
        update_workspace=is_first_microbatch is None or is_first_microbatch,
    )  # fmt: skip
    if new is not None:
        self._fp8_workspaces["weight"] = new
    return found.dequantize(dtype=self.weight.dtype)


class _Linear(torch.autograd.Function):
    """A linear that multiplies a copy of its weight, and whose weight's gradient may go straight into ``main_grad``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, fused: bool, multiplied: torch.Tensor) -> torch.Tensor:
        ctx.weight, ctx.fused = weight, fused
        ctx.save_for_backward(x, multiplied)
        return F.linear(x, multiplied)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, multiplied = ctx.saved_tensors
        weight = ctx.weight
        of_weight = gradient.flatten(0, 1).t() @ x.flatten(0, 1)
        if ctx.fused:
            weight.main_grad += of_weight
            weight.grad_added_to_main_grad = True
            of_weight = torch.empty_like(of_weight)  # TE's dummy, which is never read
        return gradient @ multiplied, of_weight, None, None


def _plain(weight: torch.Tensor) -> torch.Tensor:
    from transformer_engine.pytorch.tensor import QuantizedTensor

    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def _attention(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Causal; query [s, b, n, d], key and value [s, b, g, d] to [s, b, n·d]."""
    repeats = query.shape[2] // key.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, *(y.repeat_interleave(repeats, dim=2) for y in (key, value))))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)  # [b, n, s, d]
    return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
