"""Blocks that cache copies of their weights between forward passes, as in FP8, are pruned like others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sparse import ranks, small


@pytest.mark.parametrize("layout", ["tp1", "tp2pp2"])
def test_later_blocks_see_pruned_ones(
    distributed: Callable[..., Any], job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path,
    layout: str,
) -> None:  # fmt: skip
    nproc = small.LAYOUTS[layout][0]
    words = ("sparsegpt", "--ratio", 0.5, *small.layout(layout))
    plain, cached = (
        small.flags(tiny_parent, tmp_path / name, *words, corpus=tiny_corpus) for name in ("plain", "cached")
    )
    job(plain, nproc=nproc).ok()
    distributed(ranks.with_cached_weights, nproc, [str(word) for word in cached])
    one, other = small.result(tmp_path / "plain"), small.result(tmp_path / "cached")
    for key in one:
        assert all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True)), key
