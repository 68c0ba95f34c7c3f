"""Miniature studies on the real engine, through the command line; killed and run again, they end with the same numbers.

The one that runs by default is killed three times, at chosen moments. The other is of three methods, two ratios, three
seeds and both settings, and is killed at random moments, as often as KILLS says:

    KILLS=12 python -m pytest tests/study/test_end_to_end.py -k random --timeout 3000
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.errors import AccountError
from megatron_prune.study.analysis import results
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.prunings import Places
from tests.study import made_up
from tests.waiting import LONGEST, content, wait_for_progress

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = made_up.SHAPE_FLAGS | {
    "tokenizer-type": "NullTokenizer",
    "max-position-embeddings": 16,
    "attention-dropout": 0,
    "hidden-dropout": 0,
}


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_prune", "study", "run", "study.yaml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def finish(folder: Path, timeout: float = LONGEST) -> str:
    job = start(folder)
    output, _ = job.communicate(timeout=timeout)
    assert job.returncode == 0, output
    return output


def kill_when(folder: Path, path: str, lines: int = 1) -> None:
    """Start the study and kill its runner as soon as the file has that many lines."""
    job = start(folder)
    target = folder / "runs" / "made-up" / path
    wait_for_progress(
        lambda: (target.is_file() and target.read_bytes().count(b"\n") >= lines) or job.poll() is not None,
        f"{lines} lines of {path}",
        lambda: content(folder),
    )
    job.kill()
    output, _ = job.communicate()
    assert job.returncode == -signal.SIGKILL, output


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Records without times."""
    found = Ledger(Places(folder / "runs" / "made-up").ledger).read()
    return {cell: {k: v for k, v in r.items() if k not in ("seconds", "artifacts")} for cell, r in found.items()}


def forged_and_refused(folder: Path) -> None:
    """The report of a real study accepts its files; with one run's weights in place of another's it does not."""
    places = Places(Path("runs/made-up"))
    with contextlib.chdir(folder):
        found = results.collect(places)
        assert not found.disbelieved and not found.left_out and all(item.match for item in found.compared)
        pruned, scratch = found.compared[0].comparison.pruned, str(found.compared[0].comparison.scratch)
        (held,), (saved,) = (sorted(places.checkpoint(cell).glob("iter_*"))[-1:] for cell in (pruned, scratch))
        shutil.move(saved, folder / "kept")
        shutil.copytree(held, saved)
        with pytest.raises(AccountError, match=rf"{scratch}/scores.json is of weights with fingerprint"):
            results.collect(places)
        shutil.rmtree(saved)
        shutil.move(folder / "kept", saved)


def losses(folder: Path, cell: str) -> list[list[str]]:
    path = Places(folder / "runs" / "made-up").losses(cell)
    return [row[:4] for row in csv.reader(path.open())]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_that_was_killed_ends_with_the_same_numbers(tmp_path: Path) -> None:
    prefixes = made_up.corpora(tmp_path, train=80_000)
    chain = [{"name": "minitron-depth", "ratio": 0.5, "retrain": 2_560}, {"name": "wanda", "pattern": "2:4"}]
    content = made_up.mapping(
        prefixes,
        parent={"pretrain": {"tokens": 38_400, "arguments": ARGUMENTS}},
        methods=[{"name": "minitron-depth"}, {"chain": chain, "compare": ["equal-training"]}],
        budgets=[25_600],
        launch={"parallel_cells": 2, "threads": 1},
    )
    content["recipe"]["save_interval"] = 50
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text(yaml.safe_dump(content))
    output = finish(tmp_path / "whole")
    forged_and_refused(tmp_path / "whole")
    expected = records(tmp_path / "whole")
    assert sorted(record["kind"] for record in expected.values()) == [
        "calibration", "parent", "pruned", "pruned", "pruning", "pruning", "retrained", "scratch", "scratch", "scratch"
    ]  # fmt: skip
    assert output.count("One seed: no interval.") == 3 and "INFO" not in output

    chained = "minitron-depth-r50-t2560-then-wanda-2-4-r50-s1"
    pruned = f"pruned-{chained}-t25600"  # it continues under its masks
    kill_when(tmp_path / "killed", "cells/parent/checkpoint/losses.csv", lines=52)  # inside a cell, after a save
    kill_when(tmp_path / "killed", "ledger.jsonl", lines=4)  # between cells, inside the chain
    kill_when(tmp_path / "killed", f"cells/{pruned}/checkpoint/losses.csv", lines=52)
    finish(tmp_path / "killed")
    assert records(tmp_path / "killed") == expected
    replayed = []
    for cell in ("parent", pruned):
        assert losses(tmp_path / "killed", cell) == losses(tmp_path / "whole", cell)
        account = json.loads(Places(tmp_path / "killed/runs/made-up").account(cell).read_text())
        replayed += account["replayed"]
    # On a busy machine a kill can come as late as the end of a later save; then nothing is replayed.
    assert replayed and all(first % 50 == 1 for first, _ in replayed)

    behind = json.loads(Places(tmp_path / "killed/runs/made-up").account(pruned).read_text())
    assert [(stage["kind"], stage.get("range")) for stage in behind["lineage"]] == [
        ("trained", [0, 2400]), ("pruned", None), ("trained", [2400, 2560]), ("pruned", None)
    ]  # fmt: skip
    assert behind["range"] == [2560, 4160] and expected[f"pruning-{chained}"]["removed_linears"] == pytest.approx(0.75)

    rows = json.loads((tmp_path / "killed/runs/made-up/report/results.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["parent", *["pruned", "scratch"] * 3]
    assert all(row["status"] == "finished" and 0 < row["test_loss"] < 20 for row in rows)
    assert (tmp_path / "killed/runs/made-up/report/index.html").stat().st_size > 50_000
    again = finish(tmp_path / "killed")
    assert again.count("kept") == 10 and "done" not in again


def kill_after(folder: Path, stages: int, seconds: float) -> bool:
    """Start the study and kill its runner ``seconds`` after that many stages; False if it ended before."""
    job = start(folder)
    assert job.stdout is not None
    for line in job.stdout:
        stages -= " done " in line
        if not stages:
            break
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(seconds)
    job.kill()
    job.communicate()
    return job.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif("KILLS" not in os.environ, reason="takes many minutes: KILLS=12 says how often to kill the study")
def test_a_study_killed_at_random_ends_with_the_same_ledger(tmp_path: Path) -> None:
    kills = int(os.environ["KILLS"])
    prefixes = made_up.corpora(tmp_path)
    content = made_up.mapping(
        prefixes,
        parent={"pretrain": {"tokens": 1280, "arguments": ARGUMENTS}},
        methods=[
            {"name": "shortgpt"},
            {"name": "minitron-width", "settings": {"divisible-by": 8}},
            {"name": "wanda", "pattern": "unstructured"},
        ],
        scratch=["dense"],
        ratios=[0.25, 0.5],
        budgets=[640],
        seeds=[1, 2, 3],
        launch={"parallel_cells": 2, "threads": 1},
    )
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text(yaml.safe_dump(content))
    began = time.monotonic()
    finish(tmp_path / "whole")
    whole_seconds = time.monotonic() - began
    expected = records(tmp_path / "whole")
    assert len(expected) == 1 + 3 + 18 + 18 + 30

    moments, killed = random.Random(6), 0
    began = time.monotonic()
    for _ in range(kills):
        killed += kill_after(tmp_path / "killed", moments.randint(1, 10), moments.uniform(0, 1.5))
    assert killed == kills >= 10
    finish(tmp_path / "killed")
    assert records(tmp_path / "killed") == expected
    reports = [tmp_path / name / "runs/made-up/report/results.json" for name in ("whole", "killed")]
    rows = [json.loads(path.read_text()) for path in reports]
    for found in rows:
        assert len(found["rows"]) == 1 + 2 * 3 * 2 * 3 * 2
        for row in found["rows"]:
            del row["seconds"]
    assert rows[0]["rows"] == rows[1]["rows"] and rows[0]["verdicts"] == rows[1]["verdicts"]
    print(f"{len(expected)} cells: {whole_seconds:.0f} s; killed {killed} times: {time.monotonic() - began:.0f} s")
