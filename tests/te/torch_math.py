"""Transformer Engine without a GPU: its real modules, with the arithmetic of their kernels written in torch.

``install()`` comes before the first import of Megatron. TE's own constructors, parameters, names, state dicts and
quantized tensors are used as they are; ``forward`` of its linears, norm and attention are replaced, and its
optimizer's kernels are not there, so that Megatron takes torch's. Nothing here claims TE's speed or rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_prune.engine import arguments, cpu


def install() -> None:
    cpu.GPU_LIBRARIES.remove("transformer_engine")
    cpu.prepare()
    hopper = SimpleNamespace(major=9, minor=0, name="a Hopper that is not there", total_memory=80 << 30, multi_processor_count=132)  # fmt: skip
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: hopper
    with _as_if_available():
        import transformer_engine.pytorch as te

    base = te.module.base.TransformerEngineBaseModule
    base.__init__ = _as_if_available()(base.__init__)

    sys.modules["transformer_engine.pytorch.optimizers"] = None  # type: ignore[assignment]
    te.Linear.forward = _linear
    te.LayerNormLinear.forward = _norm_linear
    te.RMSNorm.forward = lambda self, x: _norm(self, self.weight, x)
    te.DotProductAttention.forward = _attention
    arguments._refuse_missing_gpu = lambda args: None
    local = cpu.flags
    cpu.flags = lambda: ["transformer_engine" if word == "local" else word for word in local()]


@contextlib.contextmanager
def _as_if_available() -> Iterator[None]:
    """TE asks for CUDA when it is imported and when a module is made; torch must not believe the answer."""
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
    return _linear(self, _norm(self, self.layer_norm_weight, x))


def _linear(self: Any, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
    """[s, b, in] to [s, b, out]; one of the two is [s/TP, …] where a model is sequence parallel."""
    from megatron.core.tensor_parallel import mappings

    if self.tp_size > 1 and self.parallel_mode == "column":
        x = (
            mappings.gather_from_sequence_parallel_region(x)
            if self.sequence_parallel
            else mappings.copy_to_tensor_model_parallel_region(x)
        )
    multiply = _Fused.apply if self.fuse_wgrad_accumulation else F.linear
    out = multiply(x, self.weight)
    if self.tp_size > 1 and self.parallel_mode == "row":
        out = (
            mappings.reduce_scatter_to_sequence_parallel_region(out)
            if self.sequence_parallel
            else mappings.reduce_from_tensor_model_parallel_region(out)
        )
    return out


class _Fused(torch.autograd.Function):
    """A linear whose weight gradient goes straight into ``main_grad``, as TE's kernels put it there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        weight.main_grad += gradient.flatten(0, 1).float().t() @ x.flatten(0, 1).float()
        weight.grad_added_to_main_grad = True
        return gradient @ weight, torch.empty_like(weight)  # TE's dummy: nobody reads it


def _attention(self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Causal; query [s, b, n, d], key and value [s, b, g, d] to [s, b, n·d]."""
    repeats = query.shape[2] // key.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, *(y.repeat_interleave(repeats, dim=2) for y in (key, value))))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)  # [b, n, s, d]
    return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
