"""Candidates ranked by a task: accuracies against transformers with layers deleted, at every layout; refusals."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.pruning_commands import plan_main
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.errors import EXIT_NEEDS_SCORES, MegatronPruneError
from megatron_prune.structured import plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.statistics import Statistics
from tests.calibration.verbs import Verbs

LAYERS, KEPT = 4, 2
TP2 = ["--tensor-model-parallel-size", "2"]
TP3 = ["--tensor-model-parallel-size", "3"]
PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp1": (1, []),
    "tp2": (2, TP2),
    "tp3": (3, TP3),
    "pp2": (2, PP2),
    "dp2": (2, []),
    "tp2pp2": (4, [*TP2, *PP2]),
}
TEXT = ["--calibration-sequences", 3, "--calibration-seq-length", 64]
DEPTH = ["--method", "minitron-depth", "--target-num-layers", str(KEPT)]


def examples(documents: list[str], count: int = 40) -> list[dict[str, Any]]:
    """Meaningless questions of all lengths: the start of a document, and pieces of others as continuations."""
    draw = random.Random(5)
    made: list[dict[str, Any]] = []
    for number in range(count):
        choices = [draw.choice(documents)[: draw.randint(4, 40)].strip() + "." for _ in range(2 + number % 3)]
        query: Any = documents[number][: draw.randint(10, 60)] + " " * (number % 2)
        if number % 5 == 0:  # WinoGrande's way
            query, choices = [f"{query} {choice}" for choice in choices], [choices[0]] * len(choices)
        gold = draw.randrange(len(choices))
        made.append({"query": query, "choices": choices, "gold": gold, "id": number})
    return made


@pytest.fixture
def task(tmp_path: Path, tiny_documents: list[str]) -> Path:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples(tiny_documents)))
    return path


def hf_correct(folder: Path, task: Path, kept: list[int]) -> dict[str, int]:
    """How many examples transformers' model gets right in float64 with only those layers, by metric."""
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    right = {"acc": 0, "acc_norm": 0}
    for line in task.read_text().splitlines():
        example = json.loads(line)
        values = []
        for number, choice in enumerate(example["choices"]):
            query = example["query"][number] if isinstance(example["query"], list) else example["query"]
            before = tokens(query.rstrip(), add_special_tokens=False).input_ids
            whole = tokens(query + " " + choice, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                logs = model(whole).logits[0].log_softmax(-1)
            values.append(sum(logs[i - 1, whole[0, i]].item() for i in range(len(before), whole.shape[1])))
        by_character = [value / len(choice) for value, choice in zip(values, example["choices"], strict=True)]
        for metric, compared in (("acc", values), ("acc_norm", by_character)):
            right[metric] += compared.index(max(compared)) == example["gold"]
    return right


@pytest.fixture
def verbs(job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> Verbs:
    return Verbs(job, tiny_parent, tiny_corpus, tmp_path, TEXT, [])


def correct(found: Statistics) -> dict[str, dict[str, int]]:
    """Candidate: metric: right answers. No answer may depend on rounding, or layouts could differ."""
    accuracies = {s.candidate: s.tasks[next(iter(s.tasks))].accuracies for s in found.scores.values() if s.tasks}
    for one in (one for by_metric in accuracies.values() for one in by_metric.values()):
        assert one.low == one.correct == one.high and one.examples == 40
    return {candidate: {metric: one.correct for metric, one in a.items()} for candidate, a in accuracies.items()}


@pytest.mark.parametrize(
    "layouts", [["tp2pp2"], pytest.param([*LAYOUTS], marks=pytest.mark.slow)], ids=["one", "every"]
)
def test_accuracies_are_transformers_at_every_layout(
    verbs: Verbs, tiny_hf: Callable[..., Path], task: Path, tmp_path: Path, layouts: list[str]
) -> None:
    verbs.calibrate()
    choice = [*DEPTH, "--score-by", "task", "--task-data", task]
    asked = verbs.make(*choice)
    assert asked.returncode == EXIT_NEEDS_SCORES and "4 candidates have no score yet" in asked.output
    folder = tiny_hf("llama-gqa", layers=LAYERS)
    removals = {"dense": [], **{f"without layers {i}-{i + 1}": [i, i + 1] for i in range(3)}}
    expected = {
        name: hf_correct(folder, task, [i for i in range(LAYERS) if i not in gone]) for name, gone in removals.items()
    }
    assert len({tuple(right.values()) for right in expected.values()}) > 2, "equal accuracies would show nothing"
    unscored = verbs.statistics
    for name in layouts:
        nproc, flags = LAYOUTS[name]
        output, verbs.statistics = tmp_path / f"{name}.safetensors", unscored
        assert "scored 4 candidates" in verbs.score(*flags, "--output", output, nproc=nproc).ok().output
        found = statistics_file.read(output)
        assert correct(found) == expected, name
        (dense,) = (score.loss for score in found.scores.values() if score.candidate == "dense")
        assert dense == pytest.approx(found.loss, rel=1e-6)

    verbs.statistics = output
    for metric in ("acc", "acc_norm"):
        shown = verbs.make(*choice, "--task-metric", metric).ok().output
        assert re.search(rf"by {metric} on\s", shown) and f"{expected['dense'][metric] / 40:.4f}" in shown
        made = plan.read(verbs.plan)
        losses = [row.loss for row in made.candidates]
        accuracies = [expected[row.candidate][metric] / 40 for row in made.candidates]
        assert [row.accuracy for row in made.candidates] == accuracies
        assert made.chosen == min(range(3), key=lambda i: (-accuracies[i], losses[i], i))
        assert made.calibration is not None
        assert made.calibration["scoring"]["task"]["dense"]["correct"] == expected["dense"][metric]


def test_prune_judges_by_a_task_in_one_load(verbs: Verbs, task: Path, tmp_path: Path) -> None:
    choice = [*DEPTH, "--score-by", "task", "--task-data", task]
    verbs.calibrate()
    verbs.make(*choice)
    verbs.score().ok()
    verbs.make(*choice).ok()
    by_hand = plan.read(verbs.plan)
    words = ["prune", *verbs.load, *verbs.text, *choice, *TP2, *PP2, "--save", tmp_path / "cut"]
    output = verbs.job(words, nproc=4).ok().output
    assert output.count("successfully loaded checkpoint") == 1 and "by acc on" in output
    found = plan.read(tmp_path / "cut" / "pruning" / "plan.json")
    assert found.kept_layers == by_hand.kept_layers and found.chosen == by_hand.chosen
    assert [row.accuracy for row in found.candidates] == [row.accuracy for row in by_hand.candidates]
    spent = open_checkpoint(tmp_path / "cut").pruning[-1]
    assert found.calibration is not None and by_hand.calibration is not None
    scoring = found.calibration["scoring"]
    assert scoring == by_hand.calibration["scoring"] and spent["flops"] == found.calibration["flops"] + scoring["flops"]
    # Twice the parent's three windows would be six forwards; the rest comes from the candidates and the task.
    lengths = [len(t) for t in _tokens(verbs.parent, task)]
    half = replace(found.source, num_layers=KEPT)
    windows = 3 * (found.source.forward_flops(64) + 3 * half.forward_flops(64))
    choices = sum(found.source.forward_flops(n - 1) + 3 * half.forward_flops(n - 1) for n in lengths)
    assert scoring["flops"] == windows + choices


def _tokens(parent: Path, task: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(open_checkpoint(parent).huggingface)
    found = []
    for line in task.read_text().splitlines():
        example = json.loads(line)
        for number, choice in enumerate(example["choices"]):
            query = example["query"][number] if isinstance(example["query"], list) else example["query"]
            found.append(tokens(query + " " + choice, add_special_tokens=False).input_ids)
    return found


def test_losses_and_other_tasks_are_kept_and_reused(verbs: Verbs, task: Path, tmp_path: Path) -> None:
    verbs.calibrate()
    verbs.make(*DEPTH)
    verbs.score().ok()
    before = statistics_file.read(verbs.statistics).scores
    choice = [*DEPTH, "--score-by", "task", "--task-data", task]
    assert verbs.make(*choice).returncode == EXIT_NEEDS_SCORES
    verbs.score().ok()
    after = statistics_file.read(verbs.statistics).scores
    assert {key: score.loss for key, score in before.items()}.items() <= {k: s.loss for k, s in after.items()}.items()
    moved = task.rename(tmp_path / "moved.jsonl")
    verbs.make(*DEPTH, "--score-by", "task", "--task-data", moved).ok()  # the examples count, not the path
    few = tmp_path / "few.jsonl"
    few.write_text("".join(moved.read_text().splitlines(keepends=True)[:7]))
    assert verbs.make(*DEPTH, "--score-by", "task", "--task-data", few).returncode == EXIT_NEEDS_SCORES
    elsewhere = few.rename(tmp_path / "elsewhere.jsonl")
    missing = verbs.score()
    assert missing.returncode == 2 and "cannot read the task" in missing.output
    verbs.score("--task-data", elsewhere).ok()
    scores = statistics_file.read(verbs.statistics).scores.values()
    assert all(len(score.tasks) == 2 for score in scores)
    assert "scored 0 candidates" in verbs.score("--task-data", elsewhere).ok().output
    verbs.make(*DEPTH).ok()  # the loss still decides by default
    assert all(row.accuracy is None for row in plan.read(verbs.plan).candidates)


def test_what_makes_no_sense_is_refused_before_anything_starts(
    verbs: Verbs, task: Path, tmp_path: Path, tiny_documents: list[str]
) -> None:
    verbs.calibrate()
    by_task = [*DEPTH, "--score-by", "task"]
    bad, other, long = (tmp_path / f"{name}.jsonl" for name in ("bad", "other", "long"))
    bad.write_text('{"query": "q", "choices": ["a", "b"], "gold": 2}\n')
    other.write_text("".join(task.read_text().splitlines(keepends=True)[:3]))
    long.write_text(json.dumps({"query": " ".join(tiny_documents[:2]), "choices": ["a", "b"], "gold": 0}) + "\n")
    for choice, message in (
        (by_task, "--task-data: expected .*, got nothing"),
        ([*DEPTH, "--task-data", task], "--task-data: expected --score-by task with it, got .*"),
        ([*DEPTH, "--task-metric", "acc"], "--task-metric: expected --score-by task with it, got acc"),
        ([*by_task, "--task-data", tmp_path / "no.jsonl"], "cannot read the task"),
        ([*by_task, "--task-data", bad], "bad.jsonl, line 1: gold: expected"),
        (["--method", "shortgpt", "--ratio", "0.5", "--score-by", "task"], "--score-by: expected --method minitron"),
    ):
        words = ["--load", verbs.parent, "--statistics", verbs.statistics, "--output", verbs.plan, *choice]
        with pytest.raises(MegatronPruneError, match=message):
            plan_main([str(word) for word in words])

    def refused(finished: Any, message: str) -> None:
        assert finished.returncode == 2 and re.search(message, finished.output), finished.output[-2000:]
        assert "loading distributed checkpoint" not in finished.output

    prune = ["prune", *verbs.load, *verbs.text, "--save", tmp_path / "cut"]
    refused(verbs.job([*prune, *by_task]), "--task-data: expected .*, got nothing")
    refused(verbs.job([*prune, *by_task, "--task-data", long]), "long.jsonl, example 1, choice 'a': expected at most")
    unasked = "--task-data: expected no such flag where candidates are scored by their loss, got .*"
    alone = ["calibrate", *verbs.load, *verbs.text, "--output", tmp_path / "x.safetensors", "--task-data", task]
    refused(verbs.job(alone), unasked)
    verbs.make(*DEPTH)
    refused(verbs.score("--task-data", task), unasked)
    verbs.make(*by_task, "--task-data", task)
    refused(
        verbs.score("--task-data", other),
        "--task-data: expected the file of examples that was given to plan, got .*other.jsonl",
    )
    refused(verbs.score("--tokenizer-type", "HuggingFaceTokenizer"), "--tokenizer-model: expected .*, got nothing")
    assert not (tmp_path / "cut").exists()


def test_a_checkpoint_without_a_tokenizer_needs_one(
    verbs: Verbs, task: Path, tmp_path: Path, tiny_hf: Callable[..., Path], tiny_tokenizer: Path
) -> None:
    bare = tmp_path / "bare"
    import_hf(tiny_hf("llama-gqa", layers=LAYERS), bare)
    shutil.rmtree(bare / "huggingface")
    verbs.parent, verbs.load = bare, ["--load", bare]
    verbs.calibrate()
    verbs.make(*DEPTH, "--score-by", "task", "--task-data", task)
    finished = verbs.score()
    assert (
        finished.returncode == 2
        and "--tokenizer-type: expected" in finished.output
        and "got nothing" in finished.output
    )
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tiny_tokenizer]
    verbs.score(*named).ok()
    assert len(correct(statistics_file.read(verbs.statistics))) == 4
