"""Random masks with the counts of others: any rectangle equals that part of the whole mask."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.masks import open_masks, write_single
from megatron_prune.training import masked
from tests.training.small_masked import kept_at_random

SHAPE = ModelShape(
    num_layers=2, hidden_size=30, num_attention_heads=3, num_query_groups=3, kv_channels=10, ffn_hidden_size=45,
    padded_vocab_size=64, tied=True,
)  # fmt: skip


def make(folder, pattern):
    kept = kept_at_random(SHAPE, pattern, ratio=0.7)
    write_single(folder, SHAPE, [(name, mask, pattern) for name, mask in kept.items()])
    return open_masks(folder), kept


@pytest.mark.parametrize(("pattern", "group"), [("unstructured", None), ("1:5", 5), ("2:3", 3)])
def test_counts_are_kept_in_every_row_or_group_and_rectangles_agree(tmp_path, monkeypatch, pattern, group):
    given, kept = make(tmp_path / "masks", pattern)
    drawn = masked.RandomMasks(given, 5)
    whole = {name: drawn.read(name) for name in given.entries}
    monkeypatch.setattr(masked, "_AT_A_TIME", 100)  # a few rows at a time
    again = masked.RandomMasks(given, 5)
    numbers = np.random.default_rng(0)
    for name, mask in kept.items():
        out, inputs = mask.shape
        each = group or inputs
        counts = [m.view(out, inputs // each, each).sum(-1) for m in (whole[name], mask)]
        assert torch.equal(*counts)
        top, bottom = sorted(numbers.integers(0, out + 1, 2))
        left, right = sorted(numbers.integers(0, inputs + 1, 2))
        part = again.read(name, slice(top, bottom), slice(left, right))
        assert torch.equal(part, whole[name][top:bottom, left:right])
    assert again.entries.keys() == kept.keys() < {w.name for w in weights(SHAPE) if w.is_linear}


def test_draws_are_uniform_and_their_own_for_each_seed_weight_and_row(tmp_path):
    given, kept = make(tmp_path / "masks", "unstructured")
    drawn = [torch.stack([masked.RandomMasks(given, seed).read(n).double().mean(0) for n in kept if "fc1" in n])
             for seed in range(40)]  # fmt: skip
    often = torch.stack(drawn).mean((0, 1))  # [in]: of 40 seeds, 2 layers, 90 rows
    expected = np.mean([float(mask.double().mean()) for name, mask in kept.items() if "fc1" in name])
    np.testing.assert_allclose(often, expected, atol=5 * (0.25 / (40 * 2 * 90)) ** 0.5)
    same = masked.RandomMasks(given, 1)
    first, second = (same.read(f"decoder.layers.{layer}.mlp.linear_fc1.weight") for layer in (0, 1))
    rows = {tuple(row.tolist()) for row in torch.cat([first, second])}
    assert len(rows) > 0.98 * 180


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011), written from the paper: four numbers at a count."""
    word = (1 << 64) - 1
    x = [counter >> shift & word for shift in (0, 64, 128, 192)]
    k = list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], 1 << 64)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return x


def test_a_seed_means_the_same_masks_everywhere(tmp_path):
    """A row's numbers by hand; in 2:3 the smallest of every three goes."""
    given, _ = make(tmp_path / "masks", "2:3")
    name, row, counts = "decoder.layers.0.self_attention.linear_qkv.weight", 7, 8  # 30 inputs, four numbers a count
    digest = hashlib.sha256(f"5 {name}".encode()).digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    numbers = [n for count in range(counts) for n in philox(row * counts + 1 + count, key)][:30]
    expected = [number > min(numbers[3 * (i // 3) :][:3]) for i, number in enumerate(numbers)]
    assert masked.RandomMasks(given, 5).read(name, slice(row, row + 1))[0].tolist() == expected
