"""``megatron-prune build-index``: build a token stream's index caches before the cluster starts."""

from __future__ import annotations

import json
from time import monotonic

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import UsageError


def parser() -> Parser:
    return Parser(
        "build-index",
        "Builds a token stream's index caches on one machine, and counts unique tokens. At the start of a run rank 0 "
        "would build them while all ranks wait, for ten minutes at most, which is too short for hundreds of billions "
        "of tokens.",
        verbs.BuildIndexSettings,
        example="megatron-prune build-index --data-path data/train --seq-length 2048 --stream-range 0:256000",
    )


def main(argv: list[str]) -> int:
    """Build the caches and print the stream's description as JSON."""
    asked = verbs.BuildIndexSettings.of(parser().read(argv)[0])
    if (asked.data_path is None) == (asked.train_data_path is None):
        got = "both" if asked.data_path else "neither"
        raise UsageError("--data-path, --train-data-path", got=got, expected="exactly one of them")
    from megatron_prune.data import coverage
    from megatron_prune.data.contamination import refuse_shared_documents
    from megatron_prune.data.streams import Stream, StreamRange, parse_range, refuse_overlap

    begun = monotonic()
    stream = Stream.build(
        list(asked.data_path or asked.train_data_path or ()),
        asked.seq_length,
        asked.stream_seed,
        asked.stream_epochs,
        asked.data_cache_path,
    )
    checked: list[list[int]] = []
    for text in asked.stream_range:
        start, end = parse_range(text)
        StreamRange(stream, start, end)
        for earlier in checked:
            refuse_overlap(
                {"stream": stream.describe(), "range": earlier},
                {"stream": stream.describe(), "range": [start, end]},
                (f"--stream-range {earlier[0]}:{earlier[1]}", f"--stream-range {text}"),
            )
        checked.append([start, end])
    refuse_shared_documents([corpus.prefix for corpus in stream.corpora], list(asked.held_out))
    ranges = [
        {"range": [start, end], "unique_tokens": coverage.count(stream, start, end, asked.data_cache_path)}
        for start, end in checked
    ]
    extra = {"tokens": len(stream) * stream.seq_length, "seconds": round(monotonic() - begun, 3), "ranges": ranges}
    print(json.dumps(stream.describe() | extra, indent=2))
    return 0
