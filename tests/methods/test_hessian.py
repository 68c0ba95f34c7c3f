"""Square sums, Hessian and its factor, against numpy in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.errors import CheckpointError
from megatron_prune.methods.accumulators import SquareSums
from megatron_prune.methods.sparsegpt import PEAK, Hessian
from megatron_prune.sparse.block import _Measure
from tests.benchmarks.resident import high_water
from tests.methods import oracles


def sequences(inputs: int, tokens: int = 50, count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(inputs, generator=generator) * 3
    return [torch.randn(tokens, inputs, generator=generator) * scale for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [1, 7, 200, 401])  # one strip, and several with a narrower last
@pytest.mark.parametrize("tokens, close", [(10_000, 1e-5), (150, 1e-14)])  # enough, and too few but for the first two
def test_sums(tokens: int, close: float, inputs: int, dtype: torch.dtype) -> None:
    squares, hessian = SquareSums(inputs), Hessian(inputs, tokens)
    given = [x.to(dtype) for x in sequences(inputs)]
    for x in given:
        squares.add(x)
        hessian.add(x)
    wide = [x.double().numpy() for x in given]
    np.testing.assert_allclose(squares.mean().numpy(), np.mean([(x**2).sum(0) for x in wide], 0), rtol=1e-12)
    assert hessian.count == squares.count == len(given)
    found, expected = np.triu(hessian.total.numpy()), np.triu(sum(x.T @ x for x in wide))
    assert np.abs(found - expected).max() < (close if inputs > 75 else 1e-5) * np.abs(expected).max()


def test_the_order_of_sequences_and_who_adds_them_do_not_matter() -> None:
    given = sequences(300, count=5)
    forward, one, other = (Hessian(300, tokens=1000) for _ in range(3))
    for x in given:
        forward.add(x)
    for x in reversed(given[:2]):
        one.add(x)
    for x in reversed(given[2:]):
        other.add(x)
    total = other.total + one.total
    assert torch.allclose(total.triu(), forward.total.triu(), rtol=1e-14, atol=1e-14)
    assert torch.equal(total.float().triu(), forward.total.float().triu())


def test_a_process_that_allows_tf32_gets_full_precision_and_keeps_its_setting() -> None:
    before = torch.get_float32_matmul_precision()
    given, exact = sequences(64), Hessian(64, tokens=1000)
    exact.add(given[0])
    try:
        torch.set_float32_matmul_precision("medium")  # bf16 on a CPU that has it
        found = Hessian(64, tokens=1000)
        found.add(given[0])
        found.factor()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.total, exact.total)


@pytest.mark.parametrize("tokens", [400, 11])  # 11 · 3 sequences leave 150 inputs rank deficient
def test_factor_of_the_inverse(tokens: int) -> None:
    given = sequences(150, tokens)
    for x in given:
        x[:, [3, 77, 149]] = 0
    hessian = Hessian(150, 3 * tokens)
    for x in given:
        hessian.add(x)
    factor = hessian.factor()
    assert factor.dead.nonzero().flatten().tolist() == [3, 77, 149]
    assert factor.damping == 0.01
    h = oracles.hessian([x.numpy() for x in given])
    h[[3, 77, 149], [3, 77, 149]] = 1
    expected = np.linalg.cholesky(np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(150))).T
    found = factor.upper.numpy()
    assert factor.upper.dtype == torch.float32 and np.array_equal(np.triu(found), found)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def squares_of_factoring(inputs: int) -> tuple[float, float]:
    """The peak number of float64 squares in a process while it factors, and while it measures."""
    for size in (64, inputs):  # the first loads the libraries
        hessian = Hessian(size, 10 * size)
        hessian.count = 1
        noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        hessian.total += noise
        hessian.total.diagonal().add_(2 * size)
        del noise
        _, once = high_water(hessian.factor)
        _, measured = high_water(functools.partial(_Measure, hessian))
    square = 8 * inputs**2
    return 1 + once / square, measured / square


def test_factoring_holds_as_many_squares_as_it_says(distributed: Callable[..., Any]) -> None:
    """Measured by the kernel. A copy of L next to H, or of its parts for each solve, takes a square or more.

    In a separate process: this one may keep freed memory and would not grow. A square of 54 MB is mapped alone.
    """
    ((held, measured),) = distributed(squares_of_factoring, 1, 2600)
    assert PEAK - 0.35 < held <= PEAK
    assert measured < 0.6  # a square in fp32


def test_damping_is_doubled_where_it_was_too_little_and_says_so() -> None:
    hessian = Hessian(2, tokens=10)
    hessian.total, hessian.count = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=torch.float64), 2
    factor = hessian.factor()
    assert factor.damping == 0.64  # 0.01 · 2⁶ is the first above 0.5
    product = (factor.upper.t() @ factor.upper).double()
    assert torch.allclose(product, torch.tensor([[1.64, 1.5], [1.5, 1.64]]).double().inverse(), atol=1e-5)
    hessian.total[0, 1] = 3
    with pytest.raises(CheckpointError, match="whose damped Hessian can be factored"):
        hessian.factor()


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_are_refused(broken: float) -> None:
    hessian, squares = Hessian(5, tokens=4), SquareSums(5)
    x = torch.ones(4, 5)
    x[1, 2] = broken
    hessian.add(x)
    squares.add(x)
    with pytest.raises(CheckpointError, match="not finite"):
        hessian.factor()
    with pytest.raises(CheckpointError, match="not finite"):
        squares.mean()
