"""``sparsify`` against a block-sequential pruning of the Hugging Face model in float64 (oracle.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_prune.convert.huggingface import export_hf, import_hf
from tests.reference import window_losses
from tests.sparse import oracle, small

# name: (flags, the oracle's arguments, the least share of equal bits)
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], float]] = {
    "magnitude": (("magnitude", "--ratio", 0.3), {"ratio": 0.3}, 1.0),
    "wanda": (("wanda", "--ratio", 0.5), {}, 0.995),
    "wanda 4:8": (("wanda", "--pattern", "4:8"), {"pattern": (4, 8)}, 0.995),
    "sparsegpt": (("sparsegpt", "--ratio", 0.5), {}, 0.97),
    "sparsegpt 2:4": (("sparsegpt", "--pattern", "2:4"), {"pattern": (2, 4)}, 0.90),
}


@pytest.mark.parametrize("name", CASES)
def test_masks_and_weights_are_the_oracles(
    job: Callable[..., Any],
    tiny_hf: Callable[..., Path],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    name: str,
) -> None:
    (method, *more), settings, least = CASES[name]
    corpus = None if method == "magnitude" else tiny_corpus
    save = tmp_path / "pruned"
    job(small.flags(tiny_parent, save, method, *more, corpus=corpus)).ok()
    found = small.result(save)
    model, masks = oracle.sparsify(
        tiny_hf("llama-gqa", layers=4), small.corpus_windows(tiny_corpus), method, **settings
    )
    assert small.agreement(found, {key: (None, kept) for key, kept in masks.items()}) >= least
    for (layer, matrix), kept in masks.items():
        weight, ours = found[layer, matrix]
        if layer == 0:
            assert (ours == kept).float().mean() >= 0.999, matrix
        path = next(paths[matrix] for paths in oracle.INPUTS if matrix in paths)
        expected = model.model.layers[layer].get_submodule(path).weight
        rows = (ours == kept).all(1)  # rows that took the same way
        assert rows.any()
        assert (weight.double() - expected)[rows].norm() <= 1e-3 * expected[rows].norm(), (layer, matrix)

    job([
        "evaluate", "--load", save, "--data-path", tiny_corpus,
        "--seq-length", small.LENGTH, "--windows", 4, "--output", tmp_path / "scores.json",
    ]).ok()  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    (losses,) = (corpus["window_losses"] for corpus in scores["corpora"].values())
    assert losses == pytest.approx(window_losses(model, tiny_corpus, small.LENGTH, 4), rel=2e-3)


@pytest.mark.parametrize(("name", "least"), [("wanda", 0.97), ("sparsegpt", 0.93)])
def test_bf16_loses_little(
    job: Callable[..., Any],
    tiny_hf: Callable[..., Path],
    tiny_corpus: Path,
    tmp_path: Path,
    name: str,
    least: float,
) -> None:
    """A model in bf16, stored in bf16: its weights are full of ties, its counts exact, its loss that of the oracle."""
    import_hf(tiny_hf("llama-gqa", layers=4), tmp_path / "parent", dtype=torch.bfloat16)
    save = tmp_path / "pruned"
    more = ("--ratio", 0.5, "--bf16", "--tensor-model-parallel-size", 2)
    job(small.flags(tmp_path / "parent", save, name, *more, corpus=tiny_corpus), nproc=2).ok()
    found = small.result(save)
    assert all(weight.dtype == torch.bfloat16 for weight, _ in found.values())
    assert all(int((~kept).sum()) == kept.numel() // 2 for _, kept in found.values())
    model, masks = oracle.sparsify(tiny_hf("llama-gqa", layers=4), small.corpus_windows(tiny_corpus), name)
    same = small.agreement(found, {key: (None, kept) for key, kept in masks.items()})
    assert same >= least
    job([
        "evaluate", "--load", save, "--data-path", tiny_corpus,
        "--fp32", "--seq-length", small.LENGTH, "--windows", 8, "--output", tmp_path / "scores.json",
    ]).ok()  # fmt: skip
    (scores,) = json.loads((tmp_path / "scores.json").read_text())["corpora"].values()
    # The loss is that of the pruned weights as transformers computes it, and near that of the oracle's: 3% of the
    # perplexity, since some bits of the masks are others.
    export_hf(save, tmp_path / "hf")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    assert scores["window_losses"] == pytest.approx(window_losses(pruned, tiny_corpus, small.LENGTH, 8), rel=1e-4)
    expected = window_losses(model, tiny_corpus, small.LENGTH, 8)
    assert scores["loss"] == pytest.approx(sum(expected) / len(expected), abs=0.03)
    print(f"{name} in bf16: {same:.4%} of the mask bits are those of float64")
