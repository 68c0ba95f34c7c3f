"""The answer to a wrong command line: exit code 2, one to three lines, the last of them the error.

``python -m pytest tests/cli/test_wrong_inputs.py -s`` prints all of them at its end as a table.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_prune.__main__ import NAMES, main
from megatron_prune.data.indexed import write_index
from megatron_prune.errors import EXIT_REFUSED
from tests.study import made_up
from tests.training.small import MODEL

RECIPE = "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-3"
SHAPE = " ".join(MODEL)
PLAN = "plan --load {parent} --output {new}"
TOKENIZE = "--output-prefix {new} --tokenizer-model {tokenizer} --tokenizer-type HuggingFaceTokenizer"

# The command line, and a pattern of the last line. {new} is a path that does not exist; _places makes the others.
WRONG = [
    ("prnue", "there is no verb 'prnue': did you mean prune.$"),
    ("study plan", "STUDY.yaml"),
    ("apply --load {parent} --plam {text}", "--plam.*--plan"),
    (f"{PLAN} --method random --axis depth --ratoi 0.5", "--ratoi.*--ratio"),
    ("train-tokenizer --input {text} --output {new} --vocab-size many", "--vocab-size.*many"),
    ("calibrate --output {new}.safetensors --calibration-sequense 8", "did you mean --calibration-seq"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --weigth-decay 0.1", "--weigth-decay.*--weight-decay"),
    (f"{PLAN} --method nothere --ratio 0.5", "--method: expected one of .*shortgpt.*, got nothere"),
    (f"{PLAN} --method wanda --ratio 0.5", "--method: .* got wanda .*sparsify"),
    (f"{PLAN} --method random --ratio 0.5", "--axis: expected depth or width, got nothing"),
    (f"{PLAN} --method shortgpt --ratio 1.5", "--ratio: expected the fraction to remove, .* got 1.5"),
    (f"{PLAN} --method shortgpt --ratio 0.5 --target-params 9", "--ratio: .* got --ratio and --target-params"),
    (f"{PLAN} --method shortgpt --ratio 0.5 --divisible-by 0", "--divisible-by: .* got 0"),
    (f"{PLAN} --method shortgpt --ratio 0.5", "--statistics: expected a file of statistics, .* got nothing; make one"),
    (f"{PLAN} --method random --axis depth --ratio 0.5 --statistics {{text}}", "--statistics: .*needs no statistics"),
    (f"{PLAN} --method random --axis depth --target-hidden-size 32 --seed 1", "--target-hidden-size: .* got 32"),
    (f"{PLAN} --method random --axis depth --ratio 0.5 --seed -1", "--seed: expected 0 or more, got -1"),
    ("apply --load {new} --plan {text} --save {folder}/out", "{text} is not valid JSON"),
    ("apply --load {parent} --plan {new} --save {folder}/out", "{new}"),
    ("apply --load {parent} --plan {text} --save {folder}/out", "{text}"),
    ("retrain-candidates --load {parent} --candidates {new} --statistics {text} --scratch {folder}", "{new}"),
    ("build-index --seq-length 32", "--data-path, --train-data-path: expected exactly one of them, got"),
    ("build-index --data-path {new} --seq-length 32", r"{new}\.(bin|idx) does not exist"),
    ("study plan {new}", "STUDY.yaml: expected the YAML file of a study, got .* does not exist"),
    ("study plan {text}", "expected a mapping of keys to values"),
    ("study plan {folder}/unknown_key.yaml", "recipe.learning_rate: expected one of .*, got an unknown key"),
    ("study plan {folder}/no_budget.yaml", "budgets: expected a value, .* got nothing"),
    ("study plan {folder}/broken.yaml", "expected valid YAML, got .*line"),
    ("study plan {folder}/method.yaml", "--method: expected one of .*, got wandering"),
    ("study plan {study} --gpus 8", "--gpus: expected --throughput with it"),
    ("study plan {study} --throughput fast", "--throughput: expected tokens per second"),
    ("study report {study} --runs-dir {folder}/runs", "study report: expected the folder of a study that has begun"),
    ("advise --ledger {new} --ratio 0.5 --tokens 1M", "--ledger: expected the folder of a study that has a report"),
    ("convert import --hf {new} --save {folder}/out", "{new}"),
    ("convert import --hf {tokenizer} --save {folder}/out", "without config.json|config.json"),
    ("convert export --load {new} --hf {folder}/out", "{new}"),
    ("convert export --load {tokenizer} --hf {folder}/out", "{tokenizer}"),
    ("inspect {new}", "{new}"),
    ("prepare-suite paper-one-shot", "SUITE: expected paper-zero-shot or paper-perplexity, got paper-one-shot"),
    ("benchmark {parent} {new}", "{new}"),
    ("benchmark --static", "CKPT … is required"),
    ("benchmark {parent} --batch 0", "--batch: expected at least 1, got 0"),
    ("latency-table {parent} --output {new} --points 1", "--points: expected at least 2, got 1"),
    (f"{PLAN} --method random --axis depth --ratio 0.5 --at-most latency=5ms", "--latency-table: .* nothing; measure"),
    (f"preprocess --input {{text}} --input-tokens int32 {TOKENIZE}", "--input-tokens: expected whole records .*{text}"),
    ("inspect s3://bucket/checkpoint", "expected a directory, or msc://PROFILE/… with --enable-msc, got s3://bucket"),
    (f"preprocess --input {{new}} {TOKENIZE}", "--input: expected existing files .*, got .*{new}"),
    (f"preprocess {TOKENIZE}", "--input, --dataset: expected exactly one of them, got neither"),
    (f"preprocess --input {{text}} --workers 0 {TOKENIZE}", "--workers: expected at least 1 process, got 0"),
    (f"preprocess --input {{folder}}/table.csv {TOKENIZE}", "--input-format: expected jsonl, .*array_record or text"),
    ("preprocess --input {text} --output-prefix {new} --tokenizer-type HuggingFaceTokenizer --tokenizer-model nothere",
     "--tokenizer-model: expected a directory .*, got nothere .no directory nothere, .* HF_HUB_OFFLINE is set"),
    ("preprocess --input {text} --output-prefix {new} --tokenizer-type NullTokenizer --tokenizer-model x",
     "--tokenizer-type: expected .*, got NullTokenizer"),
    ("train-tokenizer --input {text} --output {new} --vocab-size 3", "--vocab-size: expected at least .*, got 3"),
    ("check-contamination --train {corpus}", "expected corpora of at least two stages, got those of 1"),
    ("check-contamination --train {corpus} --test {corpus} --similarity 7", "--similarity: .* got 7"),
    ("reshard-optimizer {new}", "{new}"),
    ("calibrate --output {new}.safetensors", "--calibration-data-path: expected .*, got nothing"),
    ("calibrate --output {new}.safetensors --calibration-data-path {corpus}", "--load: expected .*, got nothing"),
    ("calibrate --load {new} --calibration-data-path {corpus} --output {new}.pt", "--output: .*safetensors, got"),
    ("sparsify --method wanda --ratio 0.5", "--save: expected a directory for the pruned checkpoint, got nothing"),
    ("sparsify --method nothere --ratio 0.5 --save {new}", "--method: expected one of .*, got nothere"),
    ("sparsify --method wanda --pattern 4:2 --save {new}", "--pattern: expected .*, got 4:2"),
    ("sparsify --method wanda --ratio 0.5 --layers 3-1 --save {new}", "--layers: expected .*, got 3-1"),
    ("sparsify --method wanda --ratio 0.5 --save s3://b/x", "--save: .* got s3://b/x"),
    ("prune --method shortgpt --ratio 0.5", "--save: expected a directory for the pruned checkpoint, got nothing"),
    ("evaluate --output {new}", "--load: expected a checkpoint to evaluate, got nothing"),
    ("evaluate --seq-length 32 --output {new} --load {new} --data-path {corpus}", "--load: expected .*, got {new}"),
    ("evaluate --use-checkpoint-args --seq-length 32 --output {new} --load {tokenizer} --tasks x", "{tokenizer}"),
    ("evaluate --output {new} --load {parent}", "--data-path: expected prefixes of tokenized corpora, .* got nothing"),
    ("evaluate --output {new} --load {parent} --tasks ,", "--data-path: expected prefixes of .* got nothing"),
    ("preflight --gpus 8", "VERB: expected one of pretrain, .*, after those of preflight, got nothing"),
    ("preflight --gpus 8 --installed cuda pretrain", "--installed: expected none, or some of .*, got cuda"),
    ("teach --stream-range 0:4 --top-k 4", "--output DIR is required"),
    ("teach --stream-range 0:4 --top-k 4 --load {new} --output {new}.cache", "--load: expected the directory of a .*"),
    ("learn-masks --ratio 0.5 --mask-tokens 128 --stream-range 0:4", "--stream-range: expected no such flag"),
    ("learn-masks --mask-lr 1", "--ratio: expected exactly one of --ratio, --target-params, .* got no target"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --bf16 --fp16", "--bf16, --fp16: expected at most one of them, got both"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --tensor-model-parallel-size 2",
     "--tensor-model-parallel-size: expected a size that divides the number of ranks, 1, got 2; start more ranks"),
    (f"pretrain {SHAPE} {RECIPE} --data-path {{corpus}}", "--split: .*the test part of .* is empty, of 20 documents"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --seed 0", "--seed: expected a number from 1 to 4294967295, got 0"),
    (f"pretrain {SHAPE} {RECIPE} --train-data-path {{corpus}} --stream-range 5:3", "--stream-range: .* got 5:3"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --pretrained-checkpoint {{new}}",
     "--pretrained-checkpoint: expected the directory of a checkpoint, got {new}, which does not exist"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --yaml-cfg {{text}}", "--yaml-cfg: expected no such flag here"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --logits-load-dir {{new}}", "--logits-load-dir: expected no such flag"),
    (f"pretrain {SHAPE} {RECIPE} --mock-data --tokenizer-type HuggingFaceTokenizer --tokenizer-model nothere",
     "--tokenizer-model: expected a directory .*, got nothere"),
]  # fmt: skip


def run_each(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of every command, each in a fork of this process."""
    return [_run(words) for words in commands]


def _run(words: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = 1
            try:
                logging.root.handlers.clear()  # Megatron, which this process has imported, sets one up
                code = main(words)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


def _places(folder: Path, parent: Path, tokenizer: Path) -> dict[str, str]:
    """Paths for the names in braces: all exist except ``new``."""
    corpus = folder / "corpus"
    write_index(f"{corpus}.idx", [np.full(20, 50)], [np.ones(20, np.int64)], "int32")
    Path(f"{corpus}.bin").write_bytes(np.zeros(1000, np.int32).tobytes())
    (folder / "text.txt").write_text("This is neither JSON nor YAML of any use.\n")
    (folder / "table.csv").write_text("a,b\n1,2\n")
    study = made_up.mapping(made_up.corpora(folder))
    studies: dict[str, Mapping[str, Any]] = {
        "study": study,
        "unknown_key": {**study, "recipe": {**study["recipe"], "learning_rate": 1}},
        "no_budget": {key: value for key, value in study.items() if key != "budgets"},
        "method": {**study, "methods": [{"name": "wandering"}]},
    }
    for name, content in studies.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "broken.yaml").write_text("name: [\n")
    return {
        "folder": str(folder), "new": str(folder / "new"), "corpus": str(corpus), "text": str(folder / "text.txt"),
        "parent": str(parent), "tokenizer": str(tokenizer), "study": str(folder / "study.yaml"),
    }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The answer to a row of WRONG; in ``shown`` its paths are the names in braces."""

    command: str
    says: str  # a pattern of the last line
    code: int
    lines: list[str]
    shown: str


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, distributed: Callable[..., Any], tiny_parent: Path, tiny_tokenizer: Path
) -> list[Answer]:
    places = _places(tmp_path_factory.mktemp("wrong"), tiny_parent, tiny_tokenizer)
    escaped = {name: re.escape(path) for name, path in places.items()}
    commands = [line.format(**places) for line, _ in WRONG]
    (found,) = distributed(run_each, 1, [command.split() for command in commands])
    answers = []
    for command, (_, says), (code, output) in zip(commands, WRONG, found, strict=True):
        shown = output.rstrip().rpartition("\n")[2]
        for name, path in sorted(places.items(), key=lambda item: -len(item[1])):
            shown = shown.replace(path, name)
        answers.append(Answer(command, says.format(**escaped), code, output.splitlines(), shown))
    return answers


@pytest.mark.parametrize("row", range(len(WRONG)), ids=[line.split()[0] for line, _ in WRONG])
def test_a_wrong_command_line_is_answered_in_three_lines_at_most(answers: list[Answer], row: int) -> None:
    answer = answers[row]
    said = f"{answer.command}\nexits with {answer.code} and prints\n" + "\n".join(answer.lines[-40:])
    assert answer.code == EXIT_REFUSED, said
    assert 1 <= len(answer.lines) <= 3, said
    assert re.search(answer.says, answer.lines[-1]), said


def test_the_table(answers: list[Answer]) -> None:
    """Shown with ``-s``."""
    rows = [(line.replace(f"{SHAPE} {RECIPE}", "…"), answer) for (line, _), answer in zip(WRONG, answers, strict=True)]
    verbs = {line.split()[0] for line, _ in rows}
    assert len(rows) >= 40 and set(NAMES) - {"launch-files", "build-corpus"} <= verbs
    counts = Counter(len(answer.lines) for answer in answers)
    print(f"\n\n{len(rows)} inputs, {len(verbs & set(NAMES))} of {len(NAMES)} verbs; lines: times {dict(counts)}\n")
    print("| wrong input | lines | last line |\n| --- | --- | --- |")
    for line, answer in rows:
        cells = (f"`{line}`", str(len(answer.lines)), answer.shown)
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
