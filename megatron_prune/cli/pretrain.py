"""``torchrun … -m megatron_prune pretrain``: Megatron's own loop, with an account."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli import mentions
from megatron_prune.cli.parser import Parser, start_engine

RUN = "the run (Megatron's flags)"


def parser() -> Parser:
    return Parser(
        "pretrain",
        "Trains with Megatron's own loop, from random weights, a pruned checkpoint or the run's own last "
        "save, and keeps an account of it. All of Megatron's flags work as usual; listed are our own, and the few "
        "Megatron flags that every run needs.",
        verbs.PretrainSettings,
        mentioned=(
            (RUN, "--save", "RUN", "where the run is saved, with its account.json"),
            (RUN, "--load", "RUN", "the same folder: a stopped run resumes from its last save"),
            (RUN, "--pretrained-checkpoint", "CKPT", "weights to start from, such as what apply wrote"),
            (RUN, "--data-path", "PREFIX …", "tokenized corpora, without .bin; or WEIGHT PREFIX …"),
            (RUN, "--seq-length", "S", "tokens per sample"),
            (RUN, "--global-batch-size", "B", "samples per step"),
            (RUN, "--micro-batch-size", "b", "samples per rank at a time"),
            (RUN, "--train-iters", "N", "steps; follows from --stream-range where that is given"),
            (RUN, "--lr", "LR", "learning rate; --lr-decay-style, --lr-warmup-fraction, --min-lr"),
            (RUN, "--seed", "N", "seed of initial weights and dropout"),
            *mentions.TOKENIZER, *mentions.LAYOUT, mentions.SHAPE_FROM, mentions.FP8,
        ),
        example="""
torchrun --nproc-per-node 8 -m megatron_prune pretrain --pretrained-checkpoint checkpoints/pruned \\
    --load runs/retrained --save runs/retrained --data-path data/train --seq-length 2048 \\
    --global-batch-size 256 --micro-batch-size 4 --stream-range 0:256000 --lr 3e-4""",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Train; returns 0 if the run is complete, even if it already was."""
    options, words = parser().read(argv)
    own = verbs.PretrainSettings.of(options)
    start_engine()
    from megatron_prune.training.pretrain import train

    return train(own, words)
