"""The comparisons of the GPU tests on the CPU in bf16: they run, pass, and detect errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import comparisons
from tests.gpu.comparisons import FLAGS, TOLERANCES, Tolerance


@pytest.fixture
def run(job: Callable[..., Any]) -> Callable[..., Any]:
    return lambda words: job(words).ok()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_masks(run, tiny_hf, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, method: str) -> None:
    hf = tiny_hf("llama-gqa", layers=4)
    found = comparisons.sparse(run, method, "bf16", hf, tiny_parent, tiny_corpus, tmp_path)
    assert 0.9 < found["mask bits as in float64"] < 1  # of bf16, and not of what it is compared with


def test_channels(run, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    comparisons.width(run, run, "bf16", tiny_parent, tiny_corpus, tmp_path)


def test_scores(run, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    found = comparisons.scores(run, run, "bf16", tiny_parent, tiny_corpus, tmp_path)
    assert found["candidates' losses, largest relative difference"] > 0


def test_what_is_wrong_is_seen(run, tiny_hf, tiny_parent, tiny_corpus, tmp_path, monkeypatch) -> None:
    """Masks by magnitude are not wanda's: even FP8's tolerance tells them apart."""
    monkeypatch.setitem(FLAGS, "wrong", ["--bf16"])
    monkeypatch.setitem(TOLERANCES, "wrong", TOLERANCES["blockwise"])

    def magnitude(words):
        words = ["magnitude" if word == "wanda" else word for word in words]
        place = words.index("--calibration-data-path")
        run([*words[:place], *words[place + 6 :]])

    with pytest.raises(AssertionError, match="of the mask bits are those of float64"):
        comparisons.sparse(
            magnitude, "wanda", "wrong", tiny_hf("llama-gqa", layers=4), tiny_parent, tiny_corpus, tmp_path
        )


def test_tolerances_are_those_of_every_preset_that_calibrates() -> None:
    from megatron_prune.engine.fp8 import PRESETS

    assert set(TOLERANCES) == {"bf16", *(name for name in PRESETS if name != "hybrid-delayed")}
    for tolerance in TOLERANCES.values():
        assert isinstance(tolerance, Tolerance) and min(tolerance.wanda, tolerance.sparsegpt) > 0.75 > 0.5
