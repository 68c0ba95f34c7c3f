#!/usr/bin/env python3
"""Tokenize JSON lines or plain text into Megatron's .bin/.idx (megatron_prune/data/preprocess.py)."""

from __future__ import annotations

import argparse
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter as Defaults

from megatron_prune.data import text
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Defaults)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSON lines or text, gzip or not, in order")
    add("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    add("--tokenizer-type", required=True, help="HuggingFaceTokenizer or SentencePieceTokenizer")
    add("--tokenizer-model", required=True, help="directory with tokenizer.json, or a .model file")
    add("--checkpoint", metavar="CKPT", help="refuse a tokenizer that does not fit this checkpoint")
    add("--append-eod", action="store_true", help="end every document with the end-of-document id")
    add("--workers", type=int, default=1, help="processes; the files do not depend on their number")
    add("--json-keys", default="text", metavar="KEY", help="the key of a JSON line that holds the text")
    add("--input-format", choices=text.FORMATS, default="auto", help="auto goes by the names")
    add("--text-documents", choices=text.DOCUMENTS, default="file", help="what a document in a text file is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    warnings.filterwarnings("ignore", module="megatron")  # what it lacks for training is of no interest here
    try:
        from megatron_prune.data.preprocess import preprocess
        from megatron_prune.data.tokenizers import check_fits_checkpoint, load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model)
        if args.checkpoint:
            from megatron_prune.checkpoint.reader import open_checkpoint

            check_fits_checkpoint(tokenizer, open_checkpoint(args.checkpoint))
        made = preprocess(
            args.input,
            args.output_prefix,
            tokenizer,
            json_key=args.json_keys,
            input_format=args.input_format,
            text_documents=args.text_documents,
            append_eod=args.append_eod,
            workers=args.workers,
        )
    except MegatronPruneError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(f"{args.output_prefix}: {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
