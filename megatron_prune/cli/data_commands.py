"""The verbs for text and tokenized data, from gathering it to the index caches of a token stream."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from time import monotonic
from typing import Any

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import UsageError


def build_corpus_parser() -> Parser:
    return Parser(
        "build-corpus",
        "Gathers English text from this machine (documentation, licences, manuals), and from packages that are fetched "
        "for their text, into JSON lines, split into training, calibration, validation and test, with no document in "
        "two splits. Meant for trying things out.",
        verbs.BuildCorpusSettings,
        example="megatron-prune build-corpus --output data/text --max-bytes 10000000",
    )


def build_corpus_main(argv: list[str]) -> int:
    """Gather English text from this machine into JSON lines."""
    asked = verbs.BuildCorpusSettings.of(build_corpus_parser().read(argv)[0])
    from megatron_prune.data import local_text, text_packages

    if not (asked.debian or asked.pypi) and (asked.packages_only or asked.downloads):
        raise UsageError("--packages-only, --downloads", got="no packages", expected="--debian or --pypi with them")
    folder = Path(asked.downloads or f"{asked.output.rstrip('/')}.downloads")
    fetched = text_packages.fetch(folder, asked.debian, asked.pypi) if asked.debian or asked.pypi else []
    manifest = local_text.build_corpus(
        asked.output,
        max_bytes=asked.max_bytes or None,
        shares=_shares(asked.split),
        longest_held_out=asked.longest_held_out or None,
        workers=asked.workers or min(8, os.cpu_count() or 1),
        places=local_text.TextPlaces((), (), (), ()) if asked.packages_only else None,
        more=[text_packages.texts_of(package) for package in fetched],
        packages=[package.to_json() for package in fetched],
    )
    sizes = ", ".join(
        f"{name} {s['bytes'] / 1e6:.2f} MB of {s['documents']} documents" for name, s in manifest["splits"].items()
    )
    print(f"{asked.output}: {sizes} in {manifest['seconds']:.1f} s")
    return 0


def _shares(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError("--split", got=text, expected="four positive shares, such as 94,2,2,2") from error


def train_tokenizer_parser() -> Parser:
    return Parser(
        "train-tokenizer",
        "Trains a SentencePiece tokenizer on text, with byte fallback, so that every text has tokens.",
        verbs.TrainTokenizerSettings,
        example="megatron-prune train-tokenizer --input text.jsonl --output tokenizer.model --vocab-size 4096",
    )


def train_tokenizer_main(argv: list[str]) -> int:
    """Train a SentencePiece tokenizer on text."""
    asked = verbs.TrainTokenizerSettings.of(train_tokenizer_parser().read(argv)[0])
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


def preprocess_parser() -> Parser:
    return Parser(
        "preprocess",
        "Tokenizes JSON lines, Parquet, text or a data set of the Hugging Face hub into Megatron's .bin and .idx. The "
        "files do not depend on the number of workers; a stopped run resumes.",
        verbs.PreprocessSettings,
        example="""
megatron-prune preprocess --input data/text/train.jsonl --output-prefix data/train --append-eod \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model""",
    )


def preprocess_main(argv: list[str]) -> int:
    """Tokenize JSON lines, Parquet, array_record or text into Megatron's .bin and .idx."""
    asked = verbs.PreprocessSettings.of(preprocess_parser().read(argv)[0])
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


def prepare_suite_parser() -> Parser:
    return Parser(
        "prepare-suite",
        "Fetches and tokenizes the corpora of a suite, and lets lm-eval fetch the data sets of its tasks, so that no "
        "run needs the network. A stopped run resumes. Prints the lines for study.yaml.",
        verbs.PrepareSuiteSettings,
        example="""
megatron-prune prepare-suite paper-zero-shot
megatron-prune prepare-suite paper-perplexity --output data/suites --append-eod --workers 8 \\
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR""",
    )


def prepare_suite_main(argv: list[str]) -> int:
    """Fetch the tasks of an evaluation suite, and fetch and tokenize its corpora."""
    asked = verbs.PrepareSuiteSettings.of(prepare_suite_parser().read(argv)[0])
    from megatron_prune.evaluation import suites

    known = suites.known() if asked.suites is None else suites.read(asked.suites)
    if asked.suite not in known:
        raise UsageError("SUITE", got=asked.suite, expected=" or ".join(known))
    suite = known[asked.suite]
    if suite.tasks:
        from megatron_prune.evaluation import tasks

        found = argparse.Namespace(tasks=",".join(suite.tasks), tasks_path=None, num_fewshot=suite.few_shot)
        loaded, _ = tasks.load(found)
        print(f"{asked.suite}: {len(loaded['tasks'])} tasks are here. In study.yaml:")
        print(f"evaluation:\n  tasks: [{asked.suite}]")
    if suite.corpora:
        _corpora(asked, suite)
    return 0


def _corpora(asked: verbs.PrepareSuiteSettings, suite: Any) -> None:
    """Tokenize every corpus into a prefix of its label."""
    missing = [flag for flag in ("output", "tokenizer_type", "tokenizer_model") if getattr(asked, flag) is None]
    if missing or asked.output is None or asked.tokenizer_type is None or asked.tokenizer_model is None:
        raise UsageError(
            ", ".join("--" + flag.replace("_", "-") for flag in missing), got="nothing",
            expected="a folder and a tokenizer", why=f"{asked.suite} has corpora",
        )  # fmt: skip
    from megatron_prune.data.hub import shards
    from megatron_prune.data.preprocess import preprocess
    from megatron_prune.data.tokenizers import load_tokenizer

    tokenizer, folder = load_tokenizer(asked.tokenizer_type, asked.tokenizer_model), Path(asked.output)
    folder.mkdir(parents=True, exist_ok=True)
    for label, source in suite.corpora.items():
        inputs: Any = list(source.files)
        if source.dataset is not None:
            inputs = shards(source.dataset, source.split, source.column)
        made = preprocess(
            inputs, folder / label, tokenizer, json_key=source.column, append_eod=asked.append_eod,
            workers=asked.workers,
        )  # fmt: skip
        print(f"{folder / label}: {made}")
    print("In study.yaml:\nevaluation:")
    for key in ("windows", "seq_length"):
        if (value := getattr(suite, key)) is not None:
            print(f"  {key}: {value}")
    print("  corpora:")
    for label in suite.corpora:
        print(f"    {label}: {folder / label}")


STAGES = ("train", "calibration", "validation", "test")


def check_contamination_parser() -> Parser:
    return Parser(
        "check-contamination",
        "Finds documents, equal or nearly so, that the corpora of different stages share, and exits with code 2 "
        "if two stages share more than allowed. Corpora are given by their prefixes, all with one tokenizer.",
        verbs.CheckContaminationSettings,
        example="megatron-prune check-contamination --train data/train --test data/test --json shared.json",
    )


def check_contamination_main(argv: list[str]) -> int:
    """Find documents that the corpora of different stages share."""
    asked = verbs.CheckContaminationSettings.of(check_contamination_parser().read(argv)[0])
    from megatron_prune import artifacts
    from megatron_prune.data import contamination

    if asked.json:
        artifacts.refuse_unwritable("--json", asked.json)
    report = contamination.compare_stages(
        {stage: list(getattr(asked, stage)) for stage in STAGES if getattr(asked, stage)},
        similarity=asked.similarity,
        max_duplicates=asked.max_duplicates,
        max_near_duplicates=asked.max_near_duplicates,
    )
    if asked.json:
        artifacts.write_json(asked.json, report)
    for found in report["pairs"]:
        print(contamination.line(found))
    contamination.refuse(report)
    return 0


def build_index_parser() -> Parser:
    return Parser(
        "build-index",
        "Builds a token stream's index caches on one machine, and counts unique tokens. At the start of a run rank 0 "
        "would build them while all ranks wait, for ten minutes at most, which is too short for hundreds of billions "
        "of tokens.",
        verbs.BuildIndexSettings,
        example="megatron-prune build-index --data-path data/train --seq-length 2048 --stream-range 0:256000",
    )


def build_index_main(argv: list[str]) -> int:
    """Build a token stream's index caches before the cluster starts; print the stream as JSON."""
    asked = verbs.BuildIndexSettings.of(build_index_parser().read(argv)[0])
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
