"""Pruning on a GPU in bf16 and in each FP8 preset, against the CPU; what delayed scaling cannot do is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import comparisons
from tests.gpu.test_statistics import on_cpu

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(job):
    return lambda words: job(words).ok()


def oracle(words: Sequence[Any]) -> None:
    on_cpu([str(word) for word in words])


@pytest.mark.parametrize("kind", comparisons.TOLERANCES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_masks_are_those_of_float64(run, figures, tiny_hf, tiny_parent, tiny_corpus, tmp_path, kind, method) -> None:
    hf = tiny_hf("llama-gqa", layers=4)
    figures(comparisons.sparse(run, method, kind, hf, tiny_parent, tiny_corpus, tmp_path))


@pytest.mark.parametrize("kind", comparisons.TOLERANCES)
def test_the_same_channels_are_kept(run, figures, tiny_parent, tiny_corpus, tmp_path, kind) -> None:
    figures(comparisons.width(run, oracle, kind, tiny_parent, tiny_corpus, tmp_path))


@pytest.mark.parametrize("kind", comparisons.TOLERANCES)
def test_candidates_are_scored_alike(run, figures, tiny_parent, tiny_corpus, tmp_path, kind) -> None:
    figures(comparisons.scores(run, oracle, kind, tiny_parent, tiny_corpus, tmp_path))


def test_delayed_scaling_is_refused(job, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    words = ["calibrate", "--load", tiny_parent, "--calibration-data-path", tiny_corpus]
    refused = job([*words, "--output", tmp_path / "s.safetensors", "--fp8-preset", "hybrid-delayed"])
    assert refused.returncode == 2 and "got hybrid-delayed" in refused.output
