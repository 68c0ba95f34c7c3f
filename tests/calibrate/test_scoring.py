"""Scores of candidates: against transformers and against checkpoints that are really cut, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune import plan
from megatron_prune.calibrate import statistics as statistics_file
from megatron_prune.errors import EXIT_NEEDS_SCORES

SEQUENCES, LENGTH, LAYERS = 5, 64, 4
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp1": (1, []),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, []),
    "tp2pp2": (4, [*TP2, *PP2]),
}
TEXT = ["--calibration-sequences", str(SEQUENCES), "--calibration-seq-length", str(LENGTH)]


def hf_loss(model: Any, corpus: Path) -> float:
    """Mean loss on the first windows of the corpus, read without our reader."""
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16).astype(np.int64)
    losses = []
    with torch.no_grad():
        for k in range(SEQUENCES):
            window = torch.from_numpy(tokens[k * LENGTH : (k + 1) * LENGTH + 1])
            losses.append(torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:]).item())
    return sum(losses) / len(losses)


def hf_without(folder: Path, removed: range) -> Any:
    """transformers' model in float64 with these layers deleted."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(model.model.layers) if i not in removed
    )
    return model


class Verbs:
    """calibrate, plan and calibrate --score for one parent, each as a user would call it."""

    def __init__(self, job: Callable[..., Any], parent: Path, corpus: Path, folder: Path):
        self.job, self.parent, self.corpus, self.folder = job, parent, corpus, folder
        self.statistics, self.plan = folder / "s.safetensors", folder / "plan.json"
        self.load = ["--load", parent, "--use-checkpoint-args"]

    def calibrate(self, *more: object) -> None:
        text = ["--calibration-data-path", self.corpus, *TEXT]
        self.job(["calibrate", *self.load, *text, "--output", self.statistics, *more]).ok()

    def make(self, *choice: object) -> Any:
        found = ["--statistics", self.statistics, "--output", self.plan]
        return self.job(["plan", "--load", self.parent, *found, "--divisible-by", "4", *choice])

    def score(self, *more: object, nproc: int = 1) -> Any:
        asked = ["--score", self.folder / "candidates.json", "--statistics", self.statistics]
        return self.job(["calibrate", *self.load, *asked, *more], nproc=nproc)


@pytest.fixture
def verbs(job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> Verbs:
    return Verbs(job, tiny_parent, tiny_corpus, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depth_scores_are_the_losses_without_those_layers(
    verbs: Verbs, tiny_hf: Callable[..., Path], tiny_corpus: Path, layout: str
) -> None:
    verbs.calibrate()
    asked = verbs.make("--method", "minitron-depth", "--target-num-layers", "2")
    assert asked.returncode == EXIT_NEEDS_SCORES and "3 candidates have no score yet" in asked.output
    assert not verbs.plan.exists()
    nproc, flags = LAYOUTS[layout]
    tensors = verbs.statistics.read_bytes()
    verbs.score(*flags, nproc=nproc).ok()
    assert verbs.statistics.read_bytes() == tensors

    expected = [
        hf_loss(hf_without(tiny_hf("llama-gqa", layers=LAYERS), range(i, i + 2)), tiny_corpus) for i in range(3)
    ]
    found = {s.candidate: s.loss for s in statistics_file.read(verbs.statistics).scores.values()}
    assert list(found) == [f"without layers {i}-{i + 1}" for i in range(3)]
    assert list(found.values()) == pytest.approx(expected, rel=2e-6)

    shown = verbs.make("--method", "minitron-depth", "--ratio", "0.5").ok().output
    made = plan.read(verbs.plan)
    best = int(np.argmin(expected))
    assert made.kept_layers == tuple(i for i in range(LAYERS) if i not in (best, best + 1))
    assert made.chosen == best and [row.loss for row in made.candidates] == list(found.values())
    assert f"without layers {best}-{best + 1}" in shown and "candidates: 3" in shown
