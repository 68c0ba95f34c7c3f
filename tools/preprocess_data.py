#!/usr/bin/env python3
"""Tokenize JSON lines, Parquet or text into Megatron's .bin/.idx (megatron_prune/data/preprocess.py)."""

from __future__ import annotations

import argparse
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter as Defaults
from typing import Any

from megatron_prune.data import readers
from megatron_prune.data.tokenizers import TYPES
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError, UsageError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Defaults)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON lines, Parquet or text, perhaps .gz or .zst, in order; a run that was stopped keeps those finished",
    )
    add("--dataset", metavar="NAME[:CONFIG]", help="a data set of the Hugging Face hub or a folder, streamed")
    add("--dataset-split", default="train", help="the split of --dataset")
    add("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    add("--tokenizer-type", required=True, help=", ".join(TYPES))
    add("--tokenizer-model", required=True, help="directory with tokenizer.json, a .model file, a tiktoken .json")
    add("--vocab-size", type=int, help="TikTokenizer: ids, special ones included (Megatron's default: 131072)")
    add("--tiktoken-pattern", choices=("v1", "v2"), help="TikTokenizer: how text is cut (Megatron's default: v2)")
    add("--tiktoken-num-special-tokens", type=int, help="TikTokenizer: ids before the ranks (default: 1000)")
    add("--tokenizer-special-tokens", nargs="+", metavar="TOKEN", help="TikTokenizer: names of the first ids")
    add("--checkpoint", metavar="CKPT", help="refuse a tokenizer that does not fit this checkpoint")
    add("--append-eod", action="store_true", help="end every document with the end-of-document id")
    add(
        "--split-sentences",
        action="store_true",
        help="a document's sentences (NLTK's Punkt) become its sequences, as in Megatron; for BERT-like training: "
        "GPT data sets shuffle sequences",
    )
    add("--keep-newlines", action="store_true", help="sentences keep the white space that follows them")
    add("--lang", default="english", help="Punkt model of --split-sentences")
    add("--nltk-data", metavar="DIR", help="folder with tokenizers/punkt_tab (else where NLTK looks)")
    add("--workers", type=int, default=1, help="processes; the files do not depend on their number")
    add("--json-keys", default="text", metavar="KEY", help="the key of a JSON line, or the column, with the text")
    add("--input-format", choices=readers.FORMATS, default="auto", help="auto goes by the endings")
    add("--text-documents", choices=readers.DOCUMENTS, default="file", help="what a document in a text file is")
    return parser.parse_args(argv)


def tiktoken_settings(args: argparse.Namespace) -> dict[str, Any]:
    given = {
        "vocab_size": args.vocab_size,
        "pattern": args.tiktoken_pattern,
        "num_special_tokens": args.tiktoken_num_special_tokens,
        "special_tokens": args.tokenizer_special_tokens,
    }
    return {name: value for name, value in given.items() if value is not None}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    warnings.filterwarnings("ignore", module="megatron")  # what it lacks for training is of no interest here
    try:
        from megatron_prune.data.preprocess import preprocess
        from megatron_prune.data.tokenizers import check_fits_checkpoint, load_tokenizer

        if bool(args.input) == bool(args.dataset):
            raise UsageError("--input, --dataset", got="both or neither", expected="exactly one of them")
        splitter = None
        if args.split_sentences:
            from megatron_prune.data.chunks import load_splitter

            splitter = load_splitter(args.lang, args.nltk_data, args.keep_newlines)
        elif args.keep_newlines or args.nltk_data:
            raise UsageError("--keep-newlines, --nltk-data", got="none", expected="--split-sentences with them")
        tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model, **tiktoken_settings(args))
        if args.checkpoint:
            from megatron_prune.checkpoint.layout import vocabulary
            from megatron_prune.checkpoint.reader import open_checkpoint

            checkpoint = open_checkpoint(args.checkpoint)
            check_fits_checkpoint(tokenizer, checkpoint, vocabulary(checkpoint.args))
        inputs = args.input
        if args.dataset:
            from megatron_prune.data.hub import shards

            inputs = shards(args.dataset, args.dataset_split, args.json_keys)
        made = preprocess(
            inputs,
            args.output_prefix,
            tokenizer,
            json_key=args.json_keys,
            input_format=args.input_format,
            text_documents=args.text_documents,
            append_eod=args.append_eod,
            splitter=splitter,
            workers=args.workers,
        )
    except MegatronPruneError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(f"{args.output_prefix}: {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
