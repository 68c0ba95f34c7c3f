"""Norms whose gains are stored around zero (``--apply-layernorm-1p``), for Megatron's local layers.

Transformer Engine and Apex have them; ``WrappedTorchNorm``, which Megatron uses without both, refuses them.
"""

from __future__ import annotations

from typing import Any

import torch


class CenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight. Its weight starts at zero."""

    zero_centered_gamma = True

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class CenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight. Its weight starts at zero."""

    zero_centered_gamma = True

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


def install() -> None:
    """Let Megatron's ``WrappedTorchNorm`` make them. A second call does nothing."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    plain = WrappedTorchNorm.__new__
    if getattr(plain, "centered", False):
        return

    def make(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **others: Any) -> torch.nn.Module:
        if not config.layernorm_zero_centered_gamma:
            made: torch.nn.Module = plain(cls, config, hidden_size, eps, **others)
            return made
        kind = CenteredRMSNorm if config.normalization == "RMSNorm" else CenteredLayerNorm
        return kind(hidden_size, eps=eps)

    make.centered = True  # type: ignore[attr-defined]
    WrappedTorchNorm.__new__ = make
