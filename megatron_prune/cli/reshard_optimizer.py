"""``megatron-prune reshard-optimizer SAVE``: let a run continue at another TP or PP."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser


def parser() -> Parser:
    return Parser(
        "reshard-optimizer",
        "Lets a run continue at another TP or PP; another number of data-parallel ranks does not need this. Reads and "
        "writes the optimizer's state once, in bounded memory, and needs 12 more bytes per parameter on disk until "
        "that save is removed. If killed, start it again: the save is unchanged until it is done.",
        verbs.ReshardOptimizerSettings,
        example="megatron-prune reshard-optimizer runs/retrained",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.ReshardOptimizerSettings.of(parser().read(argv)[0])
    from megatron_prune.checkpoint.reshard import reshard

    directory = reshard(asked.save)
    what = "already" if directory is None else f"now ({directory.name})"
    print(f"{asked.save} loads at every layout {what}")
    return 0
