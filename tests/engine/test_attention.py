"""Fused attention on the CPU computes the same as Megatron's own, and is not used where it would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.checkpoint import ranks

PROMPTS = [31, 47]  # tokens, of sequences of 50


def compare() -> dict[str, Any]:
    """Logits of a small grouped-query model with and without it; which attention ran in each case."""
    model = ranks.build(1, 1).eval()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_prune.engine import cpu

    cpu.prepare_megatron()
    model_parallel_cuda_manual_seed(1)  # Megatron forks its state for a dropout of zero, too
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **named: Any) -> torch.Tensor:
        calls.append(named)
        return sdpa(*args, **named)

    torch.nn.functional.scaled_dot_product_attention = counted
    tokens = torch.randint(128, (2, 50), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(50).expand(2, 50)

    def logits(mask: torch.Tensor | None = None) -> torch.Tensor:
        return model(tokens, positions, mask)

    with torch.no_grad():
        plain = logits()
        cpu.fuse([model])
        found: dict[str, Any] = {"fused": (logits() - plain).abs().max().item(), "size": plain.std().item()}
        found["calls"] = len(calls)
        causal = torch.ones(50, 50, dtype=torch.bool).triu(1)[None, None]
        found["masked"] = (logits(causal) - plain).abs().max().item()
        found["more calls"] = len(calls) - found["calls"]
        before = len(calls)
        found["cached"] = [(made - plain[:, at]).abs().max().item() for made, at in _cached(model, tokens, positions)]
        found["cached calls"] = len(calls) - before
        before = len(calls)
        found["packed"] = [
            (made[row] - plain[row, length + step - 1]).abs().max().item()
            for step, made in enumerate(_packed(model, tokens))
            for row, length in enumerate(PROMPTS)
        ]
        found["packed calls"] = len(calls) - before
        before = len(calls)
    logits().sum().backward()
    found["with gradients"] = len(calls) - before
    return found


def _cached(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Logits [B, V] after 47 tokens that are read at once, and after each of the other three; and at which they are."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    cache, made = StaticInferenceContext(2, 50), []
    with InferenceMode.active():
        for start, end in ((0, 47), (47, 48), (48, 49), (49, 50)):
            read = tokens[:, start:end], positions[:, start:end], None
            logits = model(*read, inference_context=cache, runtime_gather_output=True)
            assert logits.shape[1] == 1
            made.append((logits[:, 0], end - 1))
            cache.increment_sequence_len_offset(end - start)
    return made


def _packed(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits [B, V] after prompts of uneven length, read at once, and after each of the next three tokens."""
    from megatron.core.inference.utils import InferenceMode

    from megatron_prune.engine import decoding

    cache, made = decoding.Cache(PROMPTS, max(PROMPTS) + 3), []
    with InferenceMode.active():
        for step in range(4):
            following = [row[length + step - 1 : length + step] for row, length in zip(tokens, PROMPTS, strict=True)]
            prompts = [row[:length] for row, length in zip(tokens, PROMPTS, strict=True)]
            read = torch.stack(following) if step else torch.cat(prompts)[None]
            logits = model(read, cache.positions(), None, inference_context=cache, runtime_gather_output=True)
            assert logits.shape[:2] == (len(PROMPTS), 1)
            made.append(logits[:, 0])
            cache.advance()
    return made


def test_the_numbers_are_megatrons(distributed: Callable[..., Any]) -> None:
    (found,) = distributed(compare, 1)
    assert found["calls"] == 4, "one a layer"
    assert found["fused"] < 1e-5 * max(1.0, found["size"]) and found["masked"] < 1e-5
    assert found["cached calls"] == 16 and len(found["cached"]) == 4
    assert max(found["cached"]) < 1e-5 * max(1.0, found["size"])
    assert found["packed calls"] == 3 * len(PROMPTS) + 1 + 3 * 4, "the last layer once"
    assert len(found["packed"]) == 4 * len(PROMPTS)
    assert max(found["packed"]) < 1e-5 * max(1.0, found["size"])
    assert found["more calls"] == found["with gradients"] == 0
