"""Pruned and distilled checkpoints in a checkout's own, unmodified ``pretrain_gpt.py``, with flags from ``inspect``.

``MEGATRON_LM`` names the checkout (Megatron-LM's main branch). Its losses must be those of our ``pretrain`` on the
installed wheel, step by step, from the same checkpoint on the same data; its saves must be readable here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.convert import inspect
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.structured import apply
from tests.structured.test_apply import make
from tests.waiting import GENEROUS

LAUNCHER = Path(__file__).with_name("run_pretrain_gpt.py")
STEPS = 3
RECIPE = (
    f"--finetune --split 100,0,0 --seq-length 64 --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} "
    "--lr 1e-3 --eval-iters 0 --eval-interval 100 --log-interval 1 --tokenizer-type NullTokenizer --num-workers 0 "
    f"--seed 5 --save-interval {STEPS}"
).split()
# model, cut, tensor parallelism
CASES = {
    "width": ("llama-gqa", {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4}, 1),
    "rope-tp2": ("llama-mha-rope", {"num_layers": 2}, 2),
}


@pytest.fixture
def checkout() -> Path:
    found = os.environ.get("MEGATRON_LM")
    if not found or not (Path(found) / "pretrain_gpt.py").is_file():
        pytest.skip("MEGATRON_LM names no checkout of Megatron-LM")
    return Path(found)


def run_theirs(checkout: Path, flags: list[str], nproc: int, port: int) -> str:
    """``pretrain_gpt.py`` on ``nproc`` ranks; the output of the last one."""
    shared = {**os.environ, "MEGATRON_LM": str(checkout), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(nproc), "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(LAUNCHER), *flags], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(nproc)
    ]  # fmt: skip
    printed = [rank.communicate(timeout=GENEROUS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * nproc, printed[-1][-3000:]
    return printed[-1]


def losses(printed: str) -> list[tuple[str, str]]:
    """(Loss, gradient norm) of every step, as printed."""
    return re.findall(r"lm loss: (\S+) .*?grad norm: (\S+)", printed)


def check_it_trains_there_as_here(
    checkout: Path, job: Callable[..., Any], checkpoint: Checkpoint, corpus: Path, folder: Path, tp: int
) -> list[str]:
    """The flags that ``inspect`` prints for the checkpoint, with which both ended with the same weights."""
    printed_flags = [word for flag in inspect.flags(checkpoint) for word in flag.split()]
    assert inspect.warnings(checkpoint) == []
    flags = ["--load", str(checkpoint.root), "--use-checkpoint-args", *printed_flags, "--data-path", str(corpus)]
    flags += [*RECIPE, "--tensor-model-parallel-size", str(tp)]

    ours = job(["pretrain", *flags, "--save", folder / "ours"], nproc=tp).ok().output
    theirs = run_theirs(checkout, [*flags, "--save", str(folder / "theirs")], tp, port=29600 + os.getpid() % 1000)
    assert len(losses(theirs)) == STEPS and losses(theirs) == losses(ours)

    saved = open_checkpoint(folder / "theirs")
    assert (saved.iteration, saved.shape) == (STEPS, checkpoint.shape)
    assert saved.full_hash() == open_checkpoint(folder / "ours").full_hash() != checkpoint.full_hash()
    export_hf(saved.root, folder / "hf")
    return printed_flags


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_trains_there_as_here(
    checkout: Path, job: Callable[..., Any], tiny_hf: Callable[..., Path], tiny_corpus: Path, tmp_path: Path, case: str
) -> None:
    model, sizes, tp = CASES[case]
    parent = import_hf(tiny_hf(model, layers=3, vocab_size=384), tmp_path / "parent")  # unpadded: there padding counts
    apply.apply_plan(parent.root, make(parent, "random", **sizes), tmp_path / "pruned")
    flags = check_it_trains_there_as_here(
        checkout, job, open_checkpoint(tmp_path / "pruned"), tiny_corpus, tmp_path, tp
    )
    assert ("--use-rope-scaling" in flags) == (case == "rope-tp2")


@pytest.mark.slow
def test_a_distilled_one_does(
    checkout: Path, job: Callable[..., Any], tiny_hf: Callable[..., Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    """Distilled with matched hidden states, whose projections must not be in the checkpoint."""
    parent = import_hf(tiny_hf("llama-gqa", layers=3, vocab_size=384), tmp_path / "parent")
    apply.apply_plan(parent.root, make(parent, "random", **CASES["width"][1]), tmp_path / "pruned")
    distil = ["--pretrained-checkpoint", tmp_path / "pruned", "--objective", "distill", "--teacher", parent.root]
    distil += ["--distill-hidden-states", "2:2", "--data-path", tiny_corpus, *RECIPE[1:]]
    job(["pretrain", *distil, "--save", tmp_path / "distilled"]).ok()
    distilled = open_checkpoint(tmp_path / "distilled")
    assert distilled.full_hash() != open_checkpoint(tmp_path / "pruned").full_hash()
    check_it_trains_there_as_here(checkout, job, distilled, tiny_corpus, tmp_path, 1)
