"""``megatron-prune prepare-suite``: fetch the tasks of an evaluation suite, and fetch and tokenize its corpora."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import UsageError


def parser() -> Parser:
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


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.PrepareSuiteSettings.of(parser().read(argv)[0])
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
