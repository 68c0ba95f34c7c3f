"""``megatron-prune reshard-optimizer SAVE``: let a run go on at another TP or PP."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser


def parser() -> Parser:
    return Parser(
        "reshard-optimizer",
        "Lets a run go on at another TP or PP; another number of data-parallel ranks needs none of this. Reads and "
        "writes the optimizer's state once, in bounded memory, and takes 12 bytes per parameter more on the disk until "
        "that save is removed. Killed, start it again: until it is done the save is as it was.",
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
