#!/usr/bin/env python3
"""Let a run go on at another TP or PP; the work is in megatron_prune/checkpoint/reshard.py.

    reshard_optimizer.py SAVE        the newest save of a run, or one of its iter_… folders

Needs no GPU. Reads and writes the optimizer's state once, in bounded memory, and takes 12 bytes a parameter more on
the disk until that save is removed. Killed, start it again; until it is done the save is as it was. Another number of
data-parallel ranks needs none of this.
"""

from __future__ import annotations

import argparse
import sys

from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("save", metavar="SAVE", help="what pretrain was given as --save")
    args = parser.parse_args(argv)
    try:
        from megatron_prune.checkpoint.reshard import reshard

        directory = reshard(args.save)
    except MegatronPruneError as error:
        print(f"reshard_optimizer: {error}", file=sys.stderr)
        return EXIT_REFUSED
    what = "already" if directory is None else f"now ({directory.name})"
    print(f"{args.save} loads at every layout {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
