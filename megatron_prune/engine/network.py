"""Ranks on one machine meet and talk among themselves: no other user can join, nor have them unpickle anything.

* They meet in an anonymous file in memory, which only processes of this user can open, and not at a port.
* gloo connects ranks through ports of the loopback address, which any user of the machine can reach. It knows a
  connection by a small number that anyone can guess. So ``refuse_strangers`` asks the kernel who holds the other end.
* PyTorch and Megatron exchange Python objects as pickles. Those of a job are signed with a key that only its ranks
  have, and what is not signed is refused before it is unpickled.

On several machines ranks meet at torchrun's store. Their objects are signed if ``MEGATRON_PRUNE_JOB_KEY`` is set to
the same secret everywhere (``launch/slurm.sbatch`` makes one for each job).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import os
import pickle
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_prune import screen
from megatron_prune.errors import RunError, UsageError

LOOPBACK = "127.0.0.1"
KEY_VARIABLE = "MEGATRON_PRUNE_JOB_KEY"
SHORTEST_KEY = 32
SECONDS_UNTIL_SAID = 30.0
_FILE = "megatron_prune_rendezvous"
_SIGNATURE_BYTES = 32
_meeting: int | None = None  # the file in which this process meets the other ranks of its job
_kept: list[Any] = []  # torchrun's store may be the first rank's own, which ends with the object


def anonymous_file() -> int:
    """A file in memory that has no name; forked processes inherit it, and others of this user open it in /proc."""
    return os.memfd_create(_FILE)


def check_launcher() -> None:
    """UsageError for variables of a launcher that are no numbers, contradict each other, or are there in part.

    With ``WORLD_SIZE`` alone this process would wait for ranks that nobody starts.
    """
    values: dict[str, int] = {}
    for name, least in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_PORT", 0)):
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.isdecimal() or int(text) < least:
            raise UsageError(
                name, got=repr(text), expected=f"a whole number from {least} on", why="this environment variable is "
                "set by the launcher", do="start ranks with torchrun, or unset it",
            )  # fmt: skip
        values[name] = int(text)
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        most = values.get(ranks, values.get("WORLD_SIZE", 1))
        if values.get(rank, 0) >= most:
            raise UsageError(rank, got=values[rank], expected=f"less than {most}, the number of ranks ({ranks})",
                             do="start ranks with torchrun, or unset it")  # fmt: skip
    if values.get("WORLD_SIZE", 1) > 1 and "RANK" not in values:
        raise UsageError(
            "WORLD_SIZE", got=f"{values['WORLD_SIZE']} without RANK", expected="both, from a launcher",
            why="this process would wait for ranks that nobody starts",
            do=f"unset it, or start torchrun --nproc-per-node {values['WORLD_SIZE']} -m megatron_prune …",
        )  # fmt: skip


@contextlib.contextmanager
def watch_rendezvous() -> Iterator[None]:
    """Say what this process waits for in the block, if it waits for long; RunError where other ranks never came."""
    from torch.distributed import DistNetworkError, DistStoreError

    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    waits = f"rank {rank} waits for the other ranks of {ranks} at {place}"
    said = threading.Timer(
        SECONDS_UNTIL_SAID, screen.say, (f"{waits}, for --distributed-timeout-minutes",), {"everywhere": True}
    )
    said.daemon = True
    if ranks != "1" and os.environ.get("LOCAL_RANK", "0") == "0":
        said.start()
    try:
        yield
    except (DistNetworkError, DistStoreError) as error:
        why = str(error).partition("\n")[0][:200]
        raise RunError(
            f"{waits}: they did not come ({why}); start all ranks with torchrun, with the same MASTER_ADDR, "
            "MASTER_PORT and WORLD_SIZE, and check that this address can be reached"
        ) from error
    finally:
        said.cancel()


def make_private() -> None:
    """Set up what this module describes for the job that this process is a rank of, before its first process group."""
    if _meeting is not None:
        return
    ranks, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    if ranks == "1" or (ranks == local and "TORCHELASTIC_RUN_ID" in os.environ):
        meet_in(anonymous_file() if ranks == "1" else _file_of_first_rank())
    elif KEY_VARIABLE in os.environ:
        key = os.environ[KEY_VARIABLE]
        if len(key) < SHORTEST_KEY:
            raise UsageError(KEY_VARIABLE, expected=f"at least {SHORTEST_KEY} characters", got=len(key),
                             do="set it to the same secret for all ranks: openssl rand -hex 32")  # fmt: skip
        sign_objects(key.encode())


def store_of_this_machine() -> Any:
    """A store for torchrun's agent, at a port of the loopback address; by itself, it listens on every address.

    torchrun makes another one at the same port, and gets this one: a port has one store for all of a process.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

    listening = socket.create_server((LOOPBACK, 0), backlog=128)
    port = listening.getsockname()[1]
    return TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listening.detach()
    )


def meet_in(file: int) -> None:
    """Have process groups of this process form through the open ``file``, which all ranks have, and sign objects.

    gloo listens on the loopback address, unless an interface is set.
    """
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # public, but not in its __all__
    from torch.distributed.rendezvous import _rendezvous_handlers

    global _meeting
    _meeting = file
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def meet(url: str, **_: Any) -> Iterator[tuple[Any, int, int]]:
        yield FileStore(_path(file)), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        raise RuntimeError("the ranks of a job meet once")

    _rendezvous_handlers["env"] = meet  # what torch.distributed.init_process_group asks
    sign_objects(FileStore(_path(file)).compare_set("megatron_prune/key", "", secrets.token_hex(32)))


def _path(file: int) -> str:
    return f"/proc/self/fd/{file}"


def _file_of_first_rank() -> int:
    """The file that the first rank has made. Its place is read from torchrun's store, so it is not trusted."""
    from torch.distributed import rendezvous  # type: ignore[attr-defined]  # public, but not in its __all__

    store, rank, _ = next(rendezvous("env://"))
    _kept.append(store)
    if rank == 0:
        file = anonymous_file()
        store.set(_FILE, f"/proc/{os.getpid()}/fd/{file}")
        return file
    told = store.get(_FILE).decode(errors="replace")
    process, _, number = told.removeprefix("/proc/").partition("/fd/")
    try:
        if not (process.isdecimal() and number.isdecimal() and told == f"/proc/{process}/fd/{number}"):
            raise OSError("it is no such place")
        if os.readlink(told) != f"/memfd:{_FILE} (deleted)" or os.stat(told).st_uid != os.geteuid():
            raise OSError("it is another file")
        return os.open(told, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RunError(
            f"rank {rank}: expected the first rank's file for rendezvous, got {told[:200]} "
            f"({error.strerror or error}): start all ranks of this machine as one user, in one process namespace"
        ) from error


# -- connections ----------------------------------------------------------------------------------


def refuse_strangers() -> None:
    """RunError if another user holds the other end of a connection that this process has accepted.

    Call when process groups have formed, before anything is exchanged: gloo makes no connections later.
    """
    own = _sockets()
    rows = [row for name in ("tcp", "tcp6") for row in _table(name)]
    listening = {local.rpartition(":")[2] for local, _, state, _, inode in rows if state == _LISTENS and inode in own}
    accepted = {
        (remote, local)
        for local, remote, state, _, inode in rows
        if state == _ESTABLISHED and inode in own and local.rpartition(":")[2] in listening
    }
    for local, remote, state, user, _ in rows:
        if state == _ESTABLISHED and (local, remote) in accepted and user != os.geteuid():
            raise RunError(
                f"rank {os.environ.get('RANK', '0')}: expected connections of its own job alone, got one of the user "
                f"with number {user}: the job has stopped before it used anything of it; start it again, and if this "
                "comes back, ask that user or the administrator of this machine"
            )


def guard(training: Any) -> None:
    """Have Megatron (its module ``training``) call ``refuse_strangers`` once its process groups have formed."""
    initialize = training.initialize_megatron
    if getattr(initialize, "is_guarded", False):
        return

    def initialize_alone(*positional: Any, **named: Any) -> Any:
        with watch_rendezvous():
            done = initialize(*positional, **named)
        refuse_strangers()
        return done

    initialize_alone.is_guarded = True  # type: ignore[attr-defined]
    training.initialize_megatron = initialize_alone


_ESTABLISHED, _LISTENS = "01", "0A"


def _sockets() -> set[str]:
    """Inode numbers of this process's sockets."""
    found = set()
    for one in os.listdir("/proc/self/fd"):
        try:
            kind, _, number = os.readlink(f"/proc/self/fd/{one}").partition(":")
        except OSError:  # the descriptor of the listing itself
            continue
        if kind == "socket":
            found.add(number.strip("[]"))
    return found


def _table(name: str) -> Iterator[tuple[str, str, str, int, str]]:
    """The kernel's table of connections: local and remote address, state, user, and inode number."""
    table = Path("/proc/self/net") / name
    for line in table.read_text().splitlines()[1:] if table.exists() else ():
        words = line.split()
        yield words[1], words[2], words[3], int(words[7]), words[9]


# -- objects --------------------------------------------------------------------------------------


def sign_objects(key: bytes) -> None:
    """Sign every object that ranks exchange through ``torch.distributed`` with ``key``, and refuse any other."""
    from torch.distributed import distributed_c10d

    def signature(content: bytes) -> bytes:
        return hashlib.blake2b(content, key=hashlib.sha256(key).digest(), digest_size=_SIGNATURE_BYTES).digest()

    class Signing:
        def __init__(self, file: io.BytesIO) -> None:
            self._file = file

        def dump(self, value: object) -> None:
            content = pickle.dumps(value)
            self._file.write(signature(content) + content)

    class Verifying:
        def __init__(self, file: io.BytesIO) -> None:
            self._content = file.read()

        def load(self) -> object:
            content = self._content[_SIGNATURE_BYTES:]
            if not hmac.compare_digest(self._content[:_SIGNATURE_BYTES], signature(content)):
                raise RunError(
                    f"rank {os.environ.get('RANK', '0')}: expected an object that a rank of this job has signed, got "
                    f"another: nothing of it was read; if the job runs on several machines, set {KEY_VARIABLE} to the "
                    "same secret on all of them"
                )
            return pickle.loads(content)

    distributed_c10d._pickler, distributed_c10d._unpickler = Signing, Verifying  # type: ignore[assignment]
