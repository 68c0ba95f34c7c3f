"""``calibrate`` of a parent whose layers differ: sums and saliencies against transformers in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.structured import statistics as statistics_file
from tests.calibration.test_calibrate import (
    LAYOUTS,
    SEQUENCES,
    SITES,
    corpus_windows,
    flags,
    hf_statistics,
    outliers,
)
from tests.calibration.test_gradients import saliencies
from tests.reference import float64
from tests.structured import layered


@pytest.fixture(scope="module")
def parent(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered.cut(tiny_parent, tmp_path_factory.mktemp("layers") / "parent", biases=True)


@pytest.fixture(scope="module")
def oracle(tiny_hf: Callable[..., Path], tiny_corpus: Path) -> dict[str, np.ndarray]:
    """Zeros in place of the attention and the MLP that a layer lacks, which the model has here, without effect."""
    kept = layered.with_means(layered.selection())
    model, windows = layered.really_cut(tiny_hf("llama-gqa", layers=4), kept), corpus_windows(tiny_corpus)
    found = saliencies(model, windows)[0] | hf_statistics(model, windows)[0]
    blocks: Any = float64(model).model.layers
    for layer, sites in ((1, SITES[2:]), (3, SITES[:2])):
        found["outliers"][layer] = outliers(blocks[layer], found, layer, sites)
    for layer, parts in ((1, ("input_layernorm", "attention", "qkv", "proj")), (3, ("pre_mlp", "mlp", "fc"))):
        for name in found:
            if name.startswith(parts):
                found[name][layer] = 0
    return found


@pytest.mark.parametrize(
    "layout", [name if name == "tp2pp2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_they_are_those_of_float64(
    job: Callable[..., Any],
    parent: Path,
    oracle: dict[str, np.ndarray],
    tiny_corpus: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    nproc, more = LAYOUTS[layout]
    output = tmp_path / "s.safetensors"
    job(["calibrate", *flags(parent, tiny_corpus, "--gradients", "--output", output, *more)], nproc=nproc).ok()
    found = statistics_file.read(output)
    assert found.shape == open_checkpoint(parent).shape and found.sequences == SEQUENCES
    assert set(found.tensors) == set(oracle)
    for name, wanted in oracle.items():
        scale = np.abs(wanted)  # of sums with signs: their largest possible value
        if name.endswith(".sum"):
            scale = np.sqrt(oracle[f"{name}_sq"] * found.tokens)
        elif name.endswith(".vector"):
            scale = oracle[name.replace("vector", "first")]
        assert (np.abs(found.tensors[name].numpy() - wanted) <= 2e-5 * scale).all(), name
