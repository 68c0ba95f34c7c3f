"""``torchrun … -m megatron_prune learn-masks``: Sheared-LLaMA's masks, trained on a parent towards a target shape.

It is ``pretrain`` with a target. ``plan --method sheared-llama`` then makes the plan, and ``apply`` cuts the model.
"""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli import mentions
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.cli.pretrain import RUN


def parser() -> Parser:
    return Parser(
        "learn-masks",
        "Trains a checkpoint together with masks on its layers, heads and channels, until the unmasked part has "
        "the requested size. Writes the weights and learned_masks.safetensors, which plan reads. Every flag of "
        "pretrain works too.",
        verbs.LearnMasksSettings,
        mentioned=(
            (RUN, "--pretrained-checkpoint", "CKPT", "the parent, whose weights are trained too"),
            (RUN, "--use-checkpoint-args", None, "take the model's arguments from that checkpoint"),
            (RUN, "--save", "RUN", "where weights and masks are saved, with an account.json"),
            (RUN, "--load", "RUN", "the same folder: a stopped run resumes from its last save, at any layout"),
            (RUN, "--data-path", "PREFIX …", "tokenized corpora, without .bin; or WEIGHT PREFIX …"),
            (RUN, "--seq-length", "S", "tokens per sample"),
            (RUN, "--global-batch-size", "B", "samples per step; the paper has few, and 3,200 steps"),
            (RUN, "--micro-batch-size", "b", "samples per rank at a time, under one draw of the masks"),
            (RUN, "--lr", "LR", "weights, 1e-4 in the paper; --lr-decay-style, --lr-warmup-fraction, --min-lr"),
            *mentions.LAYOUT,
        ),
        example="""
torchrun --nproc-per-node 8 -m megatron_prune learn-masks --pretrained-checkpoint checkpoints/parent \\
    --use-checkpoint-args --load runs/masked --save runs/masked --ratio 0.5 --data-path data/train --seq-length 4096 \\
    --global-batch-size 32 --micro-batch-size 4 --stream-range 0:102400 --lr 1e-4 --min-lr 1e-5 --adam-beta2 0.95""",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Learn masks; 0 when the run is complete, also when it was so before."""
    options, words = parser().read(argv)
    own = verbs.LearnMasksSettings.of(options)
    start_engine()
    from megatron_prune.pruning.learn_masks import learn_masks

    return learn_masks(own, words)
