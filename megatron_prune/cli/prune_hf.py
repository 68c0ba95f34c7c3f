"""``megatron-prune prune --hf HF --method M --out OUT``: from Hugging Face to Hugging Face in one command."""

from __future__ import annotations

import contextlib

from megatron_prune import verbs
from megatron_prune.cli import structured
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.methods import options as methods


def parser() -> Parser:
    return Parser(
        "prune",
        "Imports a Hugging Face model, prunes it, optionally retrains it, and writes a Hugging Face directory. Its "
        "perplexity on held-out text is measured before and after. If killed, run the same command to resume.",
        verbs.PruneHFSettings,
        *methods.ONE_LINE.values(),
        methods=f"structured: {structured.NAMES}; sparse: {', '.join(methods.SPARSE)}",
        example="megatron-prune prune --hf HuggingFaceTB/SmolLM2-135M --method wanda --pattern 2:4 --out pruned",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options, _ = parser().read(argv)
    verbs.PruneHFSettings.of(options)  # reports missing flags
    start_engine()
    from rich.console import Console

    from megatron_prune.api.prune_checkpoint import prune

    console = Console(highlight=False, soft_wrap=True)

    def during(stage: str) -> contextlib.AbstractContextManager[object]:
        return console.status(f"{stage} …") if console.is_terminal else contextlib.nullcontext()

    made = prune(**vars(options), tell=lambda line: console.print(line, markup=False), during=during)
    console.print(repr(made), markup=False)
    return 0
