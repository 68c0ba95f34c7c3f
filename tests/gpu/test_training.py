"""BF16 and FP8 training on a GPU: from a pruned, a masked and a scratch start; zeros, losses, FP8 against BF16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_prune.engine.fp8 import PRESETS
from tests.training.conftest import tiny_pruned  # noqa: F401
from tests.training.small import recipe
from tests.training.small_masked import ADAM, account, assert_zero_in_checkpoint, losses

pytestmark = pytest.mark.gpu
RANGE, LONG = "64:192", "64:1664"  # 16 and 200 steps of 8 samples
FORMATS = {"bf16": ["--bf16"], **{name: ["--fp8-preset", name] for name in PRESETS}}
# Weights live in FP8 too, but where there is none.
KINDS = [(kind, gather) for kind in FORMATS for gather in ([], ["--fp8-param-gather"]) if not gather or kind in PRESETS]
DISTRIBUTED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def train(job, start: list[str], corpus: Path, save: Path, *more: str, samples: str = RANGE) -> list[float]:
    job(["pretrain", *start, *recipe(corpus, samples, save), *more]).ok()
    assert account(save)["complete"]
    return losses(save)


@pytest.fixture
def starts(tiny_parent, tiny_pruned) -> dict[str, list[str]]:  # noqa: F811
    pruned = str(tiny_pruned("2:4").path)
    return {
        "pruned": ["--pretrained-checkpoint", pruned],
        "masked": ["--pretrained-checkpoint", pruned, "--masks", f"{pruned}/masks"],
        "scratch": ["--shape-from", str(tiny_parent)],
        "masked scratch": ["--shape-from", pruned, "--masks", f"{pruned}/masks"],
    }


@pytest.mark.parametrize("start", ["pruned", "masked", "scratch", "masked scratch"])
@pytest.mark.parametrize("kind, gather", KINDS, ids=[kind + "".join(gather) for kind, gather in KINDS])
def test_every_start_trains_and_zeros_stay(job, starts, tiny_pruned, tiny_corpus, tmp_path, start, kind, gather):  # noqa: F811
    found = train(job, starts[start], tiny_corpus, tmp_path / "run", *FORMATS[kind], *gather, *DISTRIBUTED)
    assert len(found) == 16 and np.isfinite(found).all() and found[-1] < found[0]
    if start.startswith("masked"):
        kept = tiny_pruned("2:4").kept
        assert_zero_in_checkpoint(tmp_path / "run" / "iter_0000016", kept, moments=("param", *ADAM))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", PRESETS)
def test_fp8_is_within_a_percent_of_bf16_over_200_steps(job, figures, starts, tiny_corpus, tmp_path, preset):
    arms = {
        name: train(job, starts["pruned"], tiny_corpus, tmp_path / name, *flags, *DISTRIBUTED, samples=LONG)
        for name, flags in (("bf16", FORMATS["bf16"]), ("fp8", FORMATS[preset]))
    }
    bf16, fp8 = (np.array(arms[name]).reshape(20, 10).mean(1) for name in ("bf16", "fp8"))  # means of ten steps
    figures(
        {"losses beside bf16, largest relative difference of means of ten steps": float(np.abs(fp8 / bf16 - 1).max())}
    )
    np.testing.assert_allclose(fp8, bf16, rtol=0.01)
