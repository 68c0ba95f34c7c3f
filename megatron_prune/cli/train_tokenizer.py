"""``megatron-prune train-tokenizer``: a SentencePiece tokenizer from text."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser


def parser() -> Parser:
    return Parser(
        "train-tokenizer",
        "Trains a SentencePiece tokenizer on text, with byte fallback, so that every text has tokens.",
        verbs.TrainTokenizerSettings,
        example="megatron-prune train-tokenizer --input text.jsonl --output tokenizer.model --vocab-size 4096",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.TrainTokenizerSettings.of(parser().read(argv)[0])
    from megatron_prune.data.train_tokenizer import train_tokenizer

    train_tokenizer(
        list(asked.input),
        asked.output,
        asked.vocab_size,
        model_type=asked.model_type,
        json_key=asked.json_keys,
        input_format=asked.input_format,
        max_bytes=asked.max_bytes,
    )
    print(f"{asked.output}: {asked.vocab_size} ids ({asked.model_type})")
    return 0
