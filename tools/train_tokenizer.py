#!/usr/bin/env python3
"""Train a SentencePiece tokenizer on text; the work is in megatron_prune/data/train_tokenizer.py."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentDefaultsHelpFormatter as Defaults

from megatron_prune.data import readers, train_tokenizer
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Defaults)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, Parquet or text, .gz, .zst or not")
    add("--output", required=True, metavar="FILE.model", help="the SentencePiece model to write")
    add("--vocab-size", type=int, required=True, help="number of ids, special ones and 256 bytes included")
    add("--model-type", choices=train_tokenizer.MODEL_TYPES, default="bpe", help="kind of model")
    add("--json-keys", default="text", metavar="KEY", help="the key of a JSON line that holds the text")
    add("--input-format", choices=readers.FORMATS, default="auto", help="auto goes by the endings")
    add("--max-bytes", type=int, help="learn from no more than this much text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        train_tokenizer.train_tokenizer(
            args.input,
            args.output,
            args.vocab_size,
            model_type=args.model_type,
            json_key=args.json_keys,
            input_format=args.input_format,
            max_bytes=args.max_bytes,
        )
    except MegatronPruneError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(f"{args.output}: {args.vocab_size} ids ({args.model_type})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
