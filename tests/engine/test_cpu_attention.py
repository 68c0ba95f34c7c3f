"""The fused attention for training without a GPU computes what Megatron's local attention does, with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.engine import cpu_attention
from megatron_prune.errors import UsageError
from tests.checkpoint import ranks


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 6, 14]), st.integers(0, 99))
def test_attention_is_the_published_formula(tokens: int, batch: int, heads: int, size: int, seed: int) -> None:
    """softmax(QKᵀ·scale + causal mask)·V (Vaswani et al. 2017, equation 1) and its gradients, in float64; sequences
    that blocks of queries divide and do not."""
    draw = torch.Generator().manual_seed(seed)
    given_ = [torch.randn(tokens, batch, heads, size, dtype=torch.float64, generator=draw) for _ in range(4)]
    q, k, v, direction = (x.requires_grad_() for x in given_)
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) * 0.37
    scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.einsum("bnij,jbnd->ibnd", scores.softmax(-1), v).reshape(tokens, batch, heads * size)
    found = cpu_attention.causal_attention(q, k, v, 0.37)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    of = direction.detach().reshape(tokens, batch, -1)
    torch.testing.assert_close(
        torch.autograd.grad((found * of).sum(), (q, k, v)),
        torch.autograd.grad((expected * of).sum(), (q, k, v)), rtol=1e-11, atol=1e-12,
    )  # fmt: skip


def gradients(tp: int, backend: str) -> dict[str, Any]:
    """Loss and gradients of a grouped-query model by a backend, of this rank; and which attention ran."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import AttnBackend

    from megatron_prune.engine import cpu

    cpu.prepare_megatron()
    model = ranks.build(tp, 1).train()
    model_parallel_cuda_manual_seed(1)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.attention_backend, module.config.hidden_dropout = AttnBackend[backend], 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.0
    calls = []
    real = cpu_attention.causal_attention

    def counted(*positional: Any) -> torch.Tensor:
        calls.append(positional)
        return real(*positional)

    cpu_attention.causal_attention = counted
    tokens = torch.randint(128, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(50, 50, dtype=torch.bool).triu(1)[None, None]
    loss = model(tokens, torch.arange(50).expand(2, 50), mask, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.eval()(tokens, torch.arange(50).expand(2, 50), mask)
    return {"loss": loss.item(), "gradients": found, "calls": len(calls), "layers": len(model.decoder.layers)}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_has_the_loss_and_gradients_of_megatrons_attention(distributed: Any, tp: int) -> None:
    plain, fused = (distributed(gradients, tp, tp, backend) for backend in ("unfused", "fused"))
    for of_megatron, found in zip(plain, fused, strict=True):
        assert of_megatron["calls"] == 0 and found["calls"] == found["layers"] > 0  # training alone, not evaluation
        assert found["loss"] == pytest.approx(of_megatron["loss"], rel=1e-6)
        assert found["gradients"].keys() == of_megatron["gradients"].keys()
        for name, gradient in found["gradients"].items():
            torch.testing.assert_close(gradient, of_megatron["gradients"][name], rtol=1e-4, atol=1e-6, msg=name)


REFUSED = {
    "--attention-dropout": ["--attention-dropout", "0.1"],
    "--reset-attention-mask": ["--reset-attention-mask"],
    "--window-size": ["--window-size", "8,0"],
    "--softmax-type": ["--softmax-type", "learnable"],
    "--attention-softmax-in-fp32": ["--attention-softmax-in-fp32", "--bf16"],
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_it_does_not_compute_is_refused(distributed: Any, flag: str) -> None:
    said = distributed(settled, 1, REFUSED[flag])[0]
    assert said.startswith("--attention-backend: expected unfused with this setting") and flag in said


def settled(more: list[str]) -> str:
    from megatron_prune.engine import runtime
    from tests.engine.test_installed import MODEL

    try:
        runtime.start("pretrain", [*MODEL, "--attention-backend", "fused", *more])
    except UsageError as error:
        return str(error)
    return ""
