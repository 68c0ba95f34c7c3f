"""Two nodes on one machine: one torchrun agent per node, started by launch/node.sh, with a shared disk."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from megatron_prune.artifacts import read_json
from tests.training.small import MODEL, recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
BATCH = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def holds_a_store(port: int) -> bool:
    """Whether an agent already holds the rendezvous store: on one machine the first to bind the port does, and a job
    survives the loss of any other node."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def training(corpus: Path, save: Path) -> list[str]:
    """A run of ``STEPS`` steps that saves every tenth, and whose steps are long enough to be hit by a kill."""
    flags = recipe(
        corpus,
        f"0:{STEPS * BATCH}",
        save,
        "--save-interval",
        10,
        "--exit-signal-handler",
    )
    return ["pretrain", *MODEL, *flags]


def environment(port: int, nodes: int | str = 2) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": "1",
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_LOCAL_ADDR": "localhost",
        # A node without a sign for ten seconds is gone; the default is fifteen. Enough nodes, but not all, wait
        # four seconds for the others; the default is thirty.
        "PET_RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=10,last_call_timeout=4",
        "PET_MONITOR_INTERVAL": "0.2",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def node(argv: list[str], port: int, log: Path, nodes: int | str = 2):
    """A running launch/node.sh; its processes are killed at the end."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            ["bash", "launch/node.sh", *argv], cwd=ROOT, env=environment(port, nodes), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def kill_tree(root: int) -> None:
    """SIGKILL a process and its descendants, as if a node lost power."""
    pids, seen = [root], []
    while pids:
        pid = pids.pop()
        seen.append(pid)
        found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
        pids += map(int, found.split())
    for pid in seen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def saved(save: Path) -> int:
    """The last step that is saved."""
    try:
        return int((save / "latest_checkpointed_iteration.txt").read_text() or 0)
    except FileNotFoundError:
        return 0


def sizes(save: Path) -> list[int]:
    """How many ranks each attempt at a run had."""
    path = save / "account.json"
    return [attempt["world_size"] for attempt in read_json(path)["attempts"]] if path.exists() else []


def losses(save: Path) -> list[list[str]]:
    with open(save / "losses.csv", newline="") as table:
        return list(csv.reader(table))
