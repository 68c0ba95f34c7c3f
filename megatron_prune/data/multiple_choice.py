"""Multiple-choice tasks from a JSON Lines file, as token sequences to be scored by likelihood.

    {"query": "Question: What do bees make?\\nAnswer:", "choices": ["wax and honey", "silk"], "gold": 0}

* ``query`` (or ``question``): the text before the choice; or a list with one text per choice, as in
  WinoGrande's partial evaluation, with the option at the end of the query and the rest of the sentence
  as every choice.
* ``choices``: two or more texts.
* ``gold`` (or ``answer``): the number of the correct choice, from 0. If both names of a key are present,
  the first one counts; other keys are ignored.

Names and rules are lm-eval's: a space separates query and choice, spaces at the end of the query belong to
the choice, and the tokens of a choice are those that it adds to the query's tokens. No special token is
added. Sequences are neither padded nor truncated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_prune.artifacts import sha256_json
from megatron_prune.errors import DataError, MegatronPruneError
from megatron_prune.untrusted import parse_json, read_bytes, show, show_text

if TYPE_CHECKING:
    from megatron_prune.data.tokenizers import Tokenizer

_MOST_BYTES = 64 << 20  # of a file of examples
DELIMITER = " "  # between query and choice
KEYS = (("query", "question"), ("choices",), ("gold", "answer"))


@dataclass(frozen=True)
class Example:
    """A question: ``queries`` and ``choices`` have one entry per choice, ``gold`` is the correct one's number."""

    queries: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """The examples of a file, in order."""

    path: str
    examples: tuple[Example, ...]

    @property
    def fingerprint(self) -> str:
        """Hex digest of the examples, independent of the formatting of their lines."""
        return sha256_json([[e.queries, e.choices, e.gold] for e in self.examples])


@dataclass(frozen=True)
class Requests:
    """A task for one tokenizer: one sequence per choice, example by example.

    The last ``scored[i]`` tokens of ``sequences[i]`` (int64 [n]) belong to the choice.
    """

    task: Task
    sequences: tuple[torch.Tensor, ...]
    scored: tuple[int, ...]


def read(path: str | Path) -> Task:
    """Read a file of examples. Raises DataError naming the first invalid line."""
    try:
        lines = read_bytes(path, _MOST_BYTES).decode().split("\n")
    except (OSError, UnicodeDecodeError, MegatronPruneError) as error:
        raise DataError(f"cannot read the task {path}: {error}") from error
    examples = tuple(_example(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip())
    if not examples:
        raise DataError(f"{path}: expected examples, one JSON object per line, got none")
    return Task(str(path), examples)


def _example(line: str, where: str) -> Example:
    try:
        found = parse_json(line.encode(), where)
    except MegatronPruneError as error:
        raise DataError(
            f"{where}: expected a line of JSON, got something else: {str(error).removeprefix(where).lstrip(': ')}"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(found).__name__}")
    query, choices, gold = (_value(found, names, where) for names in KEYS)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise DataError(f"{where}: choices: expected a list of two or more texts, got {show(choices)}")
    for number, choice in enumerate(choices):
        if not choice.strip():
            raise DataError(f"{where}: choice {number}: expected a text, got none")
    queries = query if isinstance(query, list) else [query] * len(choices)
    if len(queries) != len(choices) or not all(isinstance(q, str) for q in queries):
        raise DataError(
            f"{where}: query: expected a text, or a list of one text for each of {len(choices)} choices, got "
            f"{query!r:.60}"
        )
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise DataError(f"{where}: gold: expected the number of a choice, 0 to {len(choices) - 1}, got {show(gold)}")
    return Example(tuple(queries), tuple(choices), gold)


def _value(found: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in found:
            return found[name]
    keys = ", ".join(map(show_text, list(found)[:8])) or "none"
    raise DataError(f"{where}: expected the key {' or '.join(names)}, got {keys}")


def encode(task: Task, tokenizer: Tokenizer, longest: int) -> Requests:
    """The sequences of ``task``; ``longest`` is the largest number of tokens that the model reads.

    Raises DataError naming the example if the query or a choice has no tokens, or both together have too many.
    """
    sequences, scored = [], []
    for number, example in enumerate(task.examples, 1):
        for query, choice in zip(example.queries, example.choices, strict=True):
            where = f"{task.path}, example {number}, choice {choice!r}"
            context = query.rstrip()
            before = tokenizer.encode(context)
            after = tokenizer.encode(query + DELIMITER + choice)[len(before) :]
            if not before:
                raise DataError(f"{where}: expected a query with tokens, from which the choice is predicted, got none")
            if not after:
                raise DataError(
                    f"{where}: expected a choice that adds tokens to its query, got none in the vocabulary of the model"
                )
            if (read_ := len(before) + len(after) - 1) > longest:
                raise DataError(
                    f"{where}: expected at most {longest} tokens, which the model takes, got {read_}; shorten the query"
                )
            sequences.append(torch.tensor([*before, *after], dtype=torch.int64))
            scored.append(len(after))
    return Requests(task, tuple(sequences), tuple(scored))
