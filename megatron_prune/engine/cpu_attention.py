"""Fused attention for training without a GPU: ``--attention-backend fused``.

Megatron's local attention computes all scores and masks half of them. Here queries are taken in blocks, and each block
sees only the keys up to its end, so that half of the products and of the memory is saved for long sequences, and scores
are masked by an addition. The results are those of Megatron's local attention up to rounding
(``tests/engine/test_cpu_attention.py``).

``install()`` wraps Megatron's function once per process; it acts on models whose configuration asks for it.
``refused()`` names the settings that it does not compute.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch

BLOCK = 128  # queries: smaller blocks save more products, but each is slower


def install() -> None:
    """Let models with ``attention_backend`` fused use this module's functions. A second call does nothing."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if getattr(DotProductAttention.forward, "fuses", False):
        return
    forward = DotProductAttention.forward

    @functools.wraps(forward)
    def attend(module: Any, query: Any, key: Any, value: Any, *others: Any, **more: Any) -> torch.Tensor:
        if not (module.training and is_fused(module.config)):
            found: torch.Tensor = forward(module, query, key, value, *others, **more)
            return found
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        return causal_attention(query, key, value, module.softmax_scale * (module.scale_mask_softmax.scale or 1.0))

    attend.fuses = True  # type: ignore[attr-defined]
    DotProductAttention.forward = attend


def is_fused(config: Any) -> bool:
    """Whether a model's configuration asks for this attention."""
    return str(getattr(config.attention_backend, "name", config.attention_backend)) == "fused"


def refused(args: argparse.Namespace) -> str:
    """Which of Megatron's settings this attention does not compute, as a flag; empty if it computes all of them."""
    settings = {
        "--attention-dropout": args.attention_dropout > 0,
        "--reset-attention-mask": args.reset_attention_mask,
        "--window-size": getattr(args, "window_size", None) is not None,
        "--softmax-type": getattr(args, "softmax_type", "vanilla") != "vanilla",
        "--attention-softmax-in-fp32": args.attention_softmax_in_fp32 and (args.bf16 or args.fp16),
        "--multi-latent-attention": getattr(args, "multi_latent_attention", False),
    }
    return next((flag for flag, is_set in settings.items() if is_set), "")


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention in which token i sees the keys 0 to i: query, key and value [s, b, n, d] to [s, b, n·d]."""
    tokens, batch, heads, size = query.shape
    q, k, v = (x.reshape(tokens, batch * heads, size).transpose(0, 1) for x in (query, key, value))  # [b·n, s, d]
    context: torch.Tensor = _Causal.apply(q, k, v, scale)
    return context.transpose(0, 1).reshape(tokens, batch, heads * size)


class _Causal(torch.autograd.Function):
    """Queries, keys and values [b·n, s, d], and the factor of their products, to contexts [b·n, s, d]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        context = q.new_empty(q.shape[1], q.shape[0], v.shape[2]).transpose(0, 1)  # [b·n, s, d], stored as [s, b·n, d]
        probabilities = []
        for start, end in _blocks(q.shape[1]):
            scores = q.new_empty(len(q), end - start, end)
            torch.baddbmm(scores, q[:, start:end], k[:, :end].transpose(1, 2), beta=0, alpha=scale, out=scores)
            later = scores.new_full((end - start, end - start), float("-inf")).triu_(1)
            scores[:, :, start:] += later  # [b·n, queries, their own keys]
            block = torch.softmax(scores, dim=-1)
            context[:, start:end] = torch.bmm(block, v[:, :end])
            probabilities.append(block)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (of_context,) = gradients
        q, k, v, *probabilities = ctx.saved_tensors
        of_q, of_k, of_v = (x.new_zeros(x.shape[1], len(x), x.shape[2]).transpose(0, 1) for x in (q, k, v))
        for (start, end), block in zip(_blocks(q.shape[1]), probabilities, strict=True):
            given = of_context[:, start:end]  # [b·n, queries, d]
            of_v[:, :end] += torch.bmm(block.transpose(1, 2), given)
            of_block = torch.bmm(given, v[:, :end].transpose(1, 2))  # [b·n, queries, keys]
            of_scores = torch._softmax_backward_data(of_block, block, -1, block.dtype)
            of_scores *= ctx.scale
            of_q[:, start:end] = torch.bmm(of_scores, k[:, :end])
            of_k[:, :end] += torch.bmm(of_scores.transpose(1, 2), q[:, start:end])
        return of_q, of_k, of_v, None


def _blocks(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
