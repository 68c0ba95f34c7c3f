"""launch/slurm.sbatch and launch/health.sh, actually run, with stand-ins for Slurm's and NVIDIA's commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_prune.artifacts import read_json
from tests.launch import nodes
from tests.waiting import GENEROUS, content, wait_for_progress

STAND_INS = Path(__file__).parent / "stand_ins"


NO_TRAINING = {"PYTHON": str(STAND_INS / "no-training"), "STAND_IN_PYTHON": sys.executable}


def submit(argv: list[str], tmp_path: Path, log: Path, restarts: int = 0, **variables: str) -> subprocess.Popen:
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
        "STAND_IN_STEPS": str(tmp_path / "steps"),
        "HEALTH_SHM_MB": "1",
        **variables,
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
    for signal_number in (signal.SIGUSR1, signal.SIGTERM):  # as `--signal=B:USR1@600` does, and sometimes a preemption
        running = submit(argv, tmp_path, log, restarts=len(reached) - 1)
        try:
            due = reached[-1] + 10
            wait_for_progress(lambda due=due: nodes.saved(save) >= due, "a save", lambda: content(tmp_path))
            running.send_signal(signal_number)
            assert running.wait(GENEROUS) == 0, log.read_text()[-3000:]
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
    assert not account["replayed"]  # the saves were at the steps in which the signals came
    assert (tmp_path / "requeued").read_text() == "7\n" * 2
    assert nodes.losses(save) == nodes.losses(undisturbed)


@pytest.mark.parametrize(
    ("began", "at", "ends", "code", "says"),
    [
        ([], None, None, 1, "nothing was saved since step 0 (exit code 1): not requeued"),
        ([], None, 30, 1, "went from step 0 to step 30 (exit code 1): to be requeued, to continue from step 30"),
        ([], 57, 21, 0, "went back from step 57 to step 21"),
        ([57], 21, 40, 1, "went back from step 57 to step 40"),  # across requeues
        ([57], 57, 57, 1, "nothing was saved since step 57"),
        ([57, 57, 57], 57, 60, 0, "nothing was saved after step 57 in three attempts"),
        ([], 20, 30, 2, "the run was refused (above): not requeued"),
        ([], "release", 30, 0, "went from step 0 to step 30"),
    ],
)
def test_a_job_is_requeued_when_it_made_progress(tmp_path, began, at, ends, code, says) -> None:
    """A job whose attempts began at these steps, with a training that leaves the run at ``ends``."""
    log, save = tmp_path / "log.txt", tmp_path / "run"
    save.mkdir()
    tracker = save / "latest_checkpointed_iteration.txt"
    if at is not None:
        tracker.write_text(str(at))
    (save / ".slurm-7.steps").write_text("".join(f"{step}\n" for step in began))
    training = tmp_path / "python"
    training.write_text(f"#!/bin/bash\n{f'echo {ends} > {tracker}' if ends is not None else ''}\nexit {code}\n")
    training.chmod(0o755)
    argv = ["pretrain", "--save", str(save)]
    ended = submit(argv, tmp_path, log, restarts=len(began), PYTHON=str(training)).wait(120)
    assert says in log.read_text()
    requeued = "requeued, to continue" in says or "release" == at
    assert (tmp_path / "requeued").exists() == requeued == (ended == 0)
    assert (save / ".slurm-7.steps").exists() == requeued


def test_a_finished_job_that_slurm_starts_again_trains_no_more(tmp_path) -> None:
    log, save = tmp_path / "log.txt", tmp_path / "run"
    save.mkdir()
    (save / "account.json").write_text(json.dumps({"complete": True}, indent=2))
    assert submit(["pretrain", "--save", str(save)], tmp_path, log, restarts=1, **NO_TRAINING).wait(120) == 0
    assert "is complete" in log.read_text() and "node.sh" not in (tmp_path / "steps").read_text()


@pytest.mark.parametrize(
    ("words", "step"), [(["--save={save}"], 30), (["--save", "elsewhere", "--save={save}"], 30), (["--save=other"], 0)]
)
def test_where_the_run_is_saved_may_be_said_with_an_equals_sign(tmp_path, words: list[str], step: int) -> None:
    """The last one counts, as for the run itself."""
    log, save = tmp_path / "log.txt", tmp_path / "run"
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("30")
    words = [word.format(save=save).replace("=other", f"={tmp_path}/other") for word in words]
    assert submit(["pretrain", *words], tmp_path, log, **NO_TRAINING).wait(120) == 1
    assert f"nothing was saved since step {step} " in log.read_text()


def in_a_store(folder: Path) -> dict[str, str]:
    """An object store that is a folder of this machine, as the profile ``disk``."""
    folder.mkdir()
    provider = {"storage_provider": {"type": "file", "options": {"base_path": str(folder)}}}
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({"profiles": {"disk": provider}}))
    return {"MSC_CONFIG": str(config), **NO_TRAINING}


def test_a_run_in_an_object_store_is_asked_through_its_client(tmp_path) -> None:
    log, store = tmp_path / "log.txt", tmp_path / "store"
    variables = in_a_store(store)
    argv = ["pretrain", "--save", "msc://disk/run", "--enable-msc"]
    assert submit(argv, tmp_path, log, **variables).wait(120) == 1
    assert "nothing was saved since step 0 " in log.read_text()
    (store / "run").mkdir()
    (store / "run" / "latest_checkpointed_iteration.txt").write_text("40")
    assert submit(argv, tmp_path, log, **variables).wait(120) == 1
    assert "nothing was saved since step 40 " in log.read_text() and not (nodes.ROOT / "msc:").exists()
    (store / "run" / "account.json").write_text(json.dumps({"complete": True}, indent=2))
    assert submit(argv, tmp_path, log, **variables).wait(120) == 0
    assert "msc://disk/run is complete" in log.read_text()


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(tmp_path) -> None:
    log = tmp_path / "log.txt"
    argv = ["pretrain", "--save", "msc://nowhere/run", "--enable-msc"]
    assert submit(argv, tmp_path, log, **in_a_store(tmp_path / "store")).wait(120) == 1
    assert "cannot be asked how far it is" in log.read_text() and not (tmp_path / "requeued").exists()


def test_every_step_runs_in_the_container_that_is_named(tmp_path) -> None:
    log = tmp_path / "log.txt"
    variables = {"CONTAINER_IMAGE": "registry#megatron-prune:1", "CONTAINER_MOUNTS": "/data:/data", **NO_TRAINING}
    submit(["pretrain", "--save", str(tmp_path / "run")], tmp_path, log, **variables).wait(120)
    steps = (tmp_path / "steps").read_text().splitlines()
    assert [step.split(" :: ")[1] for step in steps] == ["bash launch/health.sh", "bash launch/node.sh"]
    for step in steps:
        assert "--container-image=registry#megatron-prune:1" in step
        assert f"--container-mounts={nodes.ROOT}:{nodes.ROOT},/data:/data" in step


def test_a_script_that_is_in_the_container_itself_is_refused(tmp_path) -> None:
    log, programs = tmp_path / "log.txt", tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "cat", "grep"):
        (programs / name).symlink_to(shutil.which(name))
    assert submit(["pretrain", "--save", "x"], tmp_path, log, PATH=str(programs)).wait(60) == 2
    assert "there is no srun" in log.read_text() and "CONTAINER_IMAGE" in log.read_text()


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
