"""Saves on a GPU: asynchronous ones (launch/checkpointing.flags), and runs resumed from a save, also in FP8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.reshard import BUCKETS
from tests.gpu.test_training import DISTRIBUTED, FORMATS, RANGE
from tests.launch.test_files import flags
from tests.training.small import recipe
from tests.training.small_masked import account, losses

pytestmark = pytest.mark.gpu
TOLERANCE = {"bf16": 2e-3, "hybrid-delayed": 1e-2, "current": 1e-2, "blockwise": 1e-2}  # relative, of each loss


def words(parent: Path, corpus: Path, save: Path, *more: str) -> list[object]:
    start = ["pretrain", "--pretrained-checkpoint", parent]
    return [*start, *recipe(corpus, RANGE, save), *DISTRIBUTED, *more]


def apart(save: Path, whole: Path) -> float:
    a, b = np.array(losses(save)), np.array(losses(whole))
    assert len(a) == len(b) == 16
    return float(np.abs(a / b - 1).max())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_run_goes_on_from_its_save(job, figures, tiny_parent, tiny_corpus, tmp_path, kind) -> None:
    more = [*FORMATS[kind], "--save-interval", "8"]
    job(words(tiny_parent, tiny_corpus, tmp_path / "whole", *more)).ok()
    job(words(tiny_parent, tiny_corpus, tmp_path / "run", *more, "--exit-interval", "8")).ok()
    assert not account(tmp_path / "run")["complete"]
    job(words(tiny_parent, tiny_corpus, tmp_path / "run", *more)).ok()
    assert account(tmp_path / "run")["complete"]
    found = apart(tmp_path / "run", tmp_path / "whole")
    figures({"losses after going on, largest relative difference": found})
    assert found <= TOLERANCE[kind]


def test_asynchronous_saves_end_as_others_do_and_can_be_gone_on_from(
    job, figures, tiny_parent, tiny_corpus, tmp_path
) -> None:
    saving = flags()
    saving[saving.index("--save-interval") + 1] = "4"
    saving[saving.index("--save-retain-interval") + 1] = "4"
    job(words(tiny_parent, tiny_corpus, tmp_path / "plain", "--bf16")).ok()
    job(words(tiny_parent, tiny_corpus, tmp_path / "run", "--bf16", *saving, "--exit-interval", "8")).ok()
    assert open_checkpoint(tmp_path / "run").iteration == 8
    assert open_checkpoint(tmp_path / "run").optimizer_form == BUCKETS
    job(words(tiny_parent, tiny_corpus, tmp_path / "run", "--bf16", *saving)).ok()
    assert account(tmp_path / "run")["complete"] and open_checkpoint(tmp_path / "run").iteration == 16
    found = apart(tmp_path / "run", tmp_path / "plain")
    figures({"losses under asynchronous saves, largest relative difference": found})
    assert found <= TOLERANCE["bf16"]
