"""Tasks from JSON lines: what is read, how it is tokenized, and what is refused by line or example."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.data import multiple_choice
from megatron_prune.data.multiple_choice import Example
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import DataError

GOOD = {"query": "Bees make", "choices": ["wax", "pure silk"], "gold": 0}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_names_of_keys_and_of_lm_evals_documents(tmp_path: Path) -> None:
    other = {"question": "Bees make", "choices": ["wax", "pure silk"], "answer": 0, "id": "b7"}
    both = GOOD | {"question": "raw", "answer": "wax"}
    odd = {"gold": 1, "choices": ["is\u2028late", "is late"], "query": ["The bus", "The tram"]}
    task = multiple_choice.read(write(tmp_path / "t.jsonl", GOOD, "", other, both, json.dumps(odd, ensure_ascii=False)))
    bees = Example(("Bees make", "Bees make"), ("wax", "pure silk"), 0)
    assert task.examples == (bees, bees, bees, Example(("The bus", "The tram"), ("is\u2028late", "is late"), 1))
    other = multiple_choice.read(write(tmp_path / "u.jsonl", GOOD, GOOD, json.dumps(GOOD, indent=None), odd))
    assert other.fingerprint == task.fingerprint != multiple_choice.read(write(tmp_path / "v.jsonl", GOOD)).fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a line of JSON"),
        ('{"gold": ' + "1" * 5000 + "}", "line 2: expected a line of JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ({"choices": ["a", "b"], "gold": 0}, "line 2: expected the key query or question, got choices, gold"),
        ({"query": "q", "gold": 0}, "line 2: expected the key choices, got"),
        ({"query": "q", "choices": ["a", "b"]}, "line 2: expected the key gold or answer, got"),
        (GOOD | {"choices": ["only"]}, "choices: expected a list of two or more texts"),
        (GOOD | {"choices": "ab"}, "choices: expected a list of two or more texts"),
        (GOOD | {"choices": ["a", 1]}, "choices: expected a list of two or more texts"),
        (GOOD | {"choices": ["a", " \n"]}, "line 2: choice 1: expected a text, got none"),
        (GOOD | {"query": ["one"]}, "query: expected a text, or a list of one text for each of 2 choices"),
        (GOOD | {"query": 3}, "query: expected a text, or a list"),
        (GOOD | {"gold": 2}, "gold: expected the number of a choice, 0 to 1, got 2"),
        (GOOD | {"gold": -1}, "gold: expected the number of a choice"),
        (GOOD | {"gold": True}, "gold: expected the number of a choice"),
        (GOOD | {"gold": "A"}, "gold: expected the number of a choice, 0 to 1, got 'A'"),
    ],
)
def test_lines_that_are_no_example_are_refused(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        multiple_choice.read(write(tmp_path / "t.jsonl", GOOD, line))


def test_files_without_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the task .*nowhere"):
        multiple_choice.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="expected examples"):
        multiple_choice.read(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read the task"):
        multiple_choice.read(tmp_path / "bytes.jsonl")


def encode(folder: Path, tokenizer: Path, example: dict[str, Any], longest: int = 128) -> Any:
    task = multiple_choice.read(write(folder / "t.jsonl", example))
    return multiple_choice.encode(task, load_tokenizer("HuggingFaceTokenizer", tokenizer), longest)


def test_a_choice_is_the_tokens_that_it_adds(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tiny_tokenizer)
    found = encode(
        tmp_path, tiny_tokenizer, {"query": ["Bees make  ", "Ants"], "choices": ["wax", "pure silk"], "gold": 0}
    )
    for sequence, scored, query, whole in zip(
        found.sequences, found.scored, ("Bees make", "Ants"), ("Bees make   wax", "Ants pure silk"), strict=True
    ):
        context = tokens.encode(query, add_special_tokens=False)
        assert sequence.tolist() == tokens.encode(whole, add_special_tokens=False)
        assert len(sequence) - scored == len(context)


def test_what_no_model_can_score_is_refused(tmp_path: Path, tiny_tokenizer: Path) -> None:
    with pytest.raises(DataError, match="example 1, choice 'wax': expected a query with tokens"):
        encode(tmp_path, tiny_tokenizer, GOOD | {"query": "  "})
    with pytest.raises(DataError, match="choice '.*': expected at most 9 tokens, which the model takes, got [0-9]+"):
        encode(tmp_path, tiny_tokenizer, GOOD, longest=9)


def test_a_choice_without_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "bees": 1, "wax": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.normalizer = normalizers.Replace("!", "")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "words")
    with pytest.raises(DataError, match="choice '!!': expected a choice that adds tokens to its query"):
        encode(tmp_path, tmp_path / "words", {"query": "bees", "choices": ["wax", "!!"], "gold": 0})


def accuracy(likelihoods: list[float], choices: list[str], gold: int) -> dict[str, tuple[int, int, int]]:
    import torch

    from megatron_prune.data.multiple_choice import Task
    from megatron_prune.methods.ranking import accuracies

    task = Task("t", (Example(("q",) * len(choices), tuple(choices), gold),))
    found = accuracies(task, torch.tensor(likelihoods, dtype=torch.float64))
    assert all(one.examples == 1 for one in found.values())
    return {metric: (one.correct, one.low, one.high) for metric, one in found.items()}


@pytest.mark.parametrize(
    ("likelihoods", "gold", "acc", "acc_norm"),
    [
        ([-3.0, -4.0], 0, (1, 1, 1), (0, 0, 0)),  # 1.5 per character against 1
        ([-3.0, -4.0], 1, (0, 0, 0), (1, 1, 1)),
        ([-4.0, -4.0 * (1 - 5e-6)], 0, (0, 0, 1), (0, 0, 0)),  # another layout may find it right
        ([-4.0, -4.0 * (1 - 5e-6)], 1, (1, 0, 1), (1, 1, 1)),
        ([-4.0, -4.0], 0, (1, 0, 1), (0, 0, 0)),  # the first of equal choices is taken
        ([-2.0, -4.0], 1, (0, 0, 0), (0, 0, 1)),
        ([math.nan, -4.0], 0, (0, 0, 0), (0, 0, 0)),  # a model that overflows has no right answers
        ([math.nan, math.nan], 0, (0, 0, 0), (0, 0, 0)),
    ],
)
def test_accuracy_and_what_rounding_can_make_of_it(
    likelihoods: list[float], gold: int, acc: tuple[int, ...], acc_norm: tuple[int, ...]
) -> None:
    assert accuracy(likelihoods, ["ab", "abcd"], gold) == {"acc": acc, "acc_norm": acc_norm}
