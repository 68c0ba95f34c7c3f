"""The accumulators against numpy in float64, written from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_prune.methods.accumulators import ChannelSums, CosineDistance, Workspace


def activations(tokens: int, sequences: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, sequences, channels, generator=generator) * 3 + 0.5).to(dtype)


# Token counts on both sides of a cache slice: 2^19 bytes of 1000 float64 channels are 65 tokens.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 3), (64, 1000), (65, 1000), (66, 1000), (300, 1000)])
def test_channel_sums(tokens: int, channels: int, dtype: torch.dtype) -> None:
    sums = ChannelSums(channels)
    batches = [activations(tokens, 2, channels, dtype, seed) for seed in range(3)]
    for batch in batches:
        sums.add(batch)
    x = np.concatenate([batch.double().numpy() for batch in batches], axis=1)  # [s, b, n]
    expected = [(np.abs(x).mean(0) ** 2).sum(0), (x**2).sum((0, 1)), x.sum((0, 1))]
    for found, wanted in zip(sums.sums.numpy(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-9)


def test_batching_cannot_change_a_sum() -> None:
    batch = activations(50, 4, 7, torch.float32)
    together, apart = ChannelSums(7), ChannelSums(7)
    together.add(batch)
    for sequence in range(4):
        apart.add(batch[:, sequence : sequence + 1])
    assert torch.equal(together.sums, apart.sums)


def test_a_slice_of_channels_and_a_shared_workspace() -> None:
    batch, workspace = activations(40, 1, 12, torch.float32), Workspace()
    whole, left, right = (ChannelSums(n, workspace=workspace) for n in (12, 5, 7))
    whole.add(batch)
    left.add(batch[..., :5])
    right.add(batch[..., 5:])
    torch.testing.assert_close(torch.cat([left.sums, right.sums], 1), whole.sums, rtol=1e-14, atol=0)


def test_wrong_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 4 channels, found 3"):
        ChannelSums(4).add(torch.zeros(2, 1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosine_distance(dtype: torch.dtype) -> None:
    distance = CosineDistance()
    expected = 0.0
    for seed in range(2):
        before = activations(700, 2, 100, dtype, seed)
        after = before + 0.1 * activations(700, 2, 100, dtype, seed + 10)
        kept = before.clone(), after.clone()
        distance.add(before, after)
        assert torch.equal(before, kept[0]) and torch.equal(after, kept[1])
        x, y = before.double().numpy(), after.double().numpy()
        cosine = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
        expected += (1 - cosine).sum()
    assert float(distance.total) == pytest.approx(expected, rel=1e-12)


def test_zero_and_tiny_vectors_have_a_finite_distance() -> None:
    before = torch.zeros(3, 1, 4)
    after = torch.zeros(3, 1, 4)
    before[1], after[1] = 1e-30, 2e-30  # parallel, and their squares underflow in float32
    before[2] = 1.0  # the block's output is zero
    distance = CosineDistance()
    distance.add(before, after)
    assert float(distance.total) == pytest.approx(1 + 0 + 1)
