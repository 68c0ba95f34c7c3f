"""Are the questions of a study's tasks in the text that its models are trained or pruned on?

Looked for once per set of questions and corpora; the report stays in the study's folder. The tasks are loaded for it
before anything runs, so an unknown name or a missing data set is found then.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from megatron_prune import artifacts
from megatron_prune.data import indexed, quotations
from megatron_prune.data.tokenizers import Tokenizer, load_tokenizer
from megatron_prune.errors import DataError, UsageError
from megatron_prune.evaluation import suites
from megatron_prune.study.prunings import Places
from megatron_prune.study.schema import StudyConfig


def check(study: StudyConfig, places: Places) -> None:
    """DataError if more questions than ``evaluation.max_contaminated`` are quoted; UsageError for unknown tasks."""
    asked = study.evaluation
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("evaluation.tasks", got=", ".join(asked.tasks), expected="no tasks without lm-eval",
                         do="pip install 'megatron_prune[eval]'")  # fmt: skip
    from megatron_prune.evaluation import tasks

    named = argparse.Namespace(
        tasks=",".join(asked.lm_eval_tasks), tasks_path=asked.tasks_path, num_fewshot=asked.few_shot
    )
    loaded, single = tasks.load(named)
    _refuse_unknown_metrics(study, loaded["tasks"], single)
    if asked.max_contaminated is None:
        return
    texts, tokenizer = tasks.texts(loaded, asked.limit), _tokenizer(study)
    stages = {"train": [prefix for _, prefix in study.data.train], "calibration": [study.data.calibration]}
    question: dict[str, Any] = {
        "version": 1,
        "run": quotations.RUN,
        "tokenizer": tokenizer.digest(),
        "questions": {name: artifacts.sha256_json(own) for name, own in texts.items()},
        "corpora": {stage: [indexed.fingerprint(prefix) for prefix in own] for stage, own in stages.items()},
    }
    earlier = artifacts.read_json(places.quoted) if places.quoted.is_file() else {}
    report = earlier
    if question != {name: earlier.get(name) for name in question}:
        found = {stage: quotations.quoted(texts, own, tokenizer) for stage, own in stages.items()}
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
            f"{'; '.join(wrong)}: expected {quotations.RUN} tokens in a row of at most {limit:.2%} of the questions; "
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
