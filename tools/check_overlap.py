#!/usr/bin/env python3
"""Look for documents that the corpora of different stages share (megatron_prune/data/contamination.py).

Every corpus is given by its prefix, as tools/preprocess_data.py made it; all by one tokenizer. Leaves
with 2 when two stages share more documents than allowed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter as Defaults

from megatron_prune import artifacts
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError

STAGES = ("train", "calibration", "validation", "test")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Defaults)
    add = parser.add_argument
    for stage in STAGES:
        add(f"--{stage}", nargs="+", default=[], metavar="PREFIX", help=f"corpora of {stage}")
    add("--similarity", type=float, default=0.8, help="Jaccard index of 5-token shingles of near documents")
    add(
        "--max-duplicates",
        type=float,
        default=0.0,
        help="share of the smaller corpus's documents that may be in the other",
    )
    add("--max-near-duplicates", type=float, default=0.0, help="share that may be near one, exact ones not counted")
    add("--json", metavar="FILE", help="write the report here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    warnings.filterwarnings("ignore", module="megatron")
    try:
        from megatron_prune.data import contamination

        report = contamination.compare_stages(
            {stage: getattr(args, stage) for stage in STAGES if getattr(args, stage)},
            similarity=args.similarity,
            max_duplicates=args.max_duplicates,
            max_near_duplicates=args.max_near_duplicates,
        )
        if args.json:
            artifacts.write_json(args.json, report)
        for found in report["pairs"]:
            print(contamination.line(found))
        contamination.refuse(report)
    except MegatronPruneError as error:
        print(f"check_overlap: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
