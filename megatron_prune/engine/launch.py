"""Run a verb as a job of several processes on this machine, from Python.

``launch(["pretrain", …], nproc=4, log="log.txt")`` is ``torchrun --nproc-per-node 4 -m megatron_prune pretrain …``,
and with a GPU that is what runs. Without one, the ranks are forked from a process that has already imported torch and
Megatron (``engine/fork_server.py``): the same work, seconds earlier. The return code says whether every process exited
with 0; whether a job succeeded is in its account, scores or manifest.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_prune import screen
from megatron_prune.engine import agent, fork_server, network
from megatron_prune.errors import RunError, UsageError

EXIT_TIMEOUT = 124
FORK_SERVER = fork_server.__name__  # the module of the process that forks ranks


def launch(
    argv: Sequence[str],
    *,
    nproc: int = 1,
    log: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> int:
    """Run ``python -m megatron_prune <argv>`` in ``nproc`` processes and wait for them.

    ``log`` receives everything that the ranks print (appended; None: the caller's screen, with technical output in
    separate files, see ``screen.py``). ``env`` is added to this process's environment. If one rank fails the others
    are ended. Returns 0 if every rank exited with 0, otherwise the first failing rank's exit code (-N for signal N;
    torchrun makes it 1), and 124 if ``timeout`` seconds have passed and the job was ended.
    """
    job = start(argv, nproc=nproc, log=log, env=env)
    try:
        return job.wait(timeout)
    except TimeoutError:
        return EXIT_TIMEOUT
    finally:
        job.close()


def start(
    argv: Sequence[str],
    *,
    nproc: int = 1,
    log: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Like ``launch``, but return at once with the running ``Job``, which ends with the thread that started it."""
    _check_nproc(nproc)
    argv = [os.fspath(argument) for argument in argv]
    if log is not None:
        env = {screen.VERBOSE_VARIABLE: "1", **(env or {})}
    with _open_log(log) as (out, err):
        if not _fork_server().forks:
            return _TorchrunJob(argv, nproc, out, err, env)
        work = functools.partial(fork_server.run_verb, argv)
        main = str(Path(fork_server.__file__).parents[1] / "__main__.py")
        return _start_forked(work, [main, *argv], nproc, out, err, env)


def start_function(
    work: Callable[[], int],
    *,
    nproc: int = 1,
    log: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Job:
    """Run a picklable ``work() -> exit code`` in forked ranks on the CPU (tests use it)."""
    _check_nproc(nproc)
    with _open_log(log) as (out, err):
        return _start_forked(work, [sys.argv[0]], nproc, out, err, env)


def _check_nproc(nproc: int) -> None:
    if nproc < 1:
        raise UsageError("nproc", got=nproc, expected="at least 1 process")


class Job:
    """A running job. ``ranks`` holds the process ids, rank 0 first (torchrun: the agent alone)."""

    ranks: list[int]

    def wait(self, timeout: float | None = None) -> int:
        """The job's return code, as from ``launch``; ``TimeoutError`` if it still runs after ``timeout`` seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """End the job if it still runs, and wait until all of its processes have exited."""
        raise NotImplementedError

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass
class _ForkedJob(Job):
    connection: socket.socket
    ranks: list[int]
    returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = fork_server.receive(self.connection)["returncode"]
            except EOFError:  # the supervisor itself was killed, and its ranks with it
                self.returncode = -9
            self.connection.close()
        return self.returncode

    def close(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)  # the supervisor ends the ranks
            self.wait()


class _TorchrunJob(Job):
    def __init__(self, argv: list[str], nproc: int, out: int, err: int, env: Mapping[str, str] | None):
        command = [sys.executable, "-m", __name__, str(os.getpid())]
        command += ["--nproc-per-node", str(nproc), "-m", "megatron_prune", *argv]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **(env or {})}
        )
        self.ranks = [self.process.pid]

    def wait(self, timeout: float | None = None) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error

    def close(self) -> None:
        self.process.terminate()  # the agent ends its workers, with torchrun's own grace
        self.process.wait()


def _start_forked(
    work: Callable[[], int],
    argv: list[str],
    nproc: int,
    out: int,
    err: int,
    env: Mapping[str, str] | None,
) -> _ForkedJob:
    ours, theirs = socket.socketpair()
    _fork_server().submit(theirs.fileno(), out, err)
    theirs.close()
    request = {
        "work": pickle.dumps(work),
        "argv": argv,
        "nproc": nproc,
        "directory": os.getcwd(),
        "path": sys.path,
        "environment": {**os.environ, **(env or {})},
    }
    try:
        fork_server.send(ours, request)
        return _ForkedJob(ours, fork_server.receive(ours)["ranks"])
    except (EOFError, OSError) as error:
        raise RunError(
            f"the fork server died before {argv[1:2]} began: see the error above, and check the free memory"
        ) from error


@contextlib.contextmanager
def _open_log(log: str | Path | None) -> Iterator[tuple[int, int]]:
    """Descriptors for a job's stdout and stderr.

    The log keeps a shared lock while any process of the job has it open, even after others have died:
    ``wait_until_free`` waits for it.
    """
    if log is None:
        sys.stdout.flush()
        sys.stderr.flush()
        yield 1, 2
        return
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a+b") as handle:  # NFS locks only files that are open for reading
        with contextlib.suppress(OSError):  # a file system without locks, or not a file
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield handle.fileno(), handle.fileno()


def wait_until_free(log: Path, tell: Callable[[], None]) -> bool:
    """Return when no process of an earlier job has ``log`` open; True, after calling ``tell``, if there were any."""
    if not log.is_file():
        return False
    with open(log, "r+b") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell()
            fcntl.flock(handle, fcntl.LOCK_EX)
            return True
    return False


# OpenMP's threads busy-wait for each other for milliseconds. Next to other work on two cores, a step of 0.2 s then
# took 3.7 s with two threads, and 0.4 s with this.
_SPIN_BRIEFLY = {"GOMP_SPINCOUNT": "2000"}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a rank sets its own


class _ForkServer:
    """The client's end of one fork server."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.control, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", FORK_SERVER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a ^C goes to the caller, which then ends its jobs
            env=_SPIN_BRIEFLY | os.environ | _ONE_THREAD | {"PYTHONUNBUFFERED": "1"},
        )
        theirs.close()
        answer = self.control.recv(1)
        self.forks = answer == fork_server.READY  # without a GPU
        if answer not in (fork_server.READY, fork_server.GPU):
            raise RunError(f"{sys.executable} -m {FORK_SERVER} could not start: its error is above")

    def submit(self, *descriptors: int) -> None:
        with self.lock:
            socket.send_fds(self.control, [b"J"], descriptors)

    def alive(self) -> bool:
        return self.owner == os.getpid() and (not self.forks or self.process.poll() is None)

    def stop(self) -> None:
        if self.owner == os.getpid():
            with contextlib.suppress(OSError):  # the server may have ended
                self.control.shutdown(socket.SHUT_RDWR)  # a fork of this process may hold a copy, which stays open
            self.control.close()
            self.process.wait()


_current: _ForkServer | None = None
_current_lock = threading.Lock()


def _fork_server() -> _ForkServer:
    """This process's fork server, started on first use and stopped at exit."""
    global _current
    with _current_lock:
        if _current is None or not _current.alive():
            _current = _ForkServer()
            atexit.register(_current.stop)
        return _current


def _be_torchrun() -> None:
    """What ``_TorchrunJob`` runs: ``python -m megatron_prune.engine.launch CALLER <words of torchrun>``. A CALLER of
    ``-`` is nobody (``launch/node.sh``).

    A torchrun for one machine, which nobody else reaches: its store listens on the loopback address alone. The
    rendezvous that ``--standalone`` and ``c10d`` choose would listen on all, and unpickle what it reads there.

    And a torchrun that ends its ranks when the process CALLER dies. A caller that is killed cannot end them itself, and
    orphaned ranks would hold their GPUs for hours. On SIGTERM torchrun ends its ranks, after its own grace period.
    """
    if (caller := sys.argv.pop(1)) != "-":
        fork_server.die_with(int(caller), signal.SIGTERM)
    for name in ("STANDALONE", "RDZV_BACKEND", "RDZV_ENDPOINT"):
        os.environ.pop(f"PET_{name}", None)
    store = network.store_of_this_machine()
    agent.run(["--master-addr", store.host, "--master-port", str(store.port), *sys.argv[1:]])


if __name__ == "__main__":
    _be_torchrun()
