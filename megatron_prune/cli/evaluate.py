"""``torchrun … -m megatron_prune evaluate``: loss and perplexity of a checkpoint on fixed windows; lm-eval's tasks."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli import mentions
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.screen import say


def parser() -> Parser:
    return Parser(
        "evaluate",
        "Scores a checkpoint on fixed windows of tokenized corpora, the same for every checkpoint and layout, and "
        "writes losses and perplexities. With --tasks it also runs lm-eval tasks, with the model loaded once.",
        verbs.EvaluateSettings,
        mentioned=(
            mentions.LOAD,
            (mentions.MODEL, "--data-path", "PREFIX …", "tokenized corpora, without .bin"),
            (mentions.MODEL, "--seq-length", "S", "tokens per window"),
            (mentions.MODEL, "--micro-batch-size", "B", "windows per batch (default: 1)"),
            *mentions.TOKENIZER, *mentions.LAYOUT, mentions.FP8,
        ),
        example="""
megatron-prune evaluate --load checkpoints/pruned --seq-length 2048 \\
    --data-path data/validation data/test --labels validation test --output scores.json""",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options, words = parser().read(argv)
    own = verbs.EvaluateSettings.of(options)
    start_engine()
    from megatron_prune.evaluation.evaluate import evaluate

    scores = evaluate(own, words)
    for label, found in scores["corpora"].items():
        say(
            f"{label}: loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f} "
            f"over {found['predictions']:,} predictions"
        )
    say(f"wrote {own.output}")
    return 0
