"""Timed steps: which runs are timed, and what a cell costs by them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.cli.study_commands import study_main
from megatron_prune.errors import RunError, UsageError
from megatron_prune.study import outlook, throughput
from megatron_prune.study.estimate import Estimate
from megatron_prune.study.prunings import Places
from megatron_prune.study.throughput import Measured
from tests.study import made_up

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


class Machine:
    """Takes 9 s for the first steps, and then as many as the model has layers."""

    def __init__(self, code: int = 0):
        self.code, self.started = code, list[tuple[list[str], int, Mapping[str, str]]]()

    def start(self, argv: Sequence[str], *, nproc: int, log: Path, env: Mapping[str, str]) -> Any:
        self.started.append(([*argv], nproc, env))
        layers = int(argv[argv.index("--num-layers") + 1])
        seconds = [9.0] * throughput.WARM_UP + [float(layers)] * (throughput.STEPS - throughput.WARM_UP)
        log.write_text("".join(f"elapsed time per iteration (ms): {1000 * one:.1f}\n" for one in seconds))
        job = contextlib.nullcontext()
        job.wait = lambda: self.code  # type: ignore[attr-defined]
        return contextlib.nullcontext(job)


def test_every_shape_is_timed_once_with_as_many_runs_side_by_side_as_cells(prefixes, monkeypatch) -> None:
    machine = Machine()
    monkeypatch.setattr(throughput, "start", machine.start)
    methods = [
        {"name": "shortgpt"},
        {"name": "random", "settings": {"axis": "depth"}},
        {"name": "wanda", "pattern": "2:4"},
    ]
    study = made_up.study(prefixes, methods=methods, launch={"parallel_cells": 3, "threads": 5})
    found = outlook.look(study, Places(Path("runs/x")))
    assert found.source is not None
    measured = throughput.measure(study, found, 3)
    layers = [argv[argv.index("--num-layers") + 1] for argv, _, _ in machine.started]
    assert layers == ["4"] * 3 + ["2"] * 3
    assert all(nproc == 1 and env["OMP_NUM_THREADS"] == "5" for _, nproc, env in machine.started)
    assert all(
        "--save" not in argv and argv[argv.index("--micro-batch-size") + 1] == "4" for argv, _, _ in machine.started
    )
    half = found.targets["shortgpt-r50-s1"]
    assert measured.seconds_of_step == {found.source.training_flops(16) * 8: 4.0, half.training_flops(16) * 8: 2.0}


def test_a_cell_costs_its_steps_at_the_time_of_the_nearest_shape() -> None:
    measured = Measured({1000: 2.0, 100: 0.5}, 3.0, 2)
    assert measured.seconds(Estimate("x", steps=10, flops=10_000), 1) == 3 + 20
    assert measured.seconds(Estimate("x", steps=10, flops=1_000), 1) == 3 + 5
    assert measured.seconds(Estimate("x", steps=10, flops=5_000), 1) == 3 + 10  # half of the nearest shape's work
    assert measured.seconds(Estimate("x", steps=10, flops=1_000, evaluation=200), 1) == 3 + 5 + 1
    assert measured.seconds(Estimate("x", flops=0), 1) == 3
    assert measured.seconds(Estimate("x"), 1) is None


def test_plan_prices_a_study_by_what_it_has_timed(prefixes, monkeypatch, capsys) -> None:
    monkeypatch.setattr(throughput, "start", Machine().start)
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(prefixes, methods=[{"name": "shortgpt"}])))
    assert study_main(["plan", "study.yaml", "--throughput", "measured"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if " pruned-shortgpt-r50-s1-t1280 " in line)
    # Ten steps of 2 s, and the evaluation of 32 windows: a third of a training sample's work each, eight in a step.
    assert row.split("│")[-2].strip() == f"{10 * 2 + 32 / 3 / 8 * 2:.1f} s"


def test_a_run_that_fails_and_a_parent_without_flags_are_errors(prefixes, monkeypatch) -> None:
    monkeypatch.setattr(throughput, "start", Machine(code=1).start)
    study = made_up.study(prefixes, methods=[{"name": "shortgpt"}])
    found = outlook.look(study, Places(Path("runs/x")))
    with pytest.raises(RunError, match=r"(?s)the timed run failed.*elapsed time"):
        throughput.measure(study, found, 1)
    elsewhere = made_up.study(prefixes, parent={"import_hf": "x", "declared_tokens": 100})
    with pytest.raises(UsageError, match="--throughput: expected tokens per second.*, got measured"):
        throughput.measure(elsewhere, found, 1)
