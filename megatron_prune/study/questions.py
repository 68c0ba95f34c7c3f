"""Are the questions of a study's tasks in the text that its models are trained or pruned on?

Looked for once per set of questions and corpora; the report stays in the study's folder. The tasks are loaded for it
before anything runs, so an unknown name or a missing data set is found then.

A question counts as quoted if the text has ``RUN`` of its tokens in a row. Every run of ``RUN`` tokens of the questions
is hashed into a table, and every run of the corpus is looked up in it, at about 0.1 µs per token of the corpus. A
question is tokenized on its own, so its first and last tokens may differ from those inside a document; runs between
them do not. Questions shorter than ``RUN`` tokens are not compared.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_prune import artifacts, screen
from megatron_prune.data import indexed
from megatron_prune.data.tokenizers import Tokenizer, load_tokenizer
from megatron_prune.errors import DataError, UsageError
from megatron_prune.evaluation import suites
from megatron_prune.study.prunings import Places
from megatron_prune.study.schema import StudyConfig

RUN = 13  # tokens, as many words as GPT-3's authors looked for (Brown et al. 2020, appendix C)
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BITS = 26  # of the table that excludes most runs before they are looked up
CHUNK = 1 << 20  # tokens of a corpus at a time


@dataclass(frozen=True)
class QuotedTexts:
    """Of ``texts``, ``too_short`` are not compared, and ``quoted`` are quoted in the ``corpora``.

    ``example``: the number of one of them.
    """

    texts: int
    too_short: int
    quoted: int
    corpora: tuple[str, ...]
    example: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quoted(texts: Mapping[str, Sequence[str]], corpora: Sequence[str], tokenizer: Tokenizer) -> dict[str, QuotedTexts]:
    """By name of a group of ``texts``: how many of them are quoted in ``corpora`` (prefixes).

    DataError for a corpus of another tokenizer.
    """
    _refuse_other_tokenizers(corpora, tokenizer)
    owners, hashes, short = [], [], dict.fromkeys(texts, 0)
    groups = [(name, number) for name, own in texts.items() for number in range(len(own))]
    every = tokenizer.encode_batch([text for own in texts.values() for text in own])
    for place, ((name, _), tokens) in enumerate(zip(groups, every, strict=True)):
        short[name] += len(tokens) < RUN
        found = run_hashes(np.asarray(tokens))
        hashes.append(found)
        owners.append(np.full(len(found), place))
    table, entry = np.unique(np.concatenate(hashes or [np.empty(0, np.uint64)]), return_inverse=True)
    hit = np.zeros(len(table), dtype=bool)
    for corpus in corpora if len(table) else ():
        _look_up(corpus, table, hit)
    found_places = set(np.concatenate(owners)[hit[entry]].tolist()) if len(table) else set()
    result = {}
    for name, own in texts.items():
        numbers = [number for place, (group, number) in enumerate(groups) if group == name and place in found_places]
        result[name] = QuotedTexts(len(own), short[name], len(numbers), tuple(corpora), numbers[0] if numbers else None)
    return result


def run_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hashes of all runs of ``RUN`` consecutive tokens, uint64 [max(0, n - RUN + 1)]."""
    tokens = tokens.astype(np.uint64)
    count = max(0, len(tokens) - RUN + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(RUN if count else 0):
        hashes *= MULTIPLIER
        hashes += tokens[place : place + count] + np.uint64(1)
    hashes ^= hashes >> np.uint64(32)
    hashes *= MULTIPLIER
    return hashes


def _look_up(corpus: str, table: np.ndarray, hit: np.ndarray) -> None:
    """Mark the entries of the sorted ``table`` that occur in a corpus."""
    shift = np.uint64(64 - BITS)
    maybe = np.zeros(1 << BITS, dtype=bool)
    maybe[(table >> shift).astype(np.int64)] = True
    opened = indexed.open_indexed(corpus)
    ids = np.memmap(f"{corpus}.bin", dtype=opened.index.dtype, mode="r")
    with screen.Bar(len(ids), f"looking for questions in {corpus}", "token", shown=screen.rank() == 0) as bar:
        for first in range(0, max(0, len(ids) - RUN + 1), CHUNK):
            runs = run_hashes(np.asarray(ids[first : first + CHUNK + RUN - 1]))
            runs = runs[maybe[(runs >> shift).astype(np.int64)]]
            places = np.minimum(np.searchsorted(table, runs), len(table) - 1)
            hit[places[table[places] == runs]] = True
            bar.reach(min(first + CHUNK, len(ids)))


def _refuse_other_tokenizers(corpora: Sequence[str], tokenizer: Tokenizer) -> None:
    for corpus in corpora:
        described = indexed.sidecar(corpus)
        if described and described["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
            raise DataError(
                f"{corpus} was tokenized with another tokenizer than {tokenizer.model}, so questions cannot be looked "
                "for in it: name its own in data.tokenizer"
            )


def lengths(study: StudyConfig) -> Counter[int]:
    """How many sequences of each length, in tokens, a model reads for the study's tasks. UsageError and DataError for
    tasks that cannot be loaded."""
    from megatron_prune.evaluation import tasks

    loaded, _ = _load(study)
    return tasks.lengths(loaded, study.evaluation.limit, _tokenizer(study), study.evaluation_seq_length)


def _load(study: StudyConfig) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The study's tasks, as ``tasks.load`` returns them."""
    asked = study.evaluation
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("evaluation.tasks", got=", ".join(asked.tasks), expected="no tasks without lm-eval",
                         do="pip install 'megatron_prune[eval]'")  # fmt: skip
    from megatron_prune.evaluation import tasks

    return tasks.load(
        argparse.Namespace(tasks=",".join(asked.lm_eval_tasks), tasks_path=asked.tasks_path, num_fewshot=asked.few_shot)
    )


def check(study: StudyConfig, places: Places) -> None:
    """DataError if more questions than ``evaluation.max_contaminated`` are quoted; UsageError for unknown tasks."""
    from megatron_prune.evaluation import tasks

    asked = study.evaluation
    loaded, single = _load(study)
    _refuse_unknown_metrics(study, loaded["tasks"], single)
    if asked.max_contaminated is None:
        return
    texts, tokenizer = tasks.texts(loaded, asked.limit), _tokenizer(study)
    stages = {"train": [prefix for _, prefix in study.data.train], "calibration": [study.data.calibration]}
    question: dict[str, Any] = {
        "version": 1,
        "run": RUN,
        "tokenizer": tokenizer.digest(),
        "questions": {name: artifacts.sha256_json(own) for name, own in texts.items()},
        "corpora": {stage: [indexed.fingerprint(prefix) for prefix in own] for stage, own in stages.items()},
    }
    earlier = artifacts.read_json(places.quoted) if places.quoted.is_file() else {}
    report = earlier
    if question != {name: earlier.get(name) for name in question}:
        found = {stage: quoted(texts, own, tokenizer) for stage, own in stages.items()}
        report = question | {"found": {stage: {name: one.to_json() for name, one in own.items()}
                                       for stage, own in found.items()}}  # fmt: skip
        artifacts.write_json(places.quoted, report)
    refuse(report, asked.max_contaminated)


def refuse(report: dict[str, Any], limit: float) -> None:
    """DataError that names every task of which a larger share than ``limit`` is quoted."""
    wrong = [
        f"of {one['texts']} questions of {name}, {one['quoted']} are in the {stage} text (question {one['example']})"
        for stage, own in report["found"].items()
        for name, one in own.items()
        if one["quoted"] > limit * one["texts"]
    ]
    if wrong:
        raise DataError(
            f"{'; '.join(wrong)}: expected {RUN} tokens in a row of at most {limit:.2%} of the questions; "
            "take those documents out of the text, drop the task, or raise evaluation.max_contaminated"
        )


def _refuse_unknown_metrics(study: StudyConfig, loaded: dict[str, Any], single: dict[str, list[str]]) -> None:
    """UsageError for a suite whose tasks lack its metrics, or are groups of tasks."""
    for name in study.evaluation.tasks:
        for task, metric in (suites.metrics_of(name, study.evaluation.suites) or {}).items():
            if single[task] != [task]:
                raise UsageError(
                    f"evaluation.suites.{name}", got=f"{task}, a group", expected="single tasks",
                    do=f"name {', '.join(single[task])}",
                )  # fmt: skip
            if metric not in loaded[task].aggregation():
                raise UsageError(
                    f"evaluation.suites.{name}.{task}", got=metric, expected=", ".join(loaded[task].aggregation())
                )


def _tokenizer(study: StudyConfig) -> Tokenizer:
    """The tokenizer of the study's corpora."""
    made = study.data.tokenizer
    if made is not None:
        return load_tokenizer(made.type, made.model)
    described = indexed.sidecar(study.data.train[0][1])
    if described is None:
        raise UsageError(
            "data.tokenizer", got="nothing", expected="the corpora's tokenizer",
            why="the questions of evaluation.tasks are looked for in them",
            do="give it, or set evaluation.max_contaminated: null",
        )  # fmt: skip
    return load_tokenizer(described["tokenizer"]["type"], described["tokenizer"]["model"])
