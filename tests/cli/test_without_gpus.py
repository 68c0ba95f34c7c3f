"""Verbs with dry runs leave this machine's GPUs alone: they start again where none is visible."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prune.cli.cluster_commands import preflight_main
from megatron_prune.cli.study_commands import study_main
from megatron_prune.engine import cpu
from megatron_prune.errors import MegatronPruneError

PREFLIGHT = ["--gpus", "8", "pretrain", "--bf16"]
PLAN = ["plan", "study.yaml", "--runs-dir", "elsewhere"]
CASES = [(preflight_main, PREFLIGHT, ["preflight", *PREFLIGHT]), (study_main, PLAN, ["study", *PLAN])]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Command lines and environments of processes that would have been started; each ends with 3."""
    found: list[Any] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        found.append((command, env))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", run)
    return found


@pytest.mark.parametrize(("main", "argv", "again"), CASES, ids=["preflight", "plan"])
def test_with_a_gpu_another_process_does_it_without(
    monkeypatch: pytest.MonkeyPatch, started: list[Any], main: Any, argv: list[str], again: list[str]
) -> None:
    monkeypatch.setattr(cpu, "_cuda_is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("ELSE", "kept")
    assert main(argv) == 3
    [(command, env)] = started
    assert command == [sys.executable, "-m", "megatron_prune", *again]
    assert env["CUDA_VISIBLE_DEVICES"] == "" and env["ELSE"] == "kept"


def test_without_a_gpu_it_is_this_process(started: list[Any]) -> None:
    """Which finds that there is no such study."""
    with pytest.raises(MegatronPruneError, match=r"study\.yaml"):
        study_main(PLAN)
    assert not started


def test_what_does_no_dry_runs_keeps_its_gpus(monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
    monkeypatch.setattr(cpu, "_cuda_is_available", lambda: True)
    for part in ("run", "report"):
        with pytest.raises(MegatronPruneError, match=r"study\.yaml"):
            study_main([part, "study.yaml"])
    assert not started
