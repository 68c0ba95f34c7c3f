"""Jobs of forked ranks: started as by torchrun, ended together, and killed with their caller."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_prune.engine import launch
from megatron_prune.errors import EXIT_REFUSED, UsageError
from tests.distributed_work import FunctionCall
from tests.waiting import GENEROUS, LONGEST, alive, wait_for_progress


def all_reduced() -> dict[str, object]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.full((3,), float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return {
        "sum": value.tolist(),
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "argv": sys.argv[1:],
        "directory": os.getcwd(),
    }


def fail_in_rank_1_while_others_wait() -> None:
    if os.environ["RANK"] == "1":
        sys.exit(7)
    time.sleep(2 * LONGEST)


def record_pid_and_sleep(folder: str, *, ignore_sigterm: bool = False) -> None:
    if ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(2 * LONGEST)


def dirty_megatron_globals() -> tuple[bool, float]:
    """Whether the globals were clean on entry, and when Megatron's clock began; leaves them dirty."""
    from megatron.training import global_vars, training

    clean = global_vars._GLOBAL_ARGS is None
    global_vars._GLOBAL_ARGS = "dirty"
    return clean, training._TRAIN_START_TIME


def call(function, folder: Path, *arguments, **keywords) -> FunctionCall:
    pickled = pickle.dumps((arguments, keywords))
    return FunctionCall(__file__, function.__module__, function.__name__, pickled, str(folder))


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_ranks_form_a_group(distributed, nproc: int) -> None:
    ranks = distributed(all_reduced, nproc)
    assert [found["rank"] for found in ranks] == list(range(nproc))
    assert {found["world"] for found in ranks} == {nproc}
    assert {tuple(found["sum"]) for found in ranks} == {(nproc * (nproc + 1) / 2,) * 3}
    assert len({found["pid"] for found in ranks} - {os.getpid()}) == nproc
    assert {found["threads"] for found in ranks} == {int(os.environ["OMP_NUM_THREADS"])}


def test_the_callers_directory_and_environment_hold(distributed, tmp_path, monkeypatch) -> None:
    distributed(all_reduced, 1)  # the fork server runs from now on
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (found,) = distributed(all_reduced, 1)
    assert found["directory"] == str(tmp_path)
    assert found["threads"] == 2


def test_every_job_starts_clean(distributed) -> None:
    for _ in range(2):
        now = time.time()
        ((clean, began),) = distributed(dirty_megatron_globals, 1)
        assert clean
        assert began >= now


def test_a_verb_runs_as_from_the_command_line(job) -> None:
    shown = job(["--help"]).ok().output
    asked = subprocess.run(
        [sys.executable, "-m", "megatron_prune", "--help"], capture_output=True, text=True, check=True
    )
    assert shown == asked.stdout


def test_a_refusal_keeps_its_exit_code(job) -> None:
    refused = job(["no-such-verb"])
    assert refused.returncode == EXIT_REFUSED
    assert "no-such-verb" in refused.output


def test_when_one_rank_fails_the_others_are_ended(tmp_path) -> None:
    job = launch.start_function(call(fail_in_rank_1_while_others_wait, tmp_path), nproc=3)
    assert job.wait(GENEROUS) == 7
    assert not any(map(alive, job.ranks))


def test_a_killed_rank_ends_the_job_with_its_signal(tmp_path) -> None:
    job = launch.start_function(call(record_pid_and_sleep, tmp_path, str(tmp_path)), nproc=2)
    wait_for_progress(lambda: (tmp_path / "1").exists(), "the second rank")
    os.kill(job.ranks[1], signal.SIGKILL)
    assert job.wait(GENEROUS) == -signal.SIGKILL
    assert not any(map(alive, job.ranks))


def test_timeout_ends_the_job_and_what_it_started(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(launch.fork_server, "run_verb", subprocess.call)  # pickled by reference
    marker = str(123456.25 + os.getpid())
    code = launch.launch(["sleep", marker], timeout=0.5, log=tmp_path / "log")
    assert code == launch.EXIT_TIMEOUT
    wait_for_progress(lambda: marker not in running_commands(), "the end of what it started")


def running_commands() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace"))
    return "\n".join(found)


def test_ranks_that_ignore_sigterm_are_killed(tmp_path) -> None:
    work = call(record_pid_and_sleep, tmp_path, str(tmp_path), ignore_sigterm=True)
    job = launch.start_function(work, nproc=2)
    wait_for_progress(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), "both ranks")
    job.close()
    assert not any(map(alive, job.ranks))


def test_a_killed_caller_takes_its_job_along(tmp_path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.engine.test_launch import *;"
        "launch.start_function(call(record_pid_and_sleep, Path(sys.argv[1]), sys.argv[1]), nproc=2).wait()"
    )
    root = Path(__file__).parents[2]
    caller = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        wait_for_progress(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), "both ranks")
    finally:
        caller.kill()
        caller.wait()
    pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    wait_for_progress(lambda: not any(map(alive, pids)), "the end of the ranks")


def test_jobs_run_at_the_same_time_from_threads(distributed) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(distributed, all_reduced, 2) for _ in range(3)]
        sums = [rank["sum"] for running in jobs for rank in running.result()]
    assert sums == [[3.0, 3.0, 3.0]] * 6


def test_nproc_is_checked() -> None:
    with pytest.raises(UsageError, match="nproc"):
        launch.launch(["plan"], nproc=0)


@pytest.fixture
def a_gpu(monkeypatch) -> None:
    """The launcher uses torchrun, as where torch finds a GPU."""
    monkeypatch.setattr(launch, "_fork_server", lambda: SimpleNamespace(forks=False))


def test_where_there_is_a_gpu_it_is_torchrun(a_gpu, tmp_path) -> None:
    log = tmp_path / "log"
    assert launch.launch(["no-such-verb"], nproc=2, log=log, timeout=GENEROUS) != 0
    assert "no-such-verb" in log.read_text()
    assert "rank" in log.read_text() and "it is not restarted" in log.read_text()  # the agent of engine/agent.py


def test_a_killed_caller_takes_its_torchrun_along_and_the_log_is_held_until_the_last_rank_is_gone(tmp_path) -> None:
    """A stand-in for torchrun that leaves its rank running, as a killed torchrun does."""
    (tmp_path / "torch/distributed").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("")
    (tmp_path / "torch/distributed/__init__.py").write_text(
        "class TCPStore:\n    host, port = '127.0.0.1', 1\n    def __init__(self, *what, **named): pass\n"
    )
    (tmp_path / "torch/distributed/run.py").write_text(
        "import os, subprocess\n"
        "def main(words):\n"
        "    rank = subprocess.Popen(['sleep', '7200'])\n"
        "    print('pids', os.getpid(), rank.pid, flush=True)\n"
        "    rank.wait()\n"
    )
    for module, content in {  # what engine/agent.py changes in torchrun
        "multiprocessing/errors": "class ChildFailedError(Exception): pass\n",
        "rendezvous/__init__": "class RendezvousError(Exception): pass\n",
        "rendezvous/dynamic_rendezvous": "class DynamicRendezvousHandler: num_nodes_waiting = None\n",
        "agent/server/local_elastic_agent": "class LocalElasticAgent: _monitor_workers = None\n",
    }.items():
        file = tmp_path / "torch/distributed/elastic" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    caller = (
        "import sys; from types import SimpleNamespace; from megatron_prune.engine import launch;"
        "launch._fork_server = lambda: SimpleNamespace(forks=False);"
        "launch.launch(['pretrain'], log=sys.argv[1], env={'PYTHONPATH': sys.argv[2]})"
    )
    log, root = tmp_path / "log", Path(__file__).parents[2]
    search = {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", caller, log, f"{tmp_path}:{root}"], env={**os.environ, **search})
    wait_for_progress(lambda: log.is_file() and log.read_text().endswith("\n"), "torchrun")
    agent, rank = map(int, log.read_text().split()[1:])
    process.kill()
    process.wait()
    wait_for_progress(lambda: not alive(agent), "the end of torchrun")
    assert alive(rank)
    told: list[str] = []

    def the_rank_ends() -> None:
        told.append("waiting")
        os.kill(rank, signal.SIGKILL)

    assert launch.wait_until_free(log, the_rank_ends) and told == ["waiting"]
    wait_for_progress(lambda: not alive(rank), "the end of the rank")
    assert not launch.wait_until_free(log, the_rank_ends)


def test_a_torchrun_job_is_ended_in_time(a_gpu, tmp_path) -> None:
    assert launch.launch(["--help"], log=tmp_path / "log", timeout=0.2) == launch.EXIT_TIMEOUT


def test_a_fork_of_the_caller_does_not_keep_the_server() -> None:
    """A worker that the caller has forked holds a copy of its connection to the server."""
    server = launch._ForkServer()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(LONGEST)
    stopped = not stopping.is_alive()
    os.close(write)
    os.waitpid(child, 0)
    stopping.join(GENEROUS)
    os.close(read)
    assert stopped
