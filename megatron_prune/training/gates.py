"""Where the factors of learned masks multiply, in Megatron's modules, under any TP×PP×DP and either layer spec.

* hidden channels: the embedding's output; every norm's gain, with the mean square over the channels whose factor is not
  0; what attention and MLP write to the residual stream. A channel with factor 0 is then 0 all the way through;
* layers: what attention and MLP write;
* heads, alone and by groups: what ``linear_proj`` reads; FFN channels: what ``linear_fc2`` reads.

``Gated`` puts hooks on the modules, once. What they multiply with is its ``current`` factors, which whoever drives the
model changes from one micro-batch to the next; without any the model is as it was.

A norm over fewer channels costs nothing: with n of N channels and x zero elsewhere, the mean square over n is that
over N times N/n, so the norm over all of them with ε·n/N gives what is wanted divided by √(n/N), which goes into the
gain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine import spec
from megatron_prune.methods.sheared_llama import Kind, expected_size, factors
from megatron_prune.training.mask_shards import REPLICATED, MaskShards


@dataclass(frozen=True)
class Factors:
    """z of one micro-batch, by kind: fp32, this rank's shards. ``channels``: how many hidden channels are not 0."""

    z: Mapping[str, torch.Tensor]
    channels: float

    @staticmethod
    def of(z: Mapping[str, torch.Tensor]) -> Factors:
        """Counts the channels, for which the host waits; never none, by which a norm would divide."""
        hidden = z.get("hidden")
        return Factors(z, 1.0 if hidden is None else float(torch.count_nonzero(hidden).clamp(min=1)))


class Gated:
    """This rank's chunks of a model with hooks on what masks multiply. ``shards``: its part of the masks ``kinds``."""

    def __init__(self, chunks: list[torch.nn.Module], shape: ModelShape, kinds: Sequence[Kind]):
        self.shape = shape
        self.current: Factors | None = None
        self.models: list[Any] = [unwrap_model(chunk) for chunk in chunks]
        blocks = [block for model in self.models for block in model.decoder.layers]
        layers = [block.layer_number - 1 for block in blocks]  # Megatron counts layers of all stages from 1
        rank, ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        self.shards = MaskShards(kinds, layers, rank, ranks)
        for model in self.models:
            if model.pre_process:
                model.embedding.register_forward_hook(lambda _m, _args, out: self._multiply(out, self._hidden()))
            if getattr(model.decoder, "final_layernorm", None) is not None:
                self._narrow(model.decoder.final_layernorm)
        for row, block in enumerate(blocks):
            attention, mlp = block.self_attention, block.mlp
            for norm in spec.norms(block):
                self._narrow(norm)
            self._before(attention.linear_proj, functools.partial(self._heads, row))
            self._before(mlp.linear_fc2, functools.partial(self._ffn, row))
            for linear in (attention.linear_proj, mlp.linear_fc2):
                self._after(linear, functools.partial(self._written, row))

    def evaluation(self, log_alpha: Mapping[str, torch.Tensor], *, present: bool = False) -> Factors:
        """What multiplies where nothing is drawn: exactly the target's units, with the factors that they keep; or, if
        ``present``, as many units as are expected to stay now.

        Collective over tensor-parallel ranks: which units of a row stay, its other shards decide too."""
        kinds = self.shards.kinds
        return Factors.of({kind.name: self._kept(kind, log_alpha[kind.name].detach(), present) for kind in kinds})

    def _kept(self, kind: Kind, log_alpha: torch.Tensor, present: bool) -> torch.Tensor:
        if kind.name in REPLICATED:
            return factors(log_alpha, expected_size(log_alpha) if present else kind.kept)
        parts = [torch.empty_like(log_alpha) for _ in range(self.shards.ranks)]
        torch.distributed.all_gather(parts, log_alpha, group=mpu.get_tensor_model_parallel_group())
        rows = self.shards.rows(kind, parts)
        return self.shards.own(kind, factors(rows, expected_size(rows) if present else kind.kept))

    # -- what multiplies ------------------------------------------------------------------------------------------

    def _z(self, kind: str) -> torch.Tensor | None:
        return None if self.current is None else self.current.z.get(kind)

    def _hidden(self) -> torch.Tensor | None:
        """[h]"""
        return self._z("hidden")

    def _written(self, row: int) -> torch.Tensor | None:
        """Of what the layer in this row writes: [h], or [] where only layers have masks."""
        hidden, layers = self._hidden(), self._z("layer")
        if layers is None:
            return hidden
        layer = layers[self.shards.layers[row]]
        return layer if hidden is None else layer * hidden

    def _heads(self, row: int) -> torch.Tensor | None:
        """[H/TP · d]"""
        groups, heads = self._z("group"), self._z("head")
        if groups is None:
            return None if heads is None else heads[row].repeat_interleave(self.shape.kv_channels)
        whole = groups[row].repeat_interleave(self.shape.heads_per_group)
        count = self.shape.num_attention_heads // self.shards.ranks
        if len(whole) > count:  # groups that tensor-parallel ranks share
            whole = whole[self.shards.rank * count :][:count]
        whole = whole if heads is None else whole * heads[row]
        return whole.repeat_interleave(self.shape.kv_channels)

    def _ffn(self, row: int) -> torch.Tensor | None:
        """[F/TP]"""
        z = self._z("ffn")
        return None if z is None else z[row]

    # -- how ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _multiply(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        if factor is None:
            return x
        scaled: torch.Tensor = _Scale.apply(x, factor)
        return scaled

    def _before(self, linear: Any, factor: Callable[[], torch.Tensor | None]) -> None:
        linear.register_forward_pre_hook(lambda _m, args: (self._multiply(args[0], factor()), *args[1:]))

    def _after(self, linear: Any, factor: Callable[[], torch.Tensor | None]) -> None:
        """Megatron's linears return what they compute and a bias that is yet to be added."""

        def multiply(_module: Any, _args: Any, out: Any) -> Any:
            value, bias = out
            found = factor()
            return self._multiply(value, found), bias if bias is None or found is None else bias * found.to(bias.dtype)

        linear.register_forward_hook(multiply)

    def _narrow(self, norm: Any) -> None:
        """Have a norm, or the linear that it is fused into, take the mean square over the channels that are not 0.

        Not a hook: Megatron gathers parameters in hooks of its own, which must have run.
        """
        forward, fused, gain = norm.forward, spec.is_fused(norm), spec.gain(norm)

        def narrowed(x: torch.Tensor, *args: Any, **named: Any) -> Any:
            if self.current is None or (hidden := self._hidden()) is None:
                return forward(x, *args, **named)
            share = self.current.channels / self.shape.hidden_size
            offset = spec.gain_offset(norm)
            weight = ((gain.float() + offset) * (hidden * share**0.5) - offset).to(gain.dtype)
            if not fused:
                return torch.nn.functional.rms_norm(x, x.shape[-1:], weight + offset, norm.eps * share)
            with _instead(norm, weight, norm.eps * share):
                return forward(x, *args, **named)

        norm.forward = narrowed


class _instead:
    """A fused norm's gain and ε are others while this is open."""

    def __init__(self, linear: Any, weight: torch.Tensor, eps: float):
        self.linear, self.weight, self.eps = linear, weight, eps

    def __enter__(self) -> None:
        self.own = self.linear._parameters["layer_norm_weight"], self.linear.eps
        self.linear._parameters["layer_norm_weight"], self.linear.eps = self.weight, self.eps

    def __exit__(self, *_: object) -> None:
        self.linear._parameters["layer_norm_weight"], self.linear.eps = self.own


class _Scale(torch.autograd.Function):
    """``x`` [..., n] times ``factor`` [n] or []; the gradient of the factor is summed over tokens in fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (grad,) = grads
        x, factor = ctx.saved_tensors
        to_x = grad * factor.to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_factor = None
        if ctx.needs_input_grad[1]:
            product = (grad * x).flatten(0, -2)  # [tokens, n]
            to_factor = product.sum(0, dtype=torch.float32) if factor.ndim else product.sum(dtype=torch.float32)
        return to_x, to_factor
