"""``megatron-prune preprocess``: tokenize JSON lines, Parquet, array_record or text into Megatron's .bin and .idx."""

from __future__ import annotations

from typing import Any

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import UsageError


def parser() -> Parser:
    return Parser(
        "preprocess",
        "Tokenizes JSON lines, Parquet, text or a data set of the Hugging Face hub into Megatron's .bin and .idx. The "
        "files do not depend on the number of workers; a stopped run resumes.",
        verbs.PreprocessSettings,
        example="""
megatron-prune preprocess --input data/text/train.jsonl --output-prefix data/train --append-eod \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model""",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.PreprocessSettings.of(parser().read(argv)[0])
    if bool(asked.input) == bool(asked.dataset):
        got = "both" if asked.input else "neither"
        raise UsageError("--input, --dataset", got=got, expected="exactly one of them")
    from megatron_prune.data.preprocess import preprocess
    from megatron_prune.data.tokenizers import check_fits_checkpoint, load_tokenizer

    splitter = None
    if asked.split_sentences:
        from megatron_prune.data.chunks import load_splitter

        splitter = load_splitter(asked.lang, asked.nltk_data, asked.keep_newlines)
    elif asked.keep_newlines or asked.nltk_data:
        raise UsageError("--keep-newlines, --nltk-data", got="none", expected="--split-sentences with them")
    tokenizer = load_tokenizer(asked.tokenizer_type, asked.tokenizer_model, **_tiktoken(asked))
    if asked.checkpoint:
        from megatron_prune.checkpoint.layout import vocabulary
        from megatron_prune.checkpoint.reader import open_checkpoint

        checkpoint = open_checkpoint(asked.checkpoint)
        check_fits_checkpoint(tokenizer, checkpoint, vocabulary(checkpoint.args))
    inputs: Any = list(asked.input)
    if asked.dataset:
        from megatron_prune.data.hub import shards

        inputs = shards(asked.dataset, asked.dataset_split, asked.json_keys)
    made = preprocess(
        inputs,
        asked.output_prefix,
        tokenizer,
        json_key=asked.json_keys,
        input_format=asked.input_format,
        text_documents=asked.text_documents,
        append_eod=asked.append_eod,
        splitter=splitter,
        token_ids=asked.input_tokens,
        workers=asked.workers,
    )
    print(f"{asked.output_prefix}: {made}")
    return 0


def _tiktoken(asked: verbs.PreprocessSettings) -> dict[str, Any]:
    given = {
        "vocab_size": asked.vocab_size,
        "pattern": asked.tiktoken_pattern,
        "num_special_tokens": asked.tiktoken_num_special_tokens,
        "special_tokens": None if asked.tokenizer_special_tokens is None else list(asked.tokenizer_special_tokens),
    }
    return {name: value for name, value in given.items() if value is not None}
