"""``torchrun … -m megatron_prune teach``: what a teacher says on a range of a stream, for every run that distils."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli import mentions
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.screen import say


def parser() -> Parser:
    return Parser(
        "teach",
        "Runs a teacher once over a range of a token stream and writes its most probable next tokens to a cache, which "
        "every pretrain --teacher-cache on that range reads. A stopped run goes on with the same command.",
        verbs.TeachSettings,
        mentioned=(
            mentions.LOAD,
            (mentions.MODEL, "--train-data-path", "PREFIX …", "the corpora of the stream, as for pretrain"),
            (mentions.MODEL, "--seq-length", "S", "tokens per sample, as for pretrain"),
            (mentions.MODEL, "--micro-batch-size", "B", "samples per rank at a time (default: 1)"),
            *mentions.LAYOUT, mentions.FP8,
        ),
        example="""
torchrun --nproc-per-node 8 -m megatron_prune teach --load checkpoints/parent --train-data-path data/train \\
    --seq-length 2048 --stream-range 0:256000 --top-k 64 --output caches/parent""",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options, words = parser().read(argv)
    own = verbs.TeachSettings.of(options)
    start_engine()
    from megatron_prune.training.teach import teach

    made = teach(own, words)
    if made.tokens:
        say(f"taught {made.tokens:,} tokens in {made.seconds:.1f} s, {made.tokens / made.seconds:,.0f} tokens/s")
        say(f"wrote {made.folder}")
    return 0
