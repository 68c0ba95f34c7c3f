"""``megatron-prune apply``: cut a parent checkpoint according to a plan."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser


def parser() -> Parser:
    return Parser(
        "apply",
        "Cuts a checkpoint according to a plan and writes the smaller one. Weights are streamed, so memory stays small "
        "whatever the model's size; masks next to the parent are cut too.",
        verbs.ApplySettings,
        example="megatron-prune apply --load checkpoints/parent --plan plan.json --save checkpoints/pruned",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options, _ = parser().read(argv)
    asked = verbs.ApplySettings.of(options)
    from megatron_prune.structured.apply import apply

    made = apply(asked)
    print(f"wrote {asked.save}: {made.target.parameters():,} of {made.source.parameters():,} parameters")
    return 0
