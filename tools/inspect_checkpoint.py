#!/usr/bin/env python3
"""Show what a Megatron checkpoint holds; the work is in megatron_prune/convert/inspect.py."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint, or one of its iter_… or release directories")
    add("--json", action="store_true", help="print JSON instead of a tree")
    add("--sparsity", action="store_true", help="count exact zeros (reads every weight once)")
    add("--full-hash", action="store_true", help="hash every number of every weight, whatever the layout")
    add("--verify-integrity", action="store_true", help="check every file's SHA-256 against integrity.json first")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        from megatron_prune.checkpoint.reader import open_checkpoint
        from megatron_prune.convert import inspect

        checkpoint = open_checkpoint(args.checkpoint)
        if args.verify_integrity:
            checkpoint.verify(hashes=True)
        found = inspect.describe(checkpoint, sparsity=args.sparsity, full_hash=args.full_hash)
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            inspect.show(found, inspect.warnings(checkpoint))
    except MegatronPruneError as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
