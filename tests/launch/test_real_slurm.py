"""launch/slurm.sbatch under a real Slurm, one machine standing for the nodes: signals, requeues, a killed node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prune.artifacts import read_json
from tests.launch import nodes
from tests.launch.one_machine_slurm import OneMachineSlurm, running_slurm
from tests.training.small import MODEL, recipe
from tests.waiting import content, wait_for_progress

STEPS = 900


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[OneMachineSlurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def training(corpus: Path, save: Path, steps: int = STEPS) -> list[str]:
    """As the head of slurm.sbatch says: --save alone."""
    flags = recipe(
        corpus, f"0:{steps * nodes.BATCH}", None, "--save", save, "--save-interval", 10, "--stream-epochs", 4
    )
    return ["pretrain", *MODEL, *flags, "--exit-signal-handler"]


def attempts(save: Path) -> list[int]:
    """The first step of each attempt."""
    path = save / "account.json"
    return [attempt["from_step"] for attempt in read_json(path)["attempts"]] if path.exists() else []


def wait_for_saves(save: Path, number: int, folder: Path) -> int:
    """Until the attempt with that number has saved twice; the step of the last save."""
    due = lambda: len(attempts(save)) == number and nodes.saved(save) >= attempts(save)[-1] + 8  # noqa: E731
    wait_for_progress(due, f"saves of attempt {number}", lambda: content(folder))
    return nodes.saved(save)


def wait_until_over(slurm: OneMachineSlurm, job: str, log: Path) -> None:
    wait_for_progress(
        lambda: slurm.state(job) in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"),
        "the end",
        lambda: content(log.parent),
    )


def report(log: Path, began: float, save: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.startswith("slurm.sbatch")]
    return "\n".join([*lines, f"attempts from steps {attempts(save)}; {time.monotonic() - began:.0f} s"])


@pytest.mark.slow
def test_signals_a_killed_node_and_the_end(slurm, tiny_corpus, tmp_path) -> None:
    save, log, began = tmp_path / "run", tmp_path / "log.txt", time.monotonic()
    job = slurm.submit(training(tiny_corpus, save), log)
    saved = []
    for number in (1, 2):  # the time limit comes near: Slurm sends USR1 ten minutes before it
        wait_for_saves(save, number, tmp_path)
        slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=9")
        requeued = lambda n=number: slurm.field(job, "Restarts") == str(n) or nodes.saved(save) == STEPS  # noqa: E731
        wait_for_progress(requeued, "a requeue", lambda: content(tmp_path))
        saved.append(nodes.saved(save))
        slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        assert f"requeued, to continue from step {saved[-1]}" in log.read_text(), log.read_text()[-3000:]
    saved.append(wait_for_saves(save, 3, tmp_path))
    slurm.kill_node(2)
    wait_for_progress(lambda: slurm.field(job, "Restarts") == "3", "a requeue", lambda: slurm.ask("sinfo"))
    saved[-1] = nodes.saved(save)
    slurm.start_node(2)
    wait_until_over(slurm, job, log)
    print(report(log, began, save))
    assert slurm.state(job) == "COMPLETED" and slurm.field(job, "Restarts") == "3", log.read_text()[-3000:]
    assert attempts(save) == [1, *(step + 1 for step in saved)]
    assert read_json(save / "account.json")["complete"] and "is complete" in log.read_text()
    assert nodes.saved(save) == STEPS


def test_a_refused_run_is_neither_restarted_nor_requeued(slurm, tiny_corpus, tmp_path) -> None:
    save, log = tmp_path / "run", tmp_path / "log.txt"
    job = slurm.submit([*training(tiny_corpus, save), "--no-such-flag"], log)
    wait_until_over(slurm, job, log)
    text = log.read_text()
    assert slurm.state(job) == "FAILED" and slurm.field(job, "Restarts") == "0", text
    assert "not requeued" in text and "exit code 2" in text and "--no-such-flag is not" in text, text
    assert "Traceback" not in text, text
