"""``megatron_prune index``: build a token stream's index caches before the cluster starts, and count unique tokens.

Under a process group rank 0 builds them while everybody waits, ten minutes at most; for hundreds of
billions of tokens it takes longer than that. Run here, on one machine and without a process group,
with the flags of the training run, the caches are found by it. So is the number of unique tokens of each
--stream-range that reaches over several epochs. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import warnings
from time import monotonic

from megatron_prune.errors import UsageError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron_prune index", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--data-path", nargs="+", metavar="PREFIX", help="as for pretrain: PREFIX…, or WEIGHT PREFIX …")
    add("--train-data-path", nargs="+", metavar="PREFIX", help="the same, by pretrain's other name")
    add("--seq-length", type=int, required=True)
    add("--stream-seed", type=int, default=1234, help="pretrain's (default: %(default)s)")
    add("--stream-epochs", type=int, default=1, help="pretrain's (default: %(default)s)")
    add("--data-cache-path", help="where the caches go (default: beside the first prefix)")
    add(
        "--stream-range",
        metavar="START:END",
        action="append",
        default=[],
        help="also check that the stream has these samples, and count their unique tokens, which a run over several "
        "epochs would otherwise count at its start; repeated, that the ranges are disjoint",
    )
    add(
        "--held-out",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="also check that no document of these corpora (calibration, validation, test) is in the stream's",
    )
    return parser.parse_args(argv)  # fmt: skip


def main(argv: list[str]) -> int:
    """Build the caches and print the stream's description as JSON."""
    args = parse(argv)
    if (args.data_path is None) == (args.train_data_path is None):
        raise UsageError("--data-path, --train-data-path", got="both or neither", expected="exactly one of them")
    warnings.filterwarnings("ignore", module="megatron")
    from megatron_prune.data import coverage
    from megatron_prune.data.contamination import refuse_shared_documents
    from megatron_prune.data.streams import SampleRange, Stream, parse_range, refuse_overlap

    begun = monotonic()
    stream = Stream.build(
        args.data_path or args.train_data_path,
        args.seq_length,
        args.stream_seed,
        args.stream_epochs,
        args.data_cache_path,
    )
    checked: list[list[int]] = []
    for text in args.stream_range:
        start, end = parse_range(text)
        SampleRange(stream, start, end)
        for earlier in checked:
            refuse_overlap(
                {"stream": stream.describe(), "range": earlier},
                {"stream": stream.describe(), "range": [start, end]},
                (f"--stream-range {earlier[0]}:{earlier[1]}", f"--stream-range {text}"),
            )
        checked.append([start, end])
    refuse_shared_documents([corpus.prefix for corpus in stream.corpora], args.held_out)
    ranges = [
        {"range": [start, end], "unique_tokens": coverage.count(stream, start, end, args.data_cache_path)}
        for start, end in checked
    ]
    extra = {"tokens": len(stream) * stream.seq_length, "seconds": round(monotonic() - begun, 3), "ranges": ranges}
    print(json.dumps(stream.describe() | extra, indent=2))
    return 0
