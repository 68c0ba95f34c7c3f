"""``torchrun … -m megatron_prune prune``: calibrate, plan and apply in one command; or sparsify."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli import mentions, prune_hf, structured
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.methods import options as methods
from megatron_prune.screen import say


def parser() -> Parser:
    return Parser(
        "prune",
        "Calibrates a checkpoint, chooses what to keep and writes the pruned checkpoint, loading the model once. A "
        "sparse method, or random with --pattern, zeroes weights and writes masks. sheared-llama first trains masks on "
        "--mask-tokens of --train-data-path, and takes the flags of pretrain. From Hugging Face to Hugging Face: "
        "see `megatron-prune prune --hf --help`.",
        verbs.PruneSettings,
        *methods.PRUNED.values(),
        methods=f"{structured.NAMES}; sparse: {', '.join(methods.SPARSE)}",
        mentioned=(
            mentions.LOAD, mentions.SAVE, *mentions.LAYOUT, mentions.FP8,
            mentions.SEED,
        ),
        example="""
megatron-prune prune --load checkpoints/parent --method minitron-width --ratio 0.25 \\
    --calibration-data-path data/calibration --save checkpoints/pruned""",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    if any(word.partition("=")[0] == "--hf" for word in argv):
        return prune_hf.main(argv)
    options, words = parser().read(argv)
    asked = verbs.PruneSettings.of(options)
    own = structured.own_settings(asked.method, options, methods.PRUNED)
    start_engine()
    from megatron_prune.cli import plan_table, sparsify
    from megatron_prune.pruning.prune import prune

    made = prune(asked, own, words)
    if made is None:
        return 0
    if made.plan is None:
        sparsify.report(made.sparsity or {}, str(made.save))
        return 0
    plan_table.show(made.plan)
    say(f"wrote {made.save}")
    return 0
