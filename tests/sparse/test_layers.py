"""``sparsify`` of a parent whose layers differ, as flap leaves one: against a pruning of the smaller transformers model
in float64. One layer has no attention, one no MLP; biases make up for what is gone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import UsageError
from megatron_prune.masks import open_masks
from megatron_prune.sparse import request as requests
from tests.sparse import oracle, small
from tests.structured import layered

GONE = {(1, matrix) for matrix in "qkvo"} | {(3, matrix) for matrix in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def parent(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered.cut(tiny_parent, tmp_path_factory.mktemp("layers") / "parent", biases=True)


@pytest.fixture(scope="module")
def smaller(tiny_hf: Callable[..., Path]) -> Callable[[], torch.nn.Module]:
    folder = tiny_hf("llama-gqa", layers=4)
    return lambda: layered.really_cut(folder, layered.with_means(layered.selection()))


@pytest.fixture(scope="module")
def pruned(smaller: Callable[[], torch.nn.Module], tiny_corpus: Path) -> Callable[[str], Any]:
    """Models and masks that are expected, by method."""
    return functools.cache(lambda method: oracle.sparsify(smaller(), small.corpus_windows(tiny_corpus), method))


QUICK = (("magnitude", "tp1"), ("sparsegpt", "tp2pp2"))
CASES = [
    pytest.param(method, layout, marks=() if (method, layout) in QUICK else pytest.mark.slow)
    for method, layouts in (("magnitude", ("tp1", "tp2pp2")), ("wanda", small.LAYOUTS), ("sparsegpt", small.LAYOUTS))
    for layout in layouts
    if layout != "tp3"  # does not divide the layers
]


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_masks_and_weights_are_the_oracles(
    job: Callable[..., Any],
    parent: Path,
    pruned: Callable[[str], Any],
    tiny_corpus: Path,
    tmp_path: Path,
    method: str,
    layout: str,
) -> None:
    corpus, save = None if method == "magnitude" else tiny_corpus, tmp_path / "pruned"
    argv = small.flags(parent, save, method, "--ratio", 0.5, *small.layout(layout), corpus=corpus)
    job(argv, nproc=small.LAYOUTS[layout][0]).ok()
    found = small.result(save)
    model, masks = pruned(method)
    assert set(found) == set(masks) - GONE
    expected = {key: (None, masks[key]) for key in found}
    assert small.agreement(found, expected) >= {"magnitude": 1.0, "wanda": 0.995, "sparsegpt": 0.97}[method]
    for (layer, matrix), (weight, kept) in found.items():
        path = next(paths[matrix] for paths in oracle.INPUTS if matrix in paths)
        wanted = model.model.layers[layer].get_submodule(path).weight
        rows = (kept == masks[layer, matrix]).all(1)
        assert rows.any()
        assert (weight.double() - wanted)[rows].norm() <= 1e-3 * wanted[rows].norm(), (layer, matrix)
    one, other = open_checkpoint(parent), open_checkpoint(save)
    assert one.shape == other.shape and one.shape.linear_bias
    linears = {name for name in open_masks(save / "masks").entries}
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names if name not in linears)
    assert other.read("decoder.layers.0.mlp.linear_fc2.bias").any()


RATIO, THRESHOLD, BOUND = 0.6, 2.5, 0.15


@pytest.mark.parametrize("layout", ["tp2pp2", pytest.param("tp1", marks=pytest.mark.slow)])
def test_outliers_decide_ratios_and_the_total_is_what_was_asked_for(
    job: Callable[..., Any],
    parent: Path,
    smaller: Callable[[], torch.nn.Module],
    tiny_corpus: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    """A layer without an MLP has the outliers of its attention, and the mean over layers counts weights."""
    model, save = smaller(), tmp_path / "pruned"
    owl = ("--ratio", RATIO, "--allocation", "owl", "--owl-threshold", THRESHOLD, "--owl-bound", BOUND)
    argv = small.flags(parent, save, "wanda", *owl, *small.layout(layout), corpus=tiny_corpus)
    job(argv, nproc=small.LAYOUTS[layout][0]).ok()
    shares, sizes = [], []
    for number, block in enumerate(model.model.layers):  # type: ignore[union-attr]
        scores = []
        for paths, h in zip(
            oracle.INPUTS, oracle.hessians(model, block, small.corpus_windows(tiny_corpus)), strict=True
        ):
            weights = [block.get_submodule(path).weight for name, path in paths.items() if (number, name) not in GONE]
            scores += [(weight.abs() * (h.diagonal() / 2).sqrt()).flatten() for weight in weights]
        whole = torch.cat(scores)
        shares.append(float((whole > THRESHOLD * whole.mean()).double().mean()))
        sizes.append(len(whole))
    table = json.loads((save / "pruning" / "sparsity.json").read_text())
    assert [row["outliers"] for row in table["layer_ratios"]] == shares
    low, high = min(shares), max(shares)
    scaled = [(share - low) / (high - low) for share in shares]
    mean = sum(size * one for size, one in zip(sizes, scaled, strict=True)) / sum(sizes)
    found = small.result(save)
    for row, one in zip(table["layer_ratios"], scaled, strict=True):
        for name, module in (("o", "proj"), ("down", "fc2"), ("q", "qkv"), ("gate", "fc1")):
            if (row["layer"], name) in GONE:
                assert module not in row["ratios"]
                continue
            kept = found[row["layer"], name][1]
            lost = set((~kept).sum(1).tolist())
            assert lost == {round(row["ratios"][module] * kept.shape[1])}
            assert abs(lost.pop() - kept.shape[1] * (RATIO + 2 * BOUND * (mean - one))) < 1
    removed = sum(int((~kept).sum()) for _, kept in found.values())
    most = sum(max(len(found[layer, name][1]) for layer in range(4) if (layer, name) not in GONE) for name in "qo")
    assert 0 <= RATIO * sum(sizes) - removed < 3 * most + 2 * 2 * 192


def asked(**settings: Any) -> requests.SparsifyRequest:
    return requests.choose("wanda", verbs.SparsitySettings.read({"ratio": 0.5, **settings}))


def test_masks_of_what_is_left_alone_are_carried(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    """Through a cut to layers that differ, and through the next pruning."""
    job(small.flags(tiny_parent, tmp_path / "sparse", "magnitude", "--ratio", 0.25, "--modules", "proj,fc2")).ok()
    layered.cut(tmp_path / "sparse", tmp_path / "cut")
    job(small.flags(tmp_path / "cut", tmp_path / "both", "random", "--ratio", 0.25, "--modules", "fc1,fc2")).ok()
    before, after = open_masks(tmp_path / "cut" / "masks"), open_masks(tmp_path / "both" / "masks")
    projections = {name for name in before.entries if name.endswith("linear_proj.weight")}
    assert len(projections) == 3
    assert all(torch.equal(after.read(name), before.read(name)) for name in projections)
    assert len(after.entries) == 3 + 2 * 3


def test_what_a_layer_lacks_is_not_asked_of_it(parent: Path) -> None:
    shape = open_checkpoint(parent).shape
    assert asked().chosen(shape) == (0, 1, 2, 3)
    assert asked(modules="qkv,proj").chosen(shape) == (0, 2, 3)
    asked(modules="qkv,proj").check(shape)
    with pytest.raises(UsageError, match=r"--layers: expected layers that have one of --modules fc1, got 3"):
        asked(modules="fc1", layers="0,3").check(shape)
    with pytest.raises(UsageError, match=r"--pattern: .* got 1:4 .*layers\.0\.mlp\.linear_fc2\.weight\) has 50"):
        requests.choose("wanda", verbs.SparsitySettings.read({"pattern": "1:4"})).check(shape)
    with pytest.raises(UsageError, match=r"--allocation: expected global, owl or uniform, got search .*layers differ"):
        asked(allocation="search").check(shape)
