#!/usr/bin/env python3
"""Gather English text that is on this machine into JSON lines (megatron_prune/data/local_text.py)."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter as Defaults

from megatron_prune.data import local_text
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError, UsageError


def shares(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError("--split", got=text, expected="four positive shares, such as 94,2,2,2") from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Defaults)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="gets train, calibration, validation and test .jsonl")
    add("--max-bytes", type=int, default=16_000_000, help="stop after this much text; 0 takes all there is")
    add("--split", default=",".join(map(str, local_text.SHARES)), help="shares of the four splits")
    add("--longest-held-out", type=int, default=0, metavar="CHARACTERS", help="of a document of the last three; 0: all")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; the files do not depend on them")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        manifest = local_text.build_corpus(
            args.output,
            max_bytes=args.max_bytes or None,
            shares=shares(args.split),
            longest_held_out=args.longest_held_out or None,
            workers=args.workers,
        )
    except MegatronPruneError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return EXIT_REFUSED
    sizes = ", ".join(
        f"{name} {s['bytes'] / 1e6:.2f} MB of {s['documents']} documents" for name, s in manifest["splits"].items()
    )
    print(f"{args.output}: {sizes} in {manifest['seconds']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
