"""A pruned checkpoint in a checkout's own, unmodified ``pretrain_gpt.py``, with the flags that ``inspect`` prints.

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

from megatron_prune.checkpoint.reader import open_checkpoint
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


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_trains_there_as_here(
    checkout: Path, job: Callable[..., Any], tiny_hf: Callable[..., Path], tiny_corpus: Path, tmp_path: Path, case: str
) -> None:
    model, sizes, tp = CASES[case]
    parent = import_hf(tiny_hf(model, layers=3, vocab_size=384), tmp_path / "parent")  # unpadded: there padding counts
    apply.apply_plan(parent.root, make(parent, "random", **sizes), tmp_path / "pruned")
    pruned = open_checkpoint(tmp_path / "pruned")
    printed_flags = [word for flag in inspect.flags(pruned) for word in flag.split()]
    assert ("--use-rope-scaling" in printed_flags) == (case == "rope-tp2") and inspect.warnings(pruned) == []
    flags = ["--load", str(pruned.root), "--use-checkpoint-args", *printed_flags, "--data-path", str(tiny_corpus)]
    flags += [*RECIPE, "--tensor-model-parallel-size", str(tp)]

    ours = job(["pretrain", *flags, "--save", tmp_path / "ours"], nproc=tp).ok().output
    theirs = run_theirs(checkout, [*flags, "--save", str(tmp_path / "theirs")], tp, port=29600 + os.getpid() % 1000)
    assert len(losses(theirs)) == STEPS and losses(theirs) == losses(ours)

    saved = open_checkpoint(tmp_path / "theirs")
    assert (saved.iteration, saved.shape) == (STEPS, pruned.shape)
    assert saved.full_hash() == open_checkpoint(tmp_path / "ours").full_hash() != pruned.full_hash()
    export_hf(saved.root, tmp_path / "hf")
