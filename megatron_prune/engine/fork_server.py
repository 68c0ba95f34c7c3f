"""A process that has imported torch and Megatron once, and forks the ranks of each job.

Importing ``megatron.training`` takes seconds, and a job of five steps on a small model does not. On a machine
without a GPU, ``engine/launch.py`` therefore starts this server once and sends it jobs. Nobody else talks to it.

    caller ──control socket──▶ fork server ──fork──▶ supervisor (one per job) ──fork──▶ ranks
       └──────────── one socket per job ─────────────────▲

* The fork server has one thread, no process group and no Megatron globals, and has run no tensor operation. A
  fork of it is therefore like a new interpreter with the imports done. It exits when the control socket closes,
  that is, when its caller is gone, however the caller ended.
* A supervisor does what torchrun's agent does. It gives its ranks a file to meet in (``engine/network.py``), waits
  for them, and ends all of them when one fails, or when the caller hangs up or is gone. Ranks die with their
  supervisor.

Why not ``multiprocessing``'s forkserver: its children hold the pipe by whose end the server learns that its caller is
gone, so when a caller is killed, server and ranks run on. It also imports the caller's main module again in each
child, which fails for a script without ``if __name__ == "__main__"``. A test holds us to the first
(tests/engine/test_launch.py, ``test_a_killed_caller_takes_its_job_along``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_prune import screen
from megatron_prune.engine import network
from megatron_prune.errors import EXIT_REFUSED

READY, GPU = b"R", b"G"
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.01
# Everything that a training run imports, found by comparing sys.modules; our own modules load in milliseconds.
PRELOAD = (
    "megatron.training",
    "megatron.core.datasets.blended_dataset",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.tokenizers.text",
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.checkpoint",
    "torch.utils.data",
    "transformers.models.auto",
)


def serve(control: socket.socket) -> None:
    """Answer jobs until ``control`` closes. Returns only then; a forked child never returns."""
    from megatron_prune.engine import cpu

    if not cpu.is_cpu():  # one may not fork from a process that has looked for a GPU
        control.sendall(GPU)
        return
    _preload()
    gc.collect()
    gc.freeze()  # otherwise ranks would copy every page with an object that the collector visits
    control.sendall(READY)
    while True:
        ready, _, _ = select.select([control], [], [], 0.2)
        _reap()
        if not ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        if not message:
            return
        job = socket.socket(fileno=descriptors[0])
        sys.stdout.flush()
        if os.fork() == 0:
            control.close()
            _run_and_exit(functools.partial(_supervise, job, *descriptors[1:]))
        job.close()
        for descriptor in descriptors[1:]:
            os.close(descriptor)


def _preload() -> None:
    import importlib
    import logging
    import warnings

    from megatron_prune.engine import cpu

    # It would warn that there is no CUDA run time, which is why this process exists.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    cpu.prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PRELOAD:
            importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"the imports started {len(threads) - 1} threads: a fork would lose them")


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def die_with(parent: int, signal_number: int) -> None:
    """Have the kernel end this process when ``parent`` ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal_number)
    if os.getppid() != parent:  # it had already ended
        os._exit(1)


def _run_and_exit(run: Callable[[], int]) -> NoReturn:
    """Run the work of a forked child and exit as an interpreter would, but without freeing memory."""
    import atexit
    import threading

    code = 1
    try:
        code = run()
    except SystemExit as exiting:
        code = _exit_code(exiting)
    except BaseException as error:
        screen.print_traceback(type(error), error, error.__traceback__)
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def _exit_code(exiting: SystemExit) -> int:
    if exiting.code is None or isinstance(exiting.code, int):
        return exiting.code or 0
    print(exiting.code, file=sys.stderr)
    return 1


# --------------------------------------------------------------------------- supervisor


def _supervise(connection: socket.socket, out: int, err: int) -> NoReturn:
    """Fork the ranks of one job, watch them and the caller, report the job's exit code."""
    die_with(os.getppid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    request: dict[str, Any] = receive(connection)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for descriptor in (out, err):
        if descriptor > 2:
            os.close(descriptor)
    nproc = request["nproc"]
    me = os.getpid()
    meeting = network.anonymous_file()
    ranks: dict[int, int] = {}
    for rank in range(nproc):
        child = os.fork()
        if child == 0:
            connection.close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setpgid(0, 0)
            die_with(me, signal.SIGKILL)
            _run_and_exit(functools.partial(_rank, request, rank, meeting))
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it has ended by now
            os.setpgid(child, child)
        ranks[child] = rank
    pids = list(ranks)
    code = -signal.SIGTERM
    try:
        send(connection, {"supervisor": me, "ranks": pids})
        code = _watch(connection, ranks)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end(ranks)
        if code:
            _kill_groups(pids)
    with contextlib.suppress(OSError):
        send(connection, {"returncode": code})
    os._exit(0)  # exit handlers that the imports registered are for the ranks


def _watch(connection: socket.socket, ranks: dict[int, int]) -> int:
    """Wait until every rank has exited with 0, one has failed, or the caller has hung up."""
    while ranks:
        readable, _, _ = select.select([connection], [], [], POLL_SECONDS)
        if readable:
            return -signal.SIGTERM
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                rank = ranks.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                if code:
                    how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
                    if code < 0 or (ranks and code != EXIT_REFUSED):  # what it refused is the last line
                        print(f"rank {rank} {how}", file=sys.stderr, flush=True)
                    return code
    return 0


def _end(ranks: dict[int, int]) -> None:
    """End the ranks that are left of a job: SIGTERM first, SIGKILL after ``GRACE_SECONDS``."""
    deadline = time.monotonic() + GRACE_SECONDS
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    while ranks:
        if time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        for pid in list(ranks):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del ranks[pid]
        time.sleep(POLL_SECONDS)


def _kill_groups(pids: list[int]) -> None:
    """End data workers that a killed rank leaves behind: each rank leads its own process group."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


# --------------------------------------------------------------------------- rank


def _rank(request: dict[str, Any], rank: int, meeting: int) -> int:
    """Become rank ``rank`` of the job: environment, directory and arguments as torchrun would give."""
    nproc = request["nproc"]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR=network.LOOPBACK,  # for libraries that ask; the ranks do not meet there
        MASTER_PORT="0",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_RUN_ID="none",
    )
    network.meet_in(meeting)
    os.environ.setdefault("OMP_NUM_THREADS", "1" if nproc > 1 else str(len(os.sched_getaffinity(0))))
    os.chdir(request["directory"])
    sys.argv = list(request["argv"])
    sys.path[:] = request["path"]
    _as_if_started_now()
    work: Callable[[], int] = pickle.loads(request["work"])
    return work()


def _as_if_started_now() -> None:
    """Redo what a new interpreter does at import: thread count, seeds, Megatron's clocks."""
    import numpy
    import torch
    from megatron.training import training

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    numpy.random.seed()
    now = time.time()
    training._TRAIN_START_TIME = training._LEGACY_TRAIN_START_TIME = now
    training.set_startup_timestamps(program_start=now, main_entry=now)


def run_verb(argv: list[str]) -> int:
    """What ``python -m megatron_prune <argv>`` does, inside a rank."""
    import runpy

    sys.argv = ["megatron_prune", *argv]
    runpy.run_module("megatron_prune", run_name="__main__")
    return 0


# --------------------------------------------------------------------------- messages


def send(connection: socket.socket, value: Any) -> None:
    """One length-prefixed pickle; both ends are this package, in one user's processes."""
    payload = pickle.dumps(value)
    connection.sendall(struct.pack("<Q", len(payload)) + payload)


def receive(connection: socket.socket) -> Any:
    """The next message, or ``EOFError`` when the other end is gone."""
    (length,) = struct.unpack("<Q", _receive_exactly(connection, 8))
    return pickle.loads(_receive_exactly(connection, length))


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    payload = bytearray()
    while len(payload) < length:
        piece = connection.recv(min(length - len(payload), 1 << 20))
        if not piece:
            raise EOFError("the other end of the job's socket is closed")
        payload += piece
    return bytes(payload)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # nothing is left to do, and freeing all that was imported takes longer than a job
