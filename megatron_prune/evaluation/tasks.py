"""lm-eval's tasks for ``evaluate --tasks``: found, loaded and checked before the model is loaded, then run on it.

lm-eval runs on rank 0 alone (``language_model.py`` explains how the others take part). It is optional and slow to
import, so nothing here imports it before it is needed.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from megatron_prune import artifacts, screen, verbs
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.engine import runtime
from megatron_prune.engine.from_checkpoint import given
from megatron_prune.errors import DataError, UsageError
from megatron_prune.evaluation import suites

if TYPE_CHECKING:
    from megatron_prune.evaluation.generation import GenerationDefaults

EXTRA = "pip install 'megatron_prune[eval]'"
KINDS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
FLAGS = ("--tasks-path", "--num-fewshot", "--limit", "--task-samples")


def named(args: argparse.Namespace | verbs.EvaluateSettings) -> list[str]:
    """What ``--tasks`` names, each once."""
    return list(dict.fromkeys(name for name in (args.tasks or "").split(",") if name))


def names(args: argparse.Namespace | verbs.EvaluateSettings) -> list[str]:
    """The names that lm-eval knows: suites are replaced by their tasks."""
    return suites.tasks_of(named(args))


def refuse_unfit(args: argparse.Namespace, argv: list[str]) -> None:
    """UsageError for flags that contradict each other."""
    if not names(args):
        for flag in FLAGS:
            if given(argv, flag):
                raise UsageError(flag, got="it alone", expected="--tasks with it")
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            "--tasks", got=args.tasks, expected="no tasks without lm-eval, which is not installed", do=EXTRA
        )
    if args.tasks_path is not None and not Path(args.tasks_path).is_dir():
        raise UsageError("--tasks-path", got=args.tasks_path, expected="a directory with YAML files of tasks")
    for flag, value, least in (("--num-fewshot", args.num_fewshot, 0), ("--limit", args.limit, 1)):
        if value is not None and value < least:
            raise UsageError(flag, got=value, expected=f"at least {least}")
    runtime.refuse_fixed_lengths(args)


@dataclass(frozen=True)
class AskedTasks:
    """The tasks that lm-eval loaded (its ``TaskDict``), and the tokenizer: at most ``longest`` tokens are read.

    ``single``: by every name that was asked for, the single tasks that it stands for (a group or a tag has several).
    ``answered``: entries of the scores file that stay; their tasks are not in ``tasks``.
    """

    tasks: dict[str, Any]
    single: dict[str, list[str]]
    tokenizer: Tokenizer
    longest: int
    defaults: GenerationDefaults
    answered: Mapping[str, Any]


def prepare(args: argparse.Namespace, argv: Sequence[str], answered: Mapping[str, Any]) -> AskedTasks | None:
    """On rank 0, if tasks are asked for: everything but the model. lm-eval downloads missing data sets.

    ``answered``: the entry of a scores file; its tasks are not run again if they were asked in the same way.
    UsageError if a name is unknown or a task asks for what cannot be done, DataError if a task cannot be loaded.
    """
    if not names(args) or args.rank != 0:
        return None
    tokenizer = runtime.tokenizer(args)
    longest = args.seq_length if given(argv, "--seq-length") else args.max_position_embeddings
    from megatron_prune.evaluation.generation import GenerationDefaults

    defaults = GenerationDefaults.read(open_checkpoint(runtime.loaded_directory(args)).huggingface, tokenizer)
    how = _how(args, tokenizer, longest)
    kept = answered if all(answered.get(key) == value for key, value in how.items()) else {}
    left = [name for name in names(args) if name not in kept.get("single", {})]
    loaded = load(args, functools.partial(_refuse_generation, defaults, longest), left) if left else ({}, {})
    return AskedTasks(*loaded, tokenizer, longest, defaults, kept)


def _how(args: argparse.Namespace, tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    """How tasks are asked: answers to some are comparable with answers to others if this is the same."""
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "longest": longest,
        "micro_batch_size": args.micro_batch_size,
        "tokenizer": {"model": tokenizer.model, "fingerprint": tokenizer.fingerprint()},
    }


def load(
    args: argparse.Namespace, check: Callable[[Any], None] | None = None, wanted: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """lm-eval's ``TaskDict`` and ``AskedTasks.single``, from ``tasks``, ``tasks_path`` and ``num_fewshot``.

    Seeds and few-shot settings are those of lm-eval's command line for each name alone, so that questions are the same
    and do not depend on the other names. ``check`` may refuse a task; ``wanted``: some of the names.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    manager = _manager(args)
    known = manager.all_tasks
    loaded: list[Any] = []
    single: dict[str, list[str]] = {}
    for name in names(args) if wanted is None else wanted:
        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5)
            raise UsageError(
                "--tasks", got=name, expected=", ".join(near) or "the name of a task of lm-eval or of --tasks-path"
            )
        try:
            found = manager.load(name)
        except Exception as error:  # third-party YAML, code and data sets can raise anything
            raise DataError(f"--tasks {name}: lm-eval cannot load it: {type(error).__name__}: {error}") from error
        single[name] = list(found["tasks"])
        for task in found["tasks"].values():
            _refuse(task, args.num_fewshot)
            if check is not None:
                check(task)
            if args.num_fewshot is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=args.num_fewshot or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    try:
        tasks: dict[str, Any] = manager.load(loaded)
    except ValueError as error:  # a task and a group that contains it
        raise UsageError("--tasks", got=args.tasks, expected="each task once", why=str(error)) from error
    return tasks, single


def _manager(args: argparse.Namespace) -> Any:
    """lm-eval's list of tasks. Its own thousands of files are read only if a name may need them."""
    from lm_eval.tasks import TaskManager

    if args.tasks_path is None:
        return _built_in()
    own = TaskManager(include_path=args.tasks_path, include_defaults=False)
    if set(names(args)) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=args.tasks_path)


@functools.cache
def _built_in() -> Any:
    """lm-eval's own list, read once per process: thousands of files, which take ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _refuse_generation(defaults: GenerationDefaults, longest: int, task: Any) -> None:
    """UsageError for a task whose texts cannot be generated as it asks."""
    from megatron_prune.evaluation.generation import GenerationSettings

    if task.OUTPUT_TYPE == "generate_until":
        GenerationSettings.of(task.task_name, task.get_config("generation_kwargs") or {}, defaults, longest)


def _refuse(task: Any, num_fewshot: int | None) -> None:
    from megatron_prune.evaluation.language_model import refusal

    if task.OUTPUT_TYPE not in KINDS:
        raise refusal(task.task_name, task.OUTPUT_TYPE)
    if getattr(task, "MULTIMODAL", False):
        raise refusal(task.task_name, "multimodal")
    if num_fewshot and task.get_config("num_fewshot") == 0:
        raise UsageError(
            "--num-fewshot",
            got=num_fewshot,
            expected=f"0 with {task.task_name}",
            why="that task fixes the number itself",
        )


def run(asked: AskedTasks | None, args: argparse.Namespace, model: list[torch.nn.Module]) -> dict[str, Any]:
    """Run the tasks and write ``--task-samples``; on rank 0 returns the entries for the scores file. Collective."""
    from megatron_prune.evaluation.language_model import MegatronLM, RanksModel

    everywhere = RanksModel(
        model,
        batch=args.micro_batch_size,
        tokenizer=lambda: runtime.tokenizer(args) if asked is None else asked.tokenizer,
    )
    if asked is None:
        everywhere.follow()
        return {}
    from lm_eval.evaluator import evaluate

    language_model = MegatronLM(asked.tokenizer, asked.longest, everywhere, asked.defaults, seed=args.seed)
    earlier = asked.answered
    found: dict[str, Any] = {"samples": {}}
    shown = dict(earlier.get("results", {}))
    scores = dict(earlier.get("questions", {}))
    if asked.tasks:
        found = evaluate(language_model, asked.tasks, limit=args.limit, log_samples=True)
        shown |= results(found)
        scores |= questions(found["samples"], shown)
    everywhere.finish()
    averages = {name: average(shown, metrics) for name in named(args) if (metrics := suites.metrics_of(name))}
    screen.say("\n".join([*lines(shown), *(f"{name}: {one['value']:.4f}" for name, one in averages.items())]))
    if args.task_samples is not None:
        samples = ({"task": task, **one} for task, of_task in found["samples"].items() for one in of_task)
        written = "".join(json.dumps(sample, default=str) + "\n" for sample in samples)
        artifacts.write_bytes(args.task_samples, written.encode())
    return {
        "results": shown,
        **({"suites": averages} if averages else {}),
        "single": {**earlier.get("single", {}), **asked.single},
        "questions": scores,
        "truncated": earlier.get("truncated", 0) + language_model.truncated,  # longer texts that lost their beginning
        **_how(args, asked.tokenizer, asked.longest),
    }


def results(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's results by task and group: each metric with its standard error, number of questions and version.

    A metric made by one of lm-eval's filters includes its name: ``acc,strict-match``.
    """
    shown: dict[str, dict[str, Any]] = {}
    for name, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            metrics[metric if chosen == "none" else key] = {
                "value": _number(value),
                "stderr": _number(values.get(f"{metric}_stderr,{chosen}")),
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            }
        counted = found["n-samples"].get(name, {})
        shown[name] = {
            "metrics": metrics,
            "samples": counted.get("effective", values.get("sample_len")),
            "samples_of": counted.get("original"),
            "num_fewshot": found["n-shot"].get(name),
            "version": found["versions"].get(name),
            **({"tasks": found["group_subtasks"][name]} if name in found["group_subtasks"] else {}),
        }
    return shown


def questions(samples: dict[str, list[dict[str, Any]]], shown: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The score of every question, by task: what comparisons between models are paired by.

    ``fingerprint`` identifies the questions and their order; ``scores`` has, for every metric that is the mean of its
    questions' scores (accuracies are, perplexities are not), these scores.
    """
    found: dict[str, dict[str, Any]] = {}
    for task, every in samples.items():
        ordered = sorted(every, key=lambda sample: sample["doc_id"])
        scores: dict[str, list[float]] = {}
        for metric, one in shown[task]["metrics"].items():
            name, _, chosen = metric.partition(",")
            own = [sample.get(name) for sample in ordered if sample["filter"] == (chosen or "none")]
            numbers = [float(value) for value in own if isinstance(value, int | float | numpy.number)]
            if own and len(numbers) == len(own) and one["value"] is not None:
                if math.isclose(math.fsum(numbers) / len(numbers), one["value"], rel_tol=1e-9, abs_tol=1e-12):
                    scores[metric] = numbers
        hashes = dict.fromkeys((sample["doc_id"], sample["doc_hash"]) for sample in ordered)
        found[task] = {"fingerprint": artifacts.sha256_json([list(one) for one in hashes]), "scores": scores}
    return found


def average(shown: Mapping[str, Any], metrics: Mapping[str, str]) -> dict[str, Any]:
    """A suite's score: the mean of its tasks' metrics, with the standard error from theirs."""
    own = [shown[task]["metrics"][metric] for task, metric in metrics.items()]
    errors = [one["stderr"] for one in own]
    stderr = None if None in errors else math.sqrt(math.fsum(error**2 for error in errors)) / len(own)
    return {"value": math.fsum(one["value"] for one in own) / len(own), "stderr": stderr, "metrics": dict(metrics)}


def texts(loaded: Mapping[str, Any], limit: int | None = None) -> dict[str, list[str]]:
    """The text of every question by task, with all its answers, as a model reads it without examples before it."""
    found: dict[str, list[str]] = {}
    for name, task in loaded["tasks"].items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=limit)
        parts: dict[int, list[str]] = {}
        for request in task.instances:
            parts.setdefault(request.doc_id, []).append("".join(one for one in request.args if isinstance(one, str)))
        found[name] = ["\n".join(parts[number]) for number in sorted(parts)]
    return found


def lengths(loaded: Mapping[str, Any], limit: int | None, tokenizer: Tokenizer, longest: int) -> Counter[int]:
    """How many sequences of each length the model reads for these tasks; of generated texts, their longest."""
    from lm_eval.models.utils import normalize_gen_kwargs

    found: Counter[int] = Counter()
    for task in loaded["tasks"].values():
        task.build_all_requests(limit=limit)
        inputs: set[tuple[int, ...]] = set()  # each is run once
        for request in task.instances:
            ids = tokenizer.encode_whole("".join(one for one in request.args if isinstance(one, str)))
            if request.request_type == "loglikelihood_rolling":
                found.update([longest] * (len(ids) // longest) + [len(ids) % longest] * (len(ids) % longest > 0))
            elif request.request_type == "generate_until":
                new: Any = normalize_gen_kwargs(dict(request.args[1]))["max_gen_toks"]
                found[min(len(ids) + new, longest)] += 1
            else:
                inputs.add(tuple(ids[:-1][-longest:]))
        found.update(max(1, len(one)) for one in inputs)
    return found


def lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """The same as text, one task per line."""
    said = []
    for name, found in results.items():
        parts = [
            f"{metric} {one['value']:.4f}" + (f" ± {one['stderr']:.4f}" if one["stderr"] is not None else "")
            for metric, one in found["metrics"].items()
            if one["value"] is not None
        ]
        said.append(f"{name}: {', '.join(parts) or 'no metric'} ({found['samples']} samples)")
    return said


def _number(value: Any) -> float | None:
    """None for NaN and lm-eval's "N/A", which JSON lacks."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
