"""``torchrun … -m megatron_prune sparsify``: zero weights of a checkpoint block by block and write masks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from megatron_prune import screen, verbs
from megatron_prune.cli import mentions
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.methods import options as methods
from megatron_prune.screen import say
from megatron_prune.settings import value_of


def parser() -> Parser:
    return Parser(
        "sparsify",
        "Zeroes weights of a checkpoint and writes it in the same shape, with masks that mark them. magnitude and "
        "random use only the weights; wanda and sparsegpt read calibration text, block by block.",
        verbs.SparsifySettings,
        methods=", ".join(methods.SPARSE),
        mentioned=(
            mentions.LOAD, mentions.SAVE, *mentions.LAYOUT, mentions.FP8,
            mentions.SEED,
        ),
        example="""
megatron-prune sparsify --load checkpoints/parent --method wanda --pattern 2:4 \\
    --calibration-data-path data/calibration --save checkpoints/sparse""",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options, words = parser().read(argv)
    own = verbs.SparsifySettings.of(options)
    start_engine()
    from megatron_prune.pruning.sparsify import sparsify

    table = sparsify(own, words)
    if table is not None:
        report(table, value_of(words, "--save") or "")
    return 0


def report(table: dict[str, Any], save: str) -> None:
    """Print what was removed and where the result is."""
    if not table:
        say(f"{save}: this pruning is complete; nothing to do")
        return
    show(table)
    say(f"wrote {save}")


def show(table: dict[str, Any]) -> None:
    """Print what was removed, summed over layers."""
    from rich.table import Table

    sums: dict[str, list[Any]] = defaultdict(lambda: [0, 0, []])
    for row in table["matrices"]:
        found = sums[row["matrix"]]
        found[0] += row["removed"]
        found[1] += row["rows"] * row["inputs"]
        found[2] += [row["error"]] if row["error"] is not None else []
    printed = Table(title=f"{table['method']}, {table['pattern']}")
    for column in ("matrix", "weights", "removed", "relative error (mean, most)"):
        printed.add_column(column, justify="left" if column == "matrix" else "right")
    for name, (removed, size, errors) in sums.items():
        error = f"{sum(errors) / len(errors):.4f}, {max(errors):.4f}" if errors else "–"
        printed.add_row(name, f"{size:,}", f"{removed / size:.2%}", error)
    screen.console(width=110, highlight=False).print(printed)
