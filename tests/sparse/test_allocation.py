"""``sparsify --allocation owl`` against outliers that transformers' activations give in float64."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.masks import open_masks
from tests.sparse import oracle, small
from tests.sparse.test_resume import finished, kill, same, scratch_of

RATIO, THRESHOLD, BOUND = 0.6, 2.5, 0.15
OWL = ("--ratio", RATIO, "--allocation", "owl", "--owl-threshold", THRESHOLD, "--owl-bound", BOUND)
MODULES = dict(zip(("qkv", "proj", "fc1", "fc2"), oracle.INPUTS, strict=True))


@pytest.fixture(scope="module")
def shares(tiny_hf: Callable[..., Path], tiny_corpus: Path) -> list[float]:
    """The share of outliers in every layer of the dense model."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_hf("llama-gqa", layers=4), dtype=torch.float64
    ).eval()
    found = []
    for block in model.model.layers:
        scores = []
        for paths, h in zip(
            oracle.INPUTS, oracle.hessians(model, block, small.corpus_windows(tiny_corpus)), strict=True
        ):
            norms = (h.diagonal() / 2).sqrt()  # h is twice the mean
            scores += [(block.get_submodule(path).weight.abs() * norms).flatten() for path in paths.values()]
        whole = torch.cat(scores)
        found.append(float((whole > THRESHOLD * whole.mean()).double().mean()))
    assert len(set(found)) == 4
    return found


def quotas(shares: list[float], ratio: float = RATIO) -> np.ndarray:
    scaled = (np.array(shares) - min(shares)) / (max(shares) - min(shares))
    return np.asarray(ratio + 2 * BOUND * (scaled.mean() - scaled))


@pytest.fixture(scope="module")
def pruned(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """``pruned(method, layout)``, made on first use."""
    folder = tmp_path_factory.mktemp("allocated")

    @functools.cache
    def get(method: str, layout: str) -> Path:
        save = folder / f"{method}-{layout}"
        argv = small.flags(tiny_parent, save, method, *OWL, *small.layout(layout), corpus=tiny_corpus)
        job(argv, nproc=small.LAYOUTS[layout][0]).ok()
        return save

    return get


CASES = [
    pytest.param(method, layout, marks=() if layout == "tp2pp2" and method != "sparsegpt" else pytest.mark.slow)
    for method in ("wanda", "sparsegpt", "magnitude")
    for layout in small.LAYOUTS
]


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_every_layer_loses_what_its_outliers_say(
    pruned: Callable[[str, str], Path], shares: list[float], method: str, layout: str
) -> None:
    save = pruned(method, layout)
    found, table = small.result(save), json.loads((save / "pruning" / "sparsity.json").read_text())
    assert [row["outliers"] for row in table["layer_ratios"]] == shares
    for module, paths in MODULES.items():
        (inputs,) = {found[0, name][1].shape[1] for name in paths}
        removed = []
        for layer, quota in enumerate(inputs * quotas(shares)):
            count = round(table["layer_ratios"][layer]["ratios"][module] * inputs)
            assert abs(count - quota) < 1
            removed.append(count)
            for name in paths:
                kept = found[layer, name][1]
                if method == "wanda":
                    assert set((~kept).sum(1).tolist()) == {count}
                assert int((~kept).sum()) == count * len(kept)
        assert sum(removed) == int(4 * inputs * RATIO)
    (entry,) = open_checkpoint(save).pruning
    assert entry["settings"]["allocation"] == {"name": "owl", "threshold": THRESHOLD, "bound": BOUND}
    assert entry["ratio"] == RATIO
    assert entry["removed"] == sum(int((~kept).sum()) for _, kept in found.values())
    assert 0 <= RATIO - entry["removed_linears"] < 1 / (4 * 96)  # less than one weight of a row, over all layers


def test_layouts_agree(pruned: Callable[[str, str], Path]) -> None:
    one, other = (small.result(pruned("magnitude", layout)) for layout in ("tp1", "tp2pp2"))
    assert small.agreement(one, other) == 1
    assert all(torch.equal(one[key][0], other[key][0]) for key in one)


def test_outliers_are_those_of_what_is_pruned(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, shares: list[float]
) -> None:
    """Of the chosen layers and linears; one linear has a ratio of its own, and the same shifts."""
    more = [*OWL, "--layers", "0,2-3", "--modules", "qkv,fc2", "--module-ratio", "fc2=0.5", *small.layout("pp2")]
    job(small.flags(tiny_parent, tmp_path / "some", "wanda", *more, corpus=tiny_corpus), nproc=2).ok()
    table = json.loads((tmp_path / "some" / "pruning" / "sparsity.json").read_text())
    assert [row["layer"] for row in table["layer_ratios"]] == [0, 2, 3]
    found = quotas([row["outliers"] for row in table["layer_ratios"]])
    for module, ratio in (("qkv", RATIO), ("fc2", 0.5)):
        ratios = [row["ratios"][module] for row in table["layer_ratios"]]
        assert ratios == pytest.approx(found + ratio - RATIO, abs=1 / 64)
        assert len(set(ratios)) == 3
    assert [row["outliers"] for row in table["layer_ratios"]] != [shares[0], *shares[2:]]
    entry = open_checkpoint(tmp_path / "some").pruning[-1]
    shape = open_checkpoint(tiny_parent).shape
    output = 2 * small.LENGTH * shape.hidden_size * shape.padded_vocab_size
    block = (shape.forward_flops(small.LENGTH) - output) // 4
    assert entry["flops"] == (3 + 3 + 4) * small.SEQUENCES * block


def test_killed_and_given_again(
    pruned: Callable[[str, str], Path], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, job: Callable[..., Any]
) -> None:
    """Outliers are counted once: a second count would see pruned blocks, or another layout's rounding."""
    save = tmp_path / "killed"
    argv = small.flags(tiny_parent, save, "wanda", *OWL, *small.layout("tp2pp2"), corpus=tiny_corpus)
    kill(tmp_path / "kill", argv, 4, "block 2")
    assert finished(save) == ["block-0000", "block-0001"]
    held = {path.name: path.stat().st_mtime_ns for path in scratch_of(save).glob("counts-*")}
    assert len(held) == 4
    printed = job(argv, nproc=4).ok().output
    assert printed.count("kept from before") == 2 and "outliers in" not in printed
    assert same(save, pruned("wanda", "tp2pp2"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pattern", "4:8"], "--allocation: expected uniform with an N:M --pattern, got owl"),
        (["--ratio", "0.9"], "--owl-bound: expected at least 0 and less than 0.05, got 0.08"),
        (["--ratio", "0.5", "--owl-threshold", "0"], "--owl-threshold: expected a number above 0, got 0.0"),
        (["--ratio", "0.5", "--allocation", "uniform", "--owl-bound", "0.1"], "--owl-bound: expected --allocation owl"),
        (
            ["--ratio", "0.5", "--allocation", "even"],
            "--allocation: expected one of uniform, global, owl, search, got even",
        ),
    ],
)
def test_refused_before_it_begins(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    refused = job(
        small.flags(tiny_parent, tmp_path / "save", "wanda", "--allocation", "owl", *more, corpus=tiny_corpus)
    )
    assert refused.returncode == 2 and f"megatron-prune sparsify: {message}" in refused.output, refused.output[-2000:]
    assert not list(tmp_path.iterdir())


def test_a_method_without_text_reads_it_to_allocate(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    refused = job(small.flags(tiny_parent, tmp_path / "save", "magnitude", "--ratio", 0.5, "--allocation", "owl"))
    assert refused.returncode == 2 and "--calibration-data-path: expected" in refused.output


def test_uniform_is_what_it_was(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    for name, more in (("one", ()), ("two", ("--allocation", "uniform"))):
        job(small.flags(tiny_parent, tmp_path / name, "magnitude", "--ratio", 0.5, *more)).ok()
    assert open_masks(tmp_path / "one" / "masks").hash == open_masks(tmp_path / "two" / "masks").hash
