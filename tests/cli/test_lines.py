"""How many lines each verb prints on success without a terminal: a table, made of one chain on the tiny model.

pytest tests/cli/test_lines.py -s      prints the table, as docs/pages/benchmarks.md has it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import screen
from tests.study import made_up

MOST = 40

WINDOWS = "--calibration-sequences 4 --calibration-seq-length 32".split()
TRAINING = "--stream-range 0:16 --global-batch-size 4 --micro-batch-size 1 --lr 1e-3 --log-interval 1".split()
Run = Callable[..., str]


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, int]]:
    """Lines by verb; printed when all tests here have run."""
    found: dict[str, int] = {}
    yield found
    rows = [f"| `{verb}` | {lines} |" for verb, lines in found.items()]
    print("", "| verb | lines on success |", "| --- | --- |", *rows, sep="\n")


@pytest.fixture(scope="module")
def run(job: Any, table: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``run(verb, words, …)``: the output of the verb, as for a user; its lines are in the table."""
    logs = tmp_path_factory.mktemp("logs")
    environment = {screen.VERBOSE_VARIABLE: "0", screen.LOGS_VARIABLE: str(logs)}

    def one(verb: str, words: Sequence[str | Path], nproc: int = 1) -> str:
        name, *action = verb.split()
        if name in WITH_MEGATRON:
            said = job([name, *words], nproc=nproc, env=environment).ok().output
        else:  # in a process of its own: one that is forked has imported Megatron, which changes what is logged
            command = [str(word) for word in (sys.executable, "-m", "megatron_prune", name, *action, *words)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
            assert done.returncode == 0, done.stderr
            said = done.stdout + done.stderr
        lines = said.splitlines()
        table[verb] = max(table.get(verb, 0), len(lines))
        assert len(lines) <= MOST, said
        assert not [line for line in lines if "Warning" in line or "----" in line], said
        return said

    return one


WITH_MEGATRON = ("calibrate", "prune", "sparsify", "pretrain", "evaluate")


def test_from_hugging_face_to_hugging_face(run: Run, tiny_hf: Any, tiny_jsonl: Path, tmp_path: Path) -> None:
    hf = tiny_hf("llama-gqa", layers=4)
    parent, corpus, statistics, plan = (tmp_path / name for name in ("parent", "corpus", "s.safetensors", "p.json"))
    assert f"wrote {parent}" in run("convert import", ["--hf", hf, "--save", parent])
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", hf, "--append-eod"]
    assert "300 documents" in run("preprocess", ["--input", tiny_jsonl, "--output-prefix", corpus, *tokenizer])
    text = ["--calibration-data-path", corpus, *WINDOWS]
    said = run("calibrate", ["--load", parent, *text, "--output", statistics], nproc=2)
    log, read, found = said.splitlines()  # two ranks, of which one prints
    assert log.startswith("log: ") and read.startswith(f"read {parent}/release: 4 layers, 461,664 parameters")
    assert found.startswith("calibrated on 4 sequences of 32 tokens, loss ") and f"wrote {statistics}" in found
    name = Path(log.split()[1])
    assert "rank0" in name.name and "padded_vocab_size" in name.read_text()  # Megatron's dump of its arguments
    job = name.name.split("-")[-2]  # the same for all ranks; the second in which each began is not
    assert len(list(name.parent.glob(f"calibrate-*-{job}-rank1.log"))) == 1
    method = ["--method", "minitron-width", "--ratio", "0.25", "--divisible-by", "8"]
    run("plan", ["--load", parent, "--statistics", statistics, *method, "--output", plan])
    assert f"wrote {tmp_path}/a" in run("apply", ["--load", parent, "--plan", plan, "--save", tmp_path / "a"])
    assert f"wrote {tmp_path}/b" in run("prune", ["--load", parent, *method, *text, "--save", tmp_path / "b"])
    sparse = ["--method", "wanda", "--pattern", "2:4", *text, "--save", tmp_path / "c"]
    said = run("sparsify", ["--load", parent, *sparse])
    assert all(f"wanda: block {number} of 4, layer" in said for number in range(1, 5))
    start = ["--pretrained-checkpoint", tmp_path / "b", "--data-path", corpus, "--seq-length", 32]
    said = run("pretrain", [*start, *TRAINING, "--save", tmp_path / "d"], nproc=2)
    steps = [line for line in said.splitlines() if " lm loss: " in line]  # the last rank knows them
    assert len(steps) == 4 and said.splitlines()[-1] == f"wrote {tmp_path}/d: step 4"
    scores = ["--data-path", corpus, "--windows", 4, "--output", tmp_path / "scores.json"]
    said = run("evaluate", ["--load", tmp_path / "d", *scores])
    assert "perplexity" in said and said.splitlines()[-1] == f"wrote {tmp_path}/scores.json"
    run("inspect", [tmp_path / "d"])
    assert f"wrote {tmp_path}/e" in run("convert export", ["--load", tmp_path / "d", "--hf", tmp_path / "e"])


def test_a_study_before_it_is_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = made_up.mapping(made_up.corpora(tmp_path), methods=[{"name": "shortgpt"}], ratios=[0.5])
    Path("study.yaml").write_text(json.dumps(content))
    assert "shortgpt" in run("study plan", ["study.yaml"])
    run("study status", ["study.yaml"])


def test_on_an_error_the_last_line_is_the_error(job: Any, tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Also where Megatron is already initialized, and on several ranks."""
    environment = {screen.VERBOSE_VARIABLE: "0", screen.LOGS_VARIABLE: str(tmp_path / "logs")}
    words = ["evaluate", "--load", tiny_parent, "--data-path", tiny_corpus, "--windows", "1000000", "--output", "none"]
    refused = job(words, nproc=2, env=environment)
    assert refused.returncode == 2
    assert refused.output.splitlines()[-1].startswith("megatron-prune evaluate: "), refused.output
    assert len(refused.output.splitlines()) <= 4, refused.output
