"""Train a SentencePiece tokenizer on files: the same files and settings give the same bytes.

The settings are Llama's: no Unicode normalization, all blanks kept, byte fallback, and digits split, so
decoding restores the text exactly. Ids: 0 unknown, 1 <s>, 2 </s> (the end of a document), 3 <pad>.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_prune import artifacts
from megatron_prune.data.readers import check_inputs, records, text_of
from megatron_prune.errors import DataError, MegatronPruneError, UsageError

MODEL_TYPES = ("bpe", "unigram")
SMALLEST_VOCABULARY = 4 + 256 + 1  # special ids, bytes, and something to learn
LONGEST_LINE = 16384  # bytes; SentencePiece ignores longer lines


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    model_type: str = "bpe",
    json_key: str = "text",
    input_format: str = "auto",
    max_bytes: int | None = None,
) -> None:
    """Write the SentencePiece model ``output`` with exactly ``vocab_size`` ids.

    ``max_bytes`` limits the training text (100 MB are enough for a tokenizer). Raises UsageError, and
    DataError if there is too little text for the vocabulary.
    """
    import sentencepiece

    paths = check_inputs(inputs, input_format)
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError("--vocab-size", got=vocab_size, expected=f"at least {SMALLEST_VOCABULARY}")
    if model_type not in MODEL_TYPES:
        raise UsageError("--model-type", got=model_type, expected="one of " + ", ".join(MODEL_TYPES))
    artifacts.refuse_unwritable("--output", output)
    model, refused = io.BytesIO(), list[MegatronPruneError]()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_kept(_lines(paths, json_key, input_format, max_bytes), refused),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentence_length=LONGEST_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # the result would depend on the number of threads
            minloglevel=1,
        )
    except RuntimeError as error:
        if refused:  # SentencePiece wraps it into its own error, with a traceback in the text
            raise refused[0] from error
        raise DataError(f"SentencePiece cannot learn {vocab_size} pieces from this text: {error}") from error
    artifacts.write_bytes(output, model.getvalue())


def _kept(lines: Iterator[str], refused: list[MegatronPruneError]) -> Iterator[str]:
    """``lines``; an error of reading goes to ``refused`` on its way."""
    try:
        yield from lines
    except MegatronPruneError as error:
        refused.append(error)
        raise


def _lines(paths: list[Path], json_key: str, input_format: str, max_bytes: int | None) -> Iterator[str]:
    seen = 0
    for record in records(paths, json_key=json_key, input_format=input_format):
        for line in text_of(record).split("\n"):
            if line.strip():
                yield line
                seen += len(line.encode()) + 1
                if max_bytes is not None and seen >= max_bytes:
                    return
