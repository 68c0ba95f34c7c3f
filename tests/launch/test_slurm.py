"""launch/slurm.sbatch and launch/health.sh, run for real with stand-ins for Slurm's and NVIDIA's commands."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_prune.artifacts import read_json
from tests.launch import nodes

STAND_INS = Path(__file__).parent / "stand_ins"


def submit(argv: list[str], tmp_path: Path, log: Path, restarts: int = 0) -> subprocess.Popen:
    env = {
        **nodes.environment(nodes.free_port(), 1),
        "PATH": f"{STAND_INS}:{os.environ['PATH']}",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_SUBMIT_DIR": str(nodes.ROOT),
        "STAND_IN_REQUEUED": str(tmp_path / "requeued"),
        "STAND_IN_GPUS": "0, 0, 4",
        "HEALTH_SHM_MB": "1",
    }
    with open(log, "ab") as output:
        return subprocess.Popen(
            ["bash", "launch/slurm.sbatch", *argv], cwd=nodes.ROOT, env=env, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_is_requeued_and_completes(job, tiny_corpus, tmp_path) -> None:
    undisturbed, save, log = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "log.txt"
    job(nodes.training(tiny_corpus, undisturbed)).ok()
    argv = nodes.training(tiny_corpus, save)
    reached = [0]
    for signal_number in (signal.SIGUSR1, signal.SIGTERM):  # what `--signal=B:USR1@600` does, and a preemption may
        running = submit(argv, tmp_path, log, restarts=len(reached) - 1)
        try:
            nodes.wait_for(lambda: nodes.saved(save) >= reached[-1] + 10, "a save")
            running.send_signal(signal_number)
            assert running.wait(120) == 0, log.read_text()[-3000:]
        finally:
            nodes.kill_tree(running.pid)
        reached.append(nodes.saved(save))
        assert reached[-2] + 10 <= reached[-1] < nodes.STEPS and not read_json(save / "account.json")["complete"]
        assert (tmp_path / "requeued").read_text() == "7\n" * (len(reached) - 1)
    again = submit(argv, tmp_path, log, restarts=2)
    try:
        assert again.wait(200) == 0, log.read_text()[-3000:]
    finally:
        nodes.kill_tree(again.pid)
    account = read_json(save / "account.json")
    assert account["complete"] and [a["from_step"] for a in account["attempts"]] == [step + 1 for step in reached]
    assert not account["replayed"]  # the saves were at the steps that the signals came in
    assert (tmp_path / "requeued").read_text() == "7\n" * 2
    assert nodes.losses(save) == nodes.losses(undisturbed)


def test_a_job_that_gets_nowhere_is_not_requeued(tmp_path) -> None:
    log = tmp_path / "log.txt"
    running = submit(["no-such-verb", "--save", str(tmp_path / "run")], tmp_path, log)
    assert running.wait(60) == 1
    assert "not requeued" in log.read_text() and not (tmp_path / "requeued").exists()


def test_a_run_without_a_place_to_go_on_from_is_refused(tmp_path) -> None:
    log = tmp_path / "log.txt"
    assert submit(["pretrain", "--lr", "1"], tmp_path, log).wait(60) == 2
    assert "--save is missing" in log.read_text()


@pytest.mark.parametrize(
    ("gpus", "wanted", "says"),
    [
        ("0, 0, 4\n1, 0, 4", 2, ""),
        ("0, 0, 4", 2, "1 GPUs answer, 2 are wanted"),
        ("0, 3, 4\n1, 0, 4", 2, "GPU 0: 3 uncorrected memory errors"),
        ("0, 0, 4\n1, [N/A], 40000", 2, "GPU 1: 40000 MiB are taken"),
    ],
)
def test_health(gpus, wanted, says, tmp_path) -> None:
    env = {**os.environ, "PATH": f"{STAND_INS}:{os.environ['PATH']}", "STAND_IN_GPUS": gpus}
    env |= {"HEALTH_GPUS": str(wanted), "HEALTH_SHM_MB": "1"}
    command = ["bash", "launch/health.sh", str(tmp_path / "save")]
    ran = subprocess.run(command, cwd=nodes.ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == bool(says) and says in ran.stderr


def test_health_of_disks(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    env = {**os.environ, "HEALTH_GPUS": "0", "HEALTH_SHM_MB": "99999999"}
    command = ["bash", "launch/health.sh", str(tmp_path / "file")]
    ran = subprocess.run(command, cwd=nodes.ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 1 and "/dev/shm has" in ran.stderr and "cannot be written to" in ran.stderr
