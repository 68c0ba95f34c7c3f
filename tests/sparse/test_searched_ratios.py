"""``sparsify --allocation search`` against all allocations, whose losses transformers computes in float64."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from tests.sparse import oracle, small
from tests.sparse.test_resume import finished, kill, same, scratch_of

RATIO, STEP, SIDE = 0.6, 1 / 48, 9
LAYERS = (0, 1, 3)  # those that are pruned
SEARCH = ("--ratio", RATIO, "--allocation", "search", "--search-generations", 12, "--layers", "0-1,3")
PATHS = [path for paths in oracle.INPUTS for path in paths.values()]


def removed(weight: torch.Tensor, scores: torch.Tensor, count: int, rows: bool) -> torch.Tensor:
    """``weight`` without its lowest scores: ``count`` of every row, or that many times the rows of the whole matrix."""
    scores = scores if rows else scores.reshape(1, -1)
    gone = scores.argsort(dim=1, stable=True)[:, : count if rows else count * len(weight)]
    return (
        weight.flatten().masked_fill(torch.zeros(scores.shape).scatter(1, gone, 1).bool().flatten(), 0).view_as(weight)
    )


class Oracle:
    """The loss of every allocation, by transformers: masks from the dense model."""

    def __init__(self, folder: Path, corpus: Path, method: str):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.windows, self.rows = small.corpus_windows(corpus), method == "wanda"
        self.variants: dict[tuple[int, str, int], torch.Tensor] = {}
        for layer in LAYERS:
            block = self.model.model.layers[layer]
            found = oracle.hessians(self.model, block, self.windows) if self.rows else [None] * len(oracle.INPUTS)
            for paths, h in zip(oracle.INPUTS, found, strict=True):
                for path in paths.values():
                    weight = block.get_submodule(path).weight.detach()
                    scores = weight.abs() if h is None else weight.abs() * (h.diagonal() / 2).sqrt()
                    inputs = weight.shape[1]
                    # Equal ratios: 0.6 of n inputs in three layers, rounded down once; lower layers are rounded up.
                    extra = int(3 * RATIO * inputs + 1e-9) - 3 * int(RATIO * inputs)
                    base = int(RATIO * inputs) + (LAYERS.index(layer) < extra)
                    for level in range(-SIDE, SIDE + 1):
                        count = base + round(level * STEP * inputs)
                        self.variants[layer, path, level] = removed(weight, scores, count, self.rows)

    @torch.no_grad()
    def loss(self, levels: tuple[int, ...]) -> float:
        for layer, level in zip(LAYERS, levels, strict=True):
            block = self.model.model.layers[layer]
            for path in PATHS:
                block.get_submodule(path).weight.data = self.variants[layer, path, level]
        logits = self.model(self.windows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.windows[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("magnitude", "tp2pp2"),
        pytest.param("wanda", "tp2dp2"),
        *(
            pytest.param(m, one, marks=pytest.mark.slow)
            for m in ("wanda", "magnitude")
            for one in ("tp1", "tp3", "pp2")
        ),
    ],
)
def test_the_winner_is_in_the_best_hundredth_of_all_allocations(
    job: Callable[..., Any],
    tiny_hf: Callable[..., Path],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    method: str,
    layout: str,
) -> None:
    save = tmp_path / "pruned"
    argv = small.flags(tiny_parent, save, method, *SEARCH, *small.layout(layout), corpus=tiny_corpus)
    job(argv, nproc=small.LAYOUTS[layout][0]).ok()
    table = json.loads((save / "pruning" / "sparsity.json").read_text())
    searched = table["search"]
    assert searched["step"] == STEP and searched["generation"] == 12

    every = Oracle(tiny_hf("llama-gqa", layers=4), tiny_corpus, method)
    grid = range(-SIDE, SIDE + 1)
    allocations = [(a, b, -a - b) for a, b in itertools.product(grid, grid) if -a - b in grid]
    losses = {levels: every.loss(levels) for levels in allocations}
    ranked = sorted(losses, key=lambda levels: losses[levels])
    best = tuple(searched["allocation"])
    assert searched["uniform"] == pytest.approx(losses[0, 0, 0], rel=2e-6)
    assert searched["loss"] == pytest.approx(losses[best], rel=2e-6)
    # An evolution may end on a hill that is not the highest. The model was never trained: it has several.
    assert best in ranked[: len(ranked) // 100 + 1] and searched["loss"] < searched["uniform"] - 0.02

    # What is removed: in each layer what its level says, in all what was asked for.
    found = small.result(save)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        kept = [found[layer, name][1] for layer in LAYERS]
        inputs = kept[0].shape[1]
        counts = [int((~mask).sum()) / len(mask) for mask in kept]
        assert sum(counts) == int(3 * RATIO * inputs + 1e-9)
        extra = int(3 * RATIO * inputs + 1e-9) - 3 * int(RATIO * inputs)
        expected = [int(RATIO * inputs) + (i < extra) + round(level * STEP * inputs) for i, level in enumerate(best)]
        assert counts == expected
    assert [row["layer"] for row in table["layer_ratios"]] == list(LAYERS)
    (entry,) = open_checkpoint(save).pruning
    assert entry["settings"]["allocation"] == {"name": "search", "generations": 12, "seed": 1234}
    shape = open_checkpoint(tiny_parent).shape
    assert entry["flops"] > searched["passes"] * shape.forward_flops(small.LENGTH) > 0
    if method == "magnitude":  # its masks do not depend on inputs: the checkpoint has the loss that was found
        text = ["--data-path", tiny_corpus, "--seq-length", small.LENGTH, "--windows", small.SEQUENCES]
        job(["evaluate", "--load", save, *text, "--output", tmp_path / "scores.json"]).ok()
        (corpus,) = artifacts.read_json(tmp_path / "scores.json")["corpora"].values()
        assert corpus["loss"] == pytest.approx(searched["loss"], rel=2e-6)


def test_killed_and_given_again(job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """In the search, and then in a block: the same result as without."""
    argv = small.flags(tiny_parent, tmp_path / "killed", "wanda", *SEARCH, *small.layout("pp2"), corpus=tiny_corpus)
    kill(tmp_path / "kill", argv, 2, "generation 5")
    assert json.loads((scratch_of(tmp_path / "killed") / "levels.json").read_text())["generation"] == 5
    kill(tmp_path / "kill again", argv, 2, "block 3")
    assert finished(tmp_path / "killed") == ["block-0000", "block-0001"]
    printed = job(argv, nproc=2).ok().output
    assert printed.count("kept from before") == 2 and "searching" not in printed
    job([*argv, "--save", tmp_path / "whole"], nproc=2).ok()
    assert same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("wanda", ["--pattern", "4:8"], "--allocation: expected uniform with an N:M --pattern, got search"),
        ("random", ["--ratio", "0.5"], "--allocation: expected owl or uniform with --method random, got search"),
        ("wanda", ["--ratio", "0.5", "--layers", "2"], "--allocation: expected uniform for a single layer, got search"),
        ("wanda", ["--ratio", "0.99"], "--allocation: expected global, owl or uniform, got search"),
        (
            "wanda",
            ["--ratio", "0.5", "--owl-bound", "0.1"],
            "--owl-bound: expected --allocation owl with it, got --all",
        ),
        ("wanda", ["--ratio", "0.5", "--search-generations", "0"], "--search-generations: expected at least 1, got 0"),
        (
            "wanda",
            ["--ratio", "0.5", "--allocation", "owl", "--search-generations", "9"],
            "--search-generations: expected --allocation search with it, got --allocation owl",
        ),
    ],
)
def test_refused_before_it_begins(
    job: Callable[..., Any],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    method: str,
    more: list[str],
    message: str,
) -> None:
    refused = job(
        small.flags(tiny_parent, tmp_path / "save", method, "--allocation", "search", *more, corpus=tiny_corpus)
    )
    assert refused.returncode == 2 and f"megatron-prune sparsify: {message}" in refused.output, refused.output[-2000:]
    assert not list(tmp_path.iterdir())
