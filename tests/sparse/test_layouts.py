"""The same masks at every layout, as far as rounding allows (docs/pages/benchmarks.md, Layouts)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sparse import small

METHODS = {
    "magnitude": ("magnitude", "--ratio", 0.5),
    "wanda": ("wanda", "--ratio", 0.5),
    "sparsegpt": ("sparsegpt", "--ratio", 0.5),
    "sparsegpt 2:4": ("sparsegpt", "--pattern", "2:4"),
}
# The least share of equal bits under tensor parallelism, over all blocks.
AGREE = {"magnitude": 1.0, "wanda": 0.995, "sparsegpt": 0.97, "sparsegpt 2:4": 0.90}

Result = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def pruned(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Result]:
    """``pruned(method, layout)``, made on first use."""
    folder = tmp_path_factory.mktemp("pruned")

    @functools.cache
    def get(name: str, layout: str) -> Result:
        method, *more = METHODS[name]
        save = folder / f"{name}-{layout}"
        corpus = tiny_corpus if method != "magnitude" else None
        argv = small.flags(tiny_parent, save, method, *more, *small.layout(layout), corpus=corpus)
        job(argv, nproc=small.LAYOUTS[layout][0]).ok()
        return small.result(save)

    return get


def cases() -> Iterator[Any]:
    """Every method at every layout; only the two that read text, at the largest of them, are not slow."""
    for name, layout in itertools.product(METHODS, [name for name in small.LAYOUTS if name != "tp1"]):
        always = layout == "tp2pp2" and name in ("wanda", "sparsegpt")
        yield pytest.param(name, layout, marks=() if always else pytest.mark.slow)


@pytest.mark.parametrize(("name", "layout"), cases())
def test_layout_does_not_change_masks(pruned: Callable[[str, str], Result], name: str, layout: str) -> None:
    one, other = pruned(name, "tp1"), pruned(name, layout)
    same = small.agreement(one, other)
    if small.LAYOUTS[layout][1] > 1:
        assert same >= AGREE[name]
        assert small.agreement(one, other, layer=0) >= 0.9999
        # Their input is the normed embedding, without a tensor-parallel sum.
        assert all(torch.equal(one[0, m][1], other[0, m][1]) for m in "qkv")
    else:
        assert same >= (1.0 if name == "magnitude" else 0.99999)
    for key, (weight, kept) in one.items():
        both = kept & other[key][1]
        difference = (weight - other[key][0])[both]
        assert difference.norm() <= (0 if name == "magnitude" else 0.05) * weight[both].norm()


@pytest.mark.slow
@pytest.mark.parametrize("layout", small.LAYOUTS)
def test_counts_are_exact(pruned: Callable[[str, str], Result], layout: str) -> None:
    for (_, matrix), (_, kept) in pruned("wanda", layout).items():
        assert set((~kept).sum(1).tolist()) == {kept.shape[1] // 2}, matrix
    for (_, matrix), (_, kept) in pruned("sparsegpt 2:4", layout).items():
        assert set(kept.view(-1, 4).sum(1).tolist()) == {2}, matrix
    for name in ("magnitude", "sparsegpt"):
        assert all(int((~kept).sum()) == kept.numel() // 2 for _, kept in pruned(name, layout).values())
