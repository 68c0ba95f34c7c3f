"""Our ``pretrain`` is Megatron's loop: the same losses, bit for bit, as a bare script around it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from tests.training.small import MODEL, any_plan

FLAGS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine "
    "--weight-decay 0.1 --seed 7 --log-interval 1 --eval-iters 0 --eval-interval 100 --train-iters 6 --num-workers 0 "
    "--tokenizer-type NullTokenizer --vocab-size 384 --split 100,0,0"
).split()


def bare_losses(argv: list[str]) -> list[float]:
    """Losses of the bare script in this rank, before Megatron rounds them for its log."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron.training import training

    from tests.benchmarks import bare_pretrain

    losses: list[float] = []
    original = training.training_log

    def listening(loss_dict, *rest, **named):
        losses.append(loss_dict["lm loss"].item())
        return original(loss_dict, *rest, **named)

    training.training_log = listening
    bare_pretrain.main(argv)
    return losses


@pytest.mark.parametrize("more", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_losses_equal_a_bare_script(tiny_corpus, tmp_path, job, distributed, more):
    argv = [*MODEL, *FLAGS, "--data-path", str(tiny_corpus), "--data-cache-path", str(tmp_path / "cache"), *more]
    expected = distributed(bare_losses, 1, argv)[0]
    save = tmp_path / "run"
    job(["pretrain", *argv, "--save", save]).ok()
    with open(Path(save) / "losses.csv") as table:
        found = [float(row["loss"]) for row in csv.DictReader(table)]
    assert found == expected and len(found) == 6 and found[-1] < found[0]


def test_a_bare_script_trains_a_pruned_checkpoint_on_another_layout(
    tiny_parent, tiny_corpus, tmp_path, job, distributed
):
    """Megatron alone: ``--load --use-checkpoint-args --finetune`` at TP=2 gives the losses of our run at TP=1."""
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.convert import inspect
    from megatron_prune.structured.apply import apply_plan

    pruned, save = tmp_path / "pruned", tmp_path / "run"
    apply_plan(tiny_parent, any_plan(open_checkpoint(tiny_parent)), pruned)
    forgotten = [word for flag in inspect.flags(open_checkpoint(pruned)) for word in flag.split()]
    # The last --vocab-size counts: Megatron's loss knows no padding.
    argv = [*forgotten, *FLAGS, "--use-checkpoint-args", "--data-path", str(tiny_corpus)]
    argv += ["--data-cache-path", str(tmp_path / "c")]
    job(["pretrain", *argv, "--pretrained-checkpoint", pruned, "--save", save]).ok()
    with open(save / "losses.csv") as table:
        ours = [float(row["loss"]) for row in csv.DictReader(table)]
    bare = distributed(
        bare_losses, 2, [*argv, "--load", str(pruned), "--finetune", "--tensor-model-parallel-size", "2"]
    )
    np.testing.assert_allclose(bare[-1], ours, rtol=2e-5)
    assert ours[0] > ours[-1]
