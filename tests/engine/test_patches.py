"""What Megatron computes with the fixes of ``engine/patches.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch


def recompute() -> list[tuple[float, float]]:
    """Sums of an MLP's loss, input gradient and weight gradients: kept, and recomputed as ``TransformerLayer`` does."""
    from megatron_prune.engine import cpu, patches

    cpu.prepare()
    import megatron.training  # noqa: F401
    from megatron.core import tensor_parallel

    cpu.prepare_megatron()
    patches.apply()
    patches.apply()  # the second call must not wrap the first one's work
    torch.manual_seed(0)
    first, second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 5)

    def mlp(x: torch.Tensor) -> tuple[torch.Tensor, torch.nn.Parameter]:
        hidden = torch.nn.functional.gelu(first(x))
        return torch.nn.functional.linear(hidden, second.weight), second.bias  # the bias is added later

    x = torch.randn(3, 5, requires_grad=True)
    tensors = [x, *first.parameters(), *second.parameters()]
    found = []
    for run in (mlp, lambda x: tensor_parallel.checkpoint(mlp, False, x)):
        for one in tensors:
            one.grad = None
        for batch in (x, 2 * x):  # micro-batches add up
            output, bias = run(batch)
            assert all(one.is_leaf for one in tensors), "the backward pass would not end"
            ((output + bias) ** 2).sum().backward()
        found.append([one.grad.clone() for one in tensors])
    return [(a.abs().sum().item(), (a - b).abs().max().item()) for a, b in zip(*found, strict=True)]


def test_a_recomputed_mlp_with_a_bias_has_the_same_gradients(distributed: Callable[..., list]) -> None:
    (found,) = distributed(recompute, 1)
    assert len(found) == 5
    for size, difference in found:
        assert size > 0.1 and difference < 1e-5
