"""A masked run keeps its zeros: at every step, in weights, gradients, masters and moments, at every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training.small import layout, recipe
from tests.training.small_masked import ADAM, account, assert_zero_in_checkpoint, losses, start_from, watched

STEPS = 6
RANGE = "64:112"

OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
VIRTUAL = ["--num-layers-per-virtual-pipeline-stage", "1"]
# name, pattern, processes, layout, flags, optimizer states that the checkpoint stores in the weight's shape
FP32 = [
    ("one process", "2:4", 1, (1, 1), [], ADAM),
    ("DP", "2:4", 2, (1, 1), [], ADAM),
    ("DP, distributed and overlapped", "2:4", 2, (1, 1), OVERLAP, ("param", *ADAM)),
    ("TP and PP", "2:4", 4, (2, 2), ["--use-distributed-optimizer"], ("param", *ADAM)),
    ("virtual stages", "2:4", 2, (1, 2), [*OVERLAP, *VIRTUAL], ("param", *ADAM)),
]
LOW = [
    ("bf16, DP, distributed and overlapped", "unstructured", 2, (1, 1), ["--bf16", *OVERLAP], ("param", *ADAM)),
    ("bf16, DP, gradients in bf16, a loss scale", "2:4", 2, (1, 1),
     ["--bf16", "--grad-reduce-in-bf16", "--loss-scale", "64"], ADAM),
    ("bf16, TP and DP", "unstructured", 4, (2, 1), ["--bf16", *OVERLAP], ("param", *ADAM)),
    ("bf16, virtual stages and TP", "2:4", 4, (2, 2), ["--bf16", *OVERLAP, *VIRTUAL], ("param", *ADAM)),
    ("SGD", "unstructured", 2, (1, 1), ["--optimizer", "sgd"], ("momentum_buffer",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tiny_pruned, tiny_corpus, tmp_path_factory):
    """The run in fp32 on one process: its losses and clip norms."""
    folder: Path = tmp_path_factory.mktemp("reference")
    argv = start_from(tiny_pruned("2:4"), *recipe(tiny_corpus, RANGE, folder / "run"))
    watched(argv, folder / "seen", 1, tiny_pruned("2:4").file)
    return folder / "run"


# Others of the cases have what these have, and more.
SLOW = ("one process", "DP", "bf16, DP, distributed and overlapped")
CASES = [pytest.param(c, id=c[0], marks=[pytest.mark.slow] if c[0] in SLOW else []) for c in FP32 + LOW]


@pytest.mark.parametrize("case", CASES)
def test_zeros_stay_zero_everywhere(reference, tiny_pruned, tiny_corpus, tmp_path, case):
    name, pattern, nproc, (tp, pp), flags, moments = case
    pruned, save = tiny_pruned(pattern), tmp_path / "run"
    argv = start_from(pruned, *recipe(tiny_corpus, RANGE, save), *layout(tp, pp), *flags, "--save-interval", "4")
    seen = watched(argv, tmp_path / "seen", nproc, pruned.file)
    assert all(rank["steps"] == STEPS for rank in seen)
    # Every masked weight of the model was checked: each data-parallel replica has all of them.
    assert sum(rank["masked"] for rank in seen) == len(pruned.kept) * nproc // pp
    for step in (4, STEPS):
        assert_zero_in_checkpoint(save / f"iter_{step:07d}", pruned.kept, moments=moments)
    if case in FP32:
        np.testing.assert_allclose(losses(save), losses(reference), rtol=2e-5)
        np.testing.assert_allclose(losses(save, "grad_norm"), losses(reference, "grad_norm"), rtol=2e-4)
    assert losses(save)[-1] < losses(save)[0]
    assert account(save)["complete"] and account(save)["start"] == "pruned"
