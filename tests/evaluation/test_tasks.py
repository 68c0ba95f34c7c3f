"""``evaluate --tasks``: equal to lm-eval's own HFLM on the exported model, request by request, at every layout."""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.errors import DataError, MegatronPruneError, UsageError
from megatron_prune.evaluation import tasks
from tests.training.small import layout

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'megatron_prune[eval]'")

LONGEST = 128  # tokens, as many as the tiny models have positions for
SLOW = pytest.mark.slow
LAYOUTS = [  # TP, PP, DP and sequences per batch: alone, and with others
    pytest.param((1, 1, 2, 1), (2, 2, 1, 3), id="dp2, tp2pp2"),
    pytest.param((1, 1, 1, 4), (3, 1, 1, 2), id="1, tp3", marks=SLOW),
    pytest.param((1, 2, 1, 3), (1, 2, 2, 2), id="pp2, pp2dp2", marks=SLOW),
]
ODD = "</s>ö\u0000 \U0001f980\t\n  ﬁ"  # the BOS itself, bytes that the tokenizer never saw, white space
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3.0},
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        "metadata": {"version": 1.0},
    },
    "tiny_story": {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n", "q"], "max_gen_toks": 24, "do_sample": False},  # more in `folder`
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
    },
    "tiny_drawn": {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["Z"], "max_tokens": 9, "do_sample": True, "temperature": 0.9, "top_p": 0.8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "repeats": 2,
        "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": 2}]}],
    },
    "tiny_bare": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 0,
    },
}
GROUP = {"group": "tiny_all", "task": ["tiny_choices", "tiny_bare"],
         "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}  # fmt: skip


def documents(texts: list[str]) -> list[dict[str, Any]]:
    """Meaningless questions: short, long, too long for the model, odd, without a query, of one token each."""
    draw = random.Random(3)
    made: list[dict[str, Any]] = []
    for number in range(14):
        choices = [" " + draw.choice(texts)[: draw.randint(3, 50)].strip() for _ in range(2 + number % 3)]
        made.append({"query": texts[number][: draw.randint(5, 90)] + " " * (number % 2), "choices": choices})
    made.append({"query": " ".join(texts[:2]), "choices": [" and so on", texts[5][:60]]})  # longer than LONGEST
    made.append({"query": ODD, "choices": [ODD, " \U0001f980", "\n"]})
    made.append({"query": "", "choices": ["The", "</s>x", "ä"]})
    made.append({"query": "Which of them?", "choices": [" A", " B", " C", " D"]})
    return [{**one, "gold": draw.randrange(len(one["choices"])), "text": text}
            for one, text in zip(made, [*texts[: len(made) - 2], ODD, "x"], strict=True)]  # fmt: skip


def continued(exported: Path, text: str) -> str:
    """Three tokens out of the middle of the model's own continuation of ``text``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    before = torch.tensor([tokenizer(text).input_ids])
    said = model.generate(before, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, before.shape[1] :]
    return str(tokenizer.decode(said[6:9]))


def likely(exported: Path, texts: list[str]) -> dict[str, Any]:
    """A question whose first choice is the model's own prediction, with a token that survives as text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    for text in texts:
        query = text[:30].strip()
        before = tokenizer(query).input_ids
        with torch.no_grad():
            said = int(model(torch.tensor([before])).logits[0, -1].argmax())
        choice = tokenizer.decode(said)
        if tokenizer(query + choice).input_ids == [*before, said]:
            return {"query": query, "choices": [choice, choice + " x"], "gold": 0, "text": choice}
    raise AssertionError("no text is gone on with by a whole token")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_documents: list[str], models: tuple[Path, Path]) -> Path:
    """YAML files of tasks on local JSON lines."""
    made = tmp_path_factory.mktemp("tasks")
    data = made / "documents.jsonl"
    lines = [*documents(tiny_documents), likely(models[1], tiny_documents)]
    data.write_text("".join(json.dumps(one) + "\n" for one in lines))
    until = continued(models[1], lines[1]["query"])
    for name, task in TASKS.items():
        files = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "fewshot_split": "test",
        }
        if name == "tiny_story":
            settings = task["generation_kwargs"]
            task = {**task, "generation_kwargs": {**settings, "until": [*settings["until"], until]}}
        (made / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **files, **task}))
    lost = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(made / "no.jsonl")}}}
    (made / "lost.yaml").write_text(yaml.safe_dump({**TASKS["tiny_bare"], "task": "tiny_lost", **lost}))
    for name, settings in (("beams", {"num_beams": 2}), ("cold", {"do_sample": True})):
        story = {**TASKS["tiny_story"], "task": f"tiny_{name}", "generation_kwargs": {"until": ["x"], **settings}}
        (made / f"{name}.yaml").write_text(yaml.safe_dump({**files, **story}))
    (made / "group.yaml").write_text(yaml.safe_dump(GROUP))
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Callable[..., Path]) -> tuple[Path, Path]:
    """A checkpoint with a padded vocabulary whose tokenizer puts a BOS before a text, and the export of it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from megatron_prune.convert.huggingface import export_hf, import_hf

    home = tmp_path_factory.mktemp("with-bos")
    source, checkpoint, exported = (home / name for name in ("hf", "checkpoint", "exported"))
    shutil.copytree(tiny_hf("llama-gqa", layers=2), source)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>").save_pretrained(source)
    import_hf(source, checkpoint, make_vocab_size_divisible_by=768)
    export_hf(checkpoint, exported)
    return checkpoint, exported


def own_manager(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def hflm(models: tuple[Path, Path], folder: Path) -> Callable[..., Any]:
    """lm-eval's own results for the export, by its own command's function, in padded batches of four."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(models[1]), device="cpu", dtype="float32", batch_size=4)
    assert model.max_length == LONGEST
    manager = own_manager(folder)

    def results(*tasks: str, longest: int = LONGEST, batch: int = 4, **settings: Any) -> Any:
        model._max_length, model.batch_size_per_gpu = longest, batch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)  # system information: takes eight seconds
            return lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, **settings)

    return results


def likelihoods(samples: list[dict[str, Any]]) -> list[tuple[float, bool | None]]:
    """For every request in order; for whole texts lm-eval has no greedy flag."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    answers = [answer[0] for sample in ordered for answer in sample["resps"]]
    return [(one[0], one[1]) if isinstance(one, list | tuple) else (one, None) for one in answers]


def evaluate(job: Any, checkpoint: Path, folder: Path, output: Path, *more: object, nproc: int = 1) -> Any:
    words = ["evaluate", "--load", checkpoint, "--tasks-path", folder, "--output", output]
    return job([*words, *more], nproc=nproc, env={"HF_DATASETS_CACHE": str(folder / "cache")})


def agree(tasks: dict[str, Any], samples: Path, expected: Any, task: str) -> None:
    """Every request's likelihood, whether it is greedy, and every metric of one task."""
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    found = likelihoods([line for line in lines if line["task"] == task])
    wanted = likelihoods(expected["samples"][task])
    assert len(found) == len(wanted)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    # HFLM sums in fp32, whose last bit is 1.2e-4 at a thousand.
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4, rel=2e-7)
    result = tasks["results"][task]
    scores = tasks["questions"][task]["scores"]
    assert set(scores) == ({"acc", "acc_norm"} if "choices" in task else set())  # perplexities are no means
    for metric, own in scores.items():
        ordered = sorted(expected["samples"][task], key=lambda sample: sample["doc_id"])
        assert own == [sample[metric] for sample in ordered]
    assert tasks["single"][task] == [task]
    assert result["samples"] == expected["n-samples"][task]["effective"]
    assert result["samples_of"] == expected["n-samples"][task]["original"] == 19
    assert result["num_fewshot"] == expected["n-shot"][task]
    assert result["version"] == TASKS[task]["metadata"]["version"]
    for metric in ("acc", "acc_norm") if "choices" in task else ("word_perplexity", "bits_per_byte"):
        one, value = result["metrics"][metric], expected["results"][task][f"{metric},none"]
        assert one["value"] == (value if "acc" in metric else pytest.approx(value, rel=1e-5))
        assert one["higher_is_better"] == ("acc" in metric)
        if "acc" in metric:
            assert one["stderr"] == pytest.approx(expected["results"][task][f"{metric}_stderr,none"])


def answers(samples: list[dict[str, Any]]) -> list[str]:
    """The texts that were generated, in the order of the questions."""
    return [text for sample in sorted(samples, key=lambda sample: sample["doc_id"]) for text in sample["resps"][0]]


@pytest.fixture(scope="module")
def expected(hflm) -> dict[str, Any]:
    found = hflm("tiny_choices", "tiny_text")
    assert {greedy for _, greedy in likelihoods(found["samples"]["tiny_choices"])} == {True, False}
    # One prompt per batch: in a larger one, HFLM looks for a written BOS in the first text only.
    found |= {"story": answers(hflm("tiny_story", batch=1)["samples"]["tiny_story"])}
    assert "" not in found["story"] and len({len(text) for text in found["story"]}) > 5, "texts that end early"
    return found


@pytest.fixture(scope="module")
def drawn() -> list[list[str]]:
    """Sampled texts of the layouts so far."""
    return []


@pytest.mark.parametrize(("first", "second"), LAYOUTS)
def test_every_layout_says_what_hflm_says_of_the_export(
    first, second, models, folder, expected, drawn, job, tmp_path
) -> None:
    for tp, pp, dp, batch in (first, second):
        output, samples = tmp_path / "scores.json", tmp_path / "samples.jsonl"
        named = "tiny_choices,tiny_text,tiny_story,tiny_drawn"
        flags = [*layout(tp, pp), "--micro-batch-size", batch, "--tasks", named, "--task-samples", samples]
        evaluate(job, models[0], folder, output, *flags, nproc=tp * pp * dp).ok()
        tasks = json.loads(output.read_text())["tasks"]
        assert (tasks["longest"], tasks["limit"], tasks["micro_batch_size"]) == (LONGEST, None, batch)
        assert tasks["truncated"] == 5, "the long question: both choices, the story, and twice the draws"
        for task in ("tiny_choices", "tiny_text"):
            agree(tasks, samples, expected, task)
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert answers([line for line in lines if line["task"] == "tiny_story"]) == expected["story"]
        drawn.append(answers([line for line in lines if line["task"] == "tiny_drawn"]))
        assert drawn[-1] == drawn[0]
    repeats = zip(drawn[0][::2], drawn[0][1::2], strict=True)
    assert sum(one != other for one, other in repeats) > 15, "each repeat draws for itself"


@SLOW
def test_answers_do_not_depend_on_what_was_asked_before(models, folder, job, tmp_path) -> None:
    """Tasks that are added to a file of scores: as if all had been asked at once, sampled texts too."""
    names = "tiny_choices,tiny_story,tiny_drawn"  # the story's prompts are those of the drawn one

    def asked(tasks: str, scores: str, *more: object) -> tuple[Any, dict[str, list[Any]]]:
        evaluate(job, models[0], folder, tmp_path / scores, "--tasks", tasks, "--task-samples", tmp_path / "s", *more)
        lines = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
        texts = {name: [line["resps"] for line in lines if line["task"] == name] for name in names.split(",")}
        return json.loads((tmp_path / scores).read_text())["tasks"], texts

    once, texts = asked(names, "once")
    _, first = asked("tiny_drawn,tiny_choices", "twice")
    twice, added = asked(names, "twice", "--extend")
    assert once == twice and once["truncated"] > 3
    assert added == {"tiny_choices": [], "tiny_story": texts["tiny_story"], "tiny_drawn": []}, "asked once"
    assert first["tiny_drawn"] == texts["tiny_drawn"] and first["tiny_choices"] == texts["tiny_choices"]


def test_examples_limit_and_length_beside_a_corpus(models, folder, hflm, tiny_corpus, job, tmp_path) -> None:
    expected = hflm("tiny_choices", longest=64, num_fewshot=2, limit=5)
    output, samples = tmp_path / "scores.json", tmp_path / "samples.jsonl"
    flags = ["--tasks", "tiny_choices", "--num-fewshot", 2, "--limit", 5, "--task-samples", samples]
    corpus = ["--data-path", tiny_corpus, "--windows", 3, "--seq-length", 64]
    printed = evaluate(job, models[0], folder, output, *flags, *corpus).ok().output
    scores = json.loads(output.read_text())
    assert scores["tasks"]["limit"] == 5 and scores["tasks"]["longest"] == 64 and scores["tasks"]["truncated"] > 2
    agree(scores["tasks"], samples, expected, "tiny_choices")
    assert len(scores["corpora"][str(tiny_corpus)]["window_losses"]) == 3
    accuracy = scores["tasks"]["results"]["tiny_choices"]["metrics"]["acc"]
    assert f"tiny_choices: acc {accuracy['value']:.4f} ± {accuracy['stderr']:.4f}" in printed


def test_groups_are_named_with_their_tasks(hflm) -> None:
    found = tasks.results(hflm("tiny_all", "tiny_text"))
    assert found["tiny_all"]["tasks"] == ["tiny_choices", "tiny_bare"]
    parts = [found[name]["metrics"]["acc"]["value"] for name in ("tiny_choices", "tiny_bare")]
    assert found["tiny_all"]["metrics"]["acc"]["value"] == pytest.approx(sum(parts) / 2)
    json.dumps(found, allow_nan=False)  # lm-eval writes "N/A" for unknown values


def flags(**given: Any) -> argparse.Namespace:
    empty = {"tasks": None, "tasks_path": None, "num_fewshot": None, "limit": None, "fp8": None}
    return argparse.Namespace(**{**empty, "sequence_parallel": False, **given})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tasks": "tiny_choice"}, "expected tiny_choices.*, got tiny_choice"),
        ({"tasks": "tiny_story", "longest": 24}, "fewer than 24 new tokens, got tiny_story, which generates up to 24"),
        ({"tasks": "tiny_beams"}, "expected generation_kwargs among until, .*top_k.*, got tiny_beams with num_beams"),
        ({"tasks": "tiny_cold"}, "expected a positive temperature, got tiny_cold"),
        ({"tasks": "tiny_all,tiny_bare"}, "each task once.*tiny_bare"),
        ({"tasks": "tiny_bare", "num_fewshot": 2}, "--num-fewshot: expected 0 with tiny_bare, got 2"),
        ({"tasks": "tiny_lost"}, "--tasks tiny_lost: lm-eval cannot load it"),
    ],
)
def test_tasks_that_cannot_run_are_refused(given, says, folder, monkeypatch) -> None:
    from megatron_prune.evaluation.generation import GenerationDefaults

    manager = own_manager(folder)
    monkeypatch.setattr(tasks, "_manager", lambda _: manager)
    longest = given.pop("longest", LONGEST)
    with pytest.raises(MegatronPruneError, match=says):
        check = partial(tasks._refuse_generation, GenerationDefaults(frozenset([0]), {}, "</s>"), longest)
        tasks.load(flags(**given), check)


@pytest.mark.parametrize(
    ("given", "words", "says"),
    [
        ({"limit": 5}, ["--limit=5"], "--limit: expected --tasks with it"),
        ({"tasks": "x", "limit": 0}, [], "--limit: expected .*, got 0"),
        ({"tasks": "x", "num_fewshot": -1}, [], "--num-fewshot: expected .*, got -1"),
        ({"tasks": "x", "tasks_path": "/nowhere"}, [], "--tasks-path: expected .*, got /nowhere"),
        ({"tasks": "x", "sequence_parallel": True}, [], "--sequence-parallel"),
    ],
)
def test_flags_that_cannot_work_are_refused(given, words, says) -> None:
    with pytest.raises(UsageError, match=says):
        tasks.refuse_unfit(flags(**given), words)


def test_without_lm_eval_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape("pip install 'megatron_prune[eval]'")):
        tasks.refuse_unfit(flags(tasks="arc_easy"), [])
    tasks.refuse_unfit(flags(), [])


def test_only_names_of_the_folder_spare_lm_evals_own_list(folder, monkeypatch) -> None:
    asked = []

    class Manager:
        all_subtasks = ("tiny_choices", "tiny_text")

        def __init__(self, include_path: str, include_defaults: bool = True):
            asked.append(include_defaults)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    for named, wanted in (("tiny_choices", [False]), ("tiny_all", [False, True]), ("tiny_text,piqa", [False, True])):
        asked.clear()
        tasks._manager(flags(tasks=named, tasks_path=str(folder)))
        assert asked == wanted, named


def test_lm_evals_own_list_is_read_once(monkeypatch) -> None:
    made = []
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: made.append(1) or object())
    monkeypatch.setattr(tasks, "_built_in", functools.cache(tasks._built_in.__wrapped__))
    lists = [tasks._manager(flags(tasks=named, tasks_path=None)) for named in ("piqa", "arc_easy")]
    assert lists[0] is lists[1] and len(made) == 1


def test_a_task_that_cannot_run_is_refused_before_the_model_is_loaded(models, folder, job, tmp_path) -> None:
    refused = evaluate(job, models[0], folder, tmp_path / "scores.json", "--tasks", "tiny_beams")
    assert refused.returncode == 2 and "got tiny_beams with num_beams" in refused.output
    assert "loading distributed checkpoint" not in refused.output and not (tmp_path / "scores.json").exists()


class Letters:
    """A tokenizer whose tokens are characters, and 0 the end of a document."""

    type, model, vocab_size, bos, eod = "Letters", "letters", 128, None, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    encode_whole = encode

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        return "".join(map(chr, ids))


def test_what_the_model_cannot_score_is_named() -> None:
    from lm_eval.api.instance import Instance

    from megatron_prune.evaluation.generation import GenerationDefaults
    from megatron_prune.evaluation.language_model import MegatronLM

    asked: list[Any] = []

    class Runs:
        def score(self, requests: Any) -> Any:
            asked.extend(requests)
            return [(-1.0, False)] * len(requests)

    model = MegatronLM(Letters(), 4, Runs(), GenerationDefaults(frozenset([0]), {}, "\0"))

    def request(kind: str, *arguments: Any) -> list[Instance]:
        return [Instance(kind, {}, arguments, 0, metadata=("mixed", 0, 1))]

    model.loglikelihood(request("loglikelihood", "abcdefg", "xy"))
    assert [(one.inputs, one.targets) for one in asked] == [(tuple(b"efgx"), tuple(b"xy"))] and model.truncated == 1
    assert model.loglikelihood_rolling(request("loglikelihood_rolling", "abcdef")) == [-2.0]
    assert [one.targets for one in asked[1:]] == [tuple(b"abcd"), tuple(b"ef")] and asked[1].inputs[0] == 0
    with pytest.raises(DataError, match="'' adds no tokens"):
        model.loglikelihood(request("loglikelihood", "abc", ""))
    with pytest.raises(DataError, match="has 5 tokens, expected at most 4"):
        model.loglikelihood(request("loglikelihood", "abc", "vwxyz"))
    with pytest.raises(UsageError, match="fewer than 4 new tokens, got mixed, which generates up to 256"):
        model.generate_until(request("generate_until", "abc", {}))


def test_a_sampled_text_is_drawn_as_if_its_task_were_alone() -> None:
    from lm_eval.api.instance import Instance

    from megatron_prune.evaluation.generation import GenerationDefaults
    from megatron_prune.evaluation.language_model import MegatronLM

    asked: list[Any] = []

    class Runs:
        def generate(self, requests: Any) -> Any:
            asked.extend(requests)
            return [[ord("z")]] * len(requests)

    def requests(task: str) -> list[Instance]:
        settings = {"until": ["\n"], "max_gen_toks": 2, "do_sample": True, "temperature": 1.0}
        return [Instance("generate_until", {}, (text, settings), 0, metadata=(task, number, 2))
                for number, text in enumerate(("ab", "ab", "c"))]  # fmt: skip

    model = MegatronLM(Letters(), 9, Runs(), GenerationDefaults(frozenset([0]), {}, "\0"), seed=5)
    model.generate_until(requests("one"))
    alone = [one.draw for one in asked]
    assert alone == [(5, 0, 97, 98), (5, 1, 97, 98), (5, 0, 99)], "by seed, repeat and prompt"
    asked.clear()
    model.generate_until([*requests("two"), *requests("one")])
    assert [one.draw for one in asked] == alone * 2
