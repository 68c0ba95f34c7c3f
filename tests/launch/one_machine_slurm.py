"""A real Slurm on this machine: a controller and nodes n1, n2, … with one "GPU" each. Requires root and slurm-wlm,
which is installed by apt where it is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import nodes
from tests.waiting import alive, wait_for_progress

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MpiDefault=none
GresTypes=gpu
MailProg=/bin/true
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class OneMachineSlurm:
    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *words: object) -> str:
        done = subprocess.run(list(map(str, words)), env=self.env, capture_output=True, text=True, cwd=nodes.ROOT)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, argv: list[str], log: Path, **variables: str) -> str:
        """``launch/slurm.sbatch`` on two nodes, as its head says; the job's number."""
        env = nodes.environment(nodes.free_port(), 2) | self.env | variables
        env |= {"PATH": f"{self.folder / 'bin'}:{env['PATH']}", "STAND_IN_GPUS": "0, 0, 4", "HEALTH_SHM_MB": "1"}
        words = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", "--time=60", f"--output={log}"]
        done = subprocess.run(
            [*words, "launch/slurm.sbatch", *argv], env=env, cwd=nodes.ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        words = self.ask("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def start_node(self, number: int) -> None:
        self.ask("slurmd", "-N", f"n{number}", "-f", self.env["SLURM_CONF"], "-L", self.folder / f"n{number}.log")

    def kill_node(self, number: int) -> None:
        """As if it lost power: its daemon, its tasks and what runs them."""
        tasks = [pid for pid in _processes() if _has(pid, f"SLURMD_NODENAME=n{number}", str(self.folder))]
        steps = {parent for pid in tasks if _name(parent := _parent(pid)) == "slurmstepd"}
        for pid in (int((self.folder / f"n{number}.pid").read_text()), *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def daemons(self) -> list[int]:
        names = ("slurmd", "slurmctld")
        return [pid for pid in _processes() if _name(pid) in names and _has(pid, str(self.folder))]


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _has(pid: int, *texts: str) -> bool:
    """Whether the environment or the command line of a process contains all the texts."""
    with contextlib.suppress(OSError):
        found = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
        return all(text.encode() in found for text in texts)
    return False


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def require_programs() -> None:
    """Skip the test where there is no Slurm and none can be installed."""
    if os.geteuid() != 0:
        pytest.skip("a real Slurm requires root: its daemons run as root")
    if all(map(shutil.which, PROGRAMS)):
        return
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "slurm-wlm", "munge"]):
        try:
            done = subprocess.run([*apt, *words], env=env, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("slurm-wlm is not installed, and there is no apt-get")
        if done.returncode and words[0] == "install":
            pytest.skip(f"slurm-wlm cannot be installed: {done.stderr.strip().splitlines()[-1]}")


def _start_munge(folder: Path) -> None:
    """A munged of its own, with its own key: nothing of the machine's is touched."""
    home = folder / "munge"
    home.mkdir(mode=0o755)
    (home / "key").write_bytes(os.urandom(128))
    (home / "key").chmod(0o600)
    words = [f"--{name}-file={home / name}" for name in ("key", "pid", "log", "seed")]
    subprocess.run(["munged", "--force", f"--socket={home / 'socket'}", *words], check=True, capture_output=True)


@contextlib.contextmanager
def running_slurm(folder: Path, count: int = 2) -> Iterator[OneMachineSlurm]:
    require_programs()
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    (folder / "state").mkdir()
    (folder / "bin").mkdir()
    (folder / "bin" / "nvidia-smi").symlink_to(nodes.ROOT / "tests" / "launch" / "stand_ins" / "nvidia-smi")
    lines, gres = [CONFIG.format(host=host, folder=folder, port=nodes.free_port())], []
    for number in range(1, count + 1):
        name = f"n{number}"
        (folder / name).mkdir()
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes.free_port()} CPUs=2 RealMemory=1000 "
            "Gres=gpu:1 State=UNKNOWN\n"
        )
        gres.append(f"NodeName={name} Name=gpu File=/dev/null\n")
    (folder / "slurm.conf").write_text("".join(lines))
    (folder / "gres.conf").write_text("".join(gres))
    slurm = OneMachineSlurm(folder, count)
    try:
        _start_munge(folder)
        slurm.ask("slurmctld", "-f", slurm.env["SLURM_CONF"], "-L", folder / "slurmctld.log")
        for number in range(1, count + 1):
            slurm.start_node(number)
        wait_for_progress(lambda: slurm.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == str(count), "idle nodes")
        yield slurm
    finally:
        _stop(slurm)


def _stop(slurm: OneMachineSlurm) -> None:
    subprocess.run(["scancel", "--full", "--user", "root"], env=slurm.env, capture_output=True)
    time.sleep(1)
    pids = slurm.daemons()
    with contextlib.suppress(OSError):
        pids.append(int((slurm.folder / "munge" / "pid").read_text()))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in filter(alive, pids):
        nodes.kill_tree(pid)
