"""Every sparse method against its float64 oracle on random matrices, whole and spread over ranks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune import methods
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.methods.accumulators import SquareSums
from megatron_prune.methods.base import InputMethod, Sparsity, WeightMethod
from megatron_prune.methods.selection import Rows
from megatron_prune.methods.sparsegpt import Factor, Hessian
from megatron_prune.sparse.weights_only import choice
from tests.methods import oracles

DEAD = [0, 5, 6, 150]


def bf16_weight(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """fp32 [rows, inputs] holding bf16 values: full of ties, a tenth exactly zero, some of them −0."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, inputs, generator=generator) * 0.02).bfloat16().float()
    return weight * (torch.rand(rows, inputs, generator=generator) > 0.1)


def inputs_like(inputs: int, tokens: int = 400, count: int = 2, seed: int = 1) -> list[torch.Tensor]:
    """Correlated inputs of very different magnitude, as in a transformer; those in DEAD are always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    scale = torch.randn(inputs, generator=generator).exp()
    given = [torch.randn(tokens, inputs, generator=generator) @ mixing * scale for _ in range(count)]
    for x in given:
        x[:, [j for j in DEAD if j < inputs]] = 0
    return given


def square_sums(given: list[torch.Tensor]) -> torch.Tensor:
    sums = SquareSums(given[0].shape[1])
    for x in given:
        sums.add(x)
    return sums.mean()


def factor(given: list[torch.Tensor]) -> Factor:
    hessian = Hessian(given[0].shape[1], sum(len(x) for x in given))
    for x in given:
        hessian.add(x)
    return hessian.factor()


def pieces(pattern: str) -> tuple[int, int]:
    """(N, M), or (0, 0): what the oracles take."""
    return (0, 0) if pattern == "unstructured" else tuple(int(part) for part in pattern.split(":"))


def check_result(before: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, changed: bool = False) -> None:
    assert kept.dtype == torch.bool and kept.shape == before.shape == weight.shape
    assert not weight[~kept].view(torch.int32).any()  # +0, bit for bit
    if not changed:
        assert torch.equal(weight[kept].view(torch.int32), before[kept].view(torch.int32))


def prune(
    name: str, before: torch.Tensor, statistic: object, sparsity: Sparsity, seed: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, kept) of a whole matrix; methods that use only weights get seven rows at a time."""
    method = methods.get_sparse(name)
    if isinstance(method, InputMethod):
        return method.prune(before.clone(), statistic, sparsity, Rows.all(len(before)))
    assert isinstance(method, WeightMethod)
    made = choice(sparsity, before.numel())
    scores = [method.scores(part, 7 * number, seed) for number, part in enumerate(before.split(7))]
    while made.counts:
        for part in scores:
            made.count(part)
        made.narrow()
    removed = torch.cat([made.lowest(part) for part in scores])
    return before.masked_fill(removed, 0), ~removed


PATTERNS = ["unstructured", "2:4", "4:8", "1:3", "31:32"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_magnitude(pattern: str) -> None:
    before = bf16_weight(50, 192)
    ratio = 0.62 if pattern == "unstructured" else None
    sparsity = Sparsity.parse(ratio, pattern)
    weight, kept = prune("magnitude", before, None, sparsity)
    check_result(before, weight, kept)
    expected = oracles.magnitude(before.numpy(), Fraction("0.62"), *pieces(pattern))
    assert np.array_equal(kept.numpy(), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda(pattern: str) -> None:
    before, given = bf16_weight(50, 192), inputs_like(192)
    ratio = 0.37 if pattern == "unstructured" else None
    sparsity = Sparsity.parse(ratio, pattern)
    weight, kept = methods.get_sparse("wanda").prune(before.clone(), square_sums(given), sparsity, Rows.all(50))
    check_result(before, weight, kept)
    arrays = [x.numpy() for x in given]
    expected = oracles.wanda(before.numpy(), arrays, Fraction("0.37"), *pieces(pattern))
    assert_equal_but_for_near_ties(kept.numpy(), expected, oracles.wanda_scores(before.numpy(), arrays))
    if pattern == "unstructured":
        assert ((~kept).sum(1) == int(Fraction("0.37") * 192)).all()


def assert_equal_but_for_near_ties(found: np.ndarray, expected: np.ndarray, scores: np.ndarray) -> None:
    """Where masks differ in a row, the weights kept instead have equal scores at float precision."""
    assert (found != expected).mean() < 1e-3
    for row in np.flatnonzero((found != expected).any(1)):
        instead, missed = found[row] & ~expected[row], expected[row] & ~found[row]
        assert instead.sum() == missed.sum()
        assert np.allclose(np.sort(scores[row, instead]), np.sort(scores[row, missed]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [400, 30])  # 60 tokens leave 192 inputs rank deficient
def test_sparsegpt(pattern: str, tokens: int) -> None:
    rows, inputs = 70, 192 if pattern != "1:3" else 201
    before, given = bf16_weight(rows, inputs), inputs_like(inputs, tokens)
    ratio = 0.55 if pattern == "unstructured" else None
    sparsity = Sparsity.parse(ratio, pattern)
    weight, kept = methods.get_sparse("sparsegpt").prune(before.clone(), factor(given), sparsity, Rows.all(rows))
    check_result(before, weight, kept, changed=True)
    assert not weight[:, [j for j in DEAD if j < inputs]].any()
    hessian = oracles.hessian([x.numpy() for x in given])
    lead = oracles.eliminated(hessian)
    expected, mask = oracles.sparsegpt(before.numpy(), hessian, lead, Fraction("0.55"), *pieces(pattern))
    assert_close_to_oracle(before.numpy(), weight.numpy(), kept.numpy(), expected, mask, hessian)
    if pattern == "unstructured":
        assert int((~kept).sum()) == int(Fraction("0.55") * rows * inputs)
    else:
        n, m = pieces(pattern)
        assert (kept.view(-1, m).sum(1) == n).all()


def assert_close_to_oracle(before, weight, kept, expected, mask, hessian, error: float = 1e-3) -> None:
    """The limits for SparseGPT, without dead inputs, whose kept zeros are arbitrary."""
    alive = np.diag(hessian) > 0
    assert (kept == mask)[:, alive].mean() >= 0.999
    same = (kept == mask)[:, alive].all(1)
    assert same.mean() > 0.5
    assert np.linalg.norm(weight[same] - expected[same]) <= 1e-3 * np.linalg.norm(expected[same])
    ours, theirs = (oracles.reconstruction(before, w, hessian) for w in (weight, expected))
    assert abs(ours / theirs - 1) < error


def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    before, given = bf16_weight(128, 256), inputs_like(256)
    hessian = oracles.hessian([x.numpy() for x in given])
    for pattern in ("unstructured", "2:4"):
        lost = []
        for name, statistic in (("sparsegpt", factor(given)), ("wanda", square_sums(given)), ("magnitude", None)):
            sparsity = Sparsity.parse(0.5, pattern)
            weight, _ = prune(name, before, statistic, sparsity)
            lost.append(oracles.reconstruction(before.numpy(), weight.numpy(), hessian))
        assert lost == sorted(lost)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_counts_are_exact_whatever_the_weights(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 32))
    n = data.draw(st.integers(1, m - 1))
    groups = data.draw(st.integers(1, 160 // m))
    rows, inputs = data.draw(st.integers(1, 9)), m * groups
    percent = data.draw(st.integers(1, 99))
    levels = data.draw(st.integers(1, 4))  # few distinct weights, down to one: everything ties
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randint(levels, (rows, inputs), generator=generator).float()
    given = [torch.randn(6, inputs, generator=generator).round() for _ in range(2)]
    statistics = {"none": None, "square_sums": square_sums(given), "hessian": factor(given)}
    for name in methods.sparse_names():
        statistic = statistics[methods.get_sparse(name).statistic]
        _, kept = prune(name, weight, statistic, Sparsity.parse(None, f"{n}:{m}"), (1, 2, 3))
        assert (kept.view(-1, m).sum(1) == n).all()
        sparsity = Sparsity.parse(percent / 100, "unstructured")
        _, kept = prune(name, weight, statistic, sparsity, (1, 2, 3))
        if name == "wanda":
            assert ((~kept).sum(1) == percent * inputs // 100).all()
        else:
            assert int((~kept).sum()) == percent * rows * inputs // 100


def test_random_is_uniform_seeded_and_another_for_another_matrix() -> None:
    weight = torch.ones(40, 64)
    assert methods.get_sparse("random").random

    def kept(pattern: str, *seed: int) -> torch.Tensor:
        return prune("random", weight, None, Sparsity.parse(0.25, pattern), seed)[1]

    for pattern in ("unstructured", "3:4"):
        assert torch.equal(kept(pattern, 7, 0, 1), kept(pattern, 7, 0, 1))
        assert not torch.equal(kept(pattern, 7, 0, 1), kept(pattern, 7, 0, 2))
        share = torch.stack([kept(pattern, seed).float() for seed in range(300)]).mean(0)  # [40, 64]
        assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 300) ** 0.5


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    given = inputs_like(8, 20)
    statistic = {"magnitude": None, "wanda": square_sums(given), "sparsegpt": factor(given)}[name]
    for pattern in ("unstructured", "2:4"):
        weight = torch.ones(4, 8)
        weight[1, 2] = float("nan")
        with pytest.raises(CheckpointError, match="not finite"):
            prune(name, weight, statistic, Sparsity.parse(0.5, pattern))


def test_registry_says_which_verb_runs_a_method() -> None:
    assert methods.sparse_names() == ["magnitude", "random", "sparsegpt", "wanda"]
    assert methods.get("random") is not methods.get_sparse("random")
    with pytest.raises(UsageError, match="expected one of .*shortgpt, wanda-sp, got wanda .*sparse.*sparsify"):
        methods.get("wanda")
    with pytest.raises(UsageError, match="expected one of magnitude, .*, got shortgpt .*structured.*plan and apply"):
        methods.get_sparse("shortgpt")
    with pytest.raises(UsageError, match="expected one of magnitude, random, sparsegpt, wanda, got magic$"):
        methods.get_sparse("magic")


def cases(weight: torch.Tensor, given: list[torch.Tensor]):
    """(method, statistic, sparsity) of every method that ranks share, and both kinds of pattern."""
    for name, statistic in (("wanda", square_sums(given)), ("sparsegpt", factor(given))):
        for pattern in ("unstructured", "2:4"):
            yield name, statistic, Sparsity.parse(0.5, pattern)


def rank_prunes(weight: torch.Tensor, asked: list, splits: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's rows of every pruned matrix: ranks hold ``splits[rank]`` rows each."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    first = sum(splits[:rank])
    rows = Rows(first, sum(splits), torch.distributed.group.WORLD)
    own = weight[first : first + splits[rank]]
    return [methods.get_sparse(name).prune(own.clone(), *rest, rows) for name, *rest in asked]


@pytest.mark.parametrize("splits", [[96, 96], [64, 64, 64], [30, 121, 41], [0, 192]])
def test_ranks_find_what_one_process_finds_bit_for_bit(distributed, splits: list[int]) -> None:
    weight, given = bf16_weight(192, 272), inputs_like(272)
    weight[::2] = weight[1]  # ties across ranks
    asked = list(cases(weight, given))
    ranks = distributed(rank_prunes, len(splits), weight, asked, splits)
    for number, (name, *rest) in enumerate(asked):
        expected, kept = prune(name, weight, *rest)
        found, mask = (torch.cat([rank[number][part] for rank in ranks]) for part in (0, 1))
        assert torch.equal(mask, kept), (name, rest[1])
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), (name, rest[1])


def test_ranks_are_refused_together_where_one_holds_what_is_not_finite(distributed) -> None:
    for message in distributed(rank_is_refused, 2):
        assert "not finite" in message


def rank_is_refused() -> str:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    weight = torch.ones(4, 8)
    if rank == 1:
        weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError) as refused:
        Rows(4 * rank, 8, torch.distributed.group.WORLD).lowest(weight, 32)
    return str(refused.value)
