"""Ranks of one machine among themselves: what another user of the machine can reach, join, or have unpickled."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prune.engine import network
from megatron_prune.errors import RunError, UsageError
from tests.waiting import LONGEST

NOBODY = 65534
needs_another_user = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def of_own_sockets(state: str, process: int | None = None) -> list[str]:
    """Local addresses, in the kernel's notation, of a process's sockets in this state."""
    links = []
    for one in Path(f"/proc/{process or os.getpid()}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(one))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == state and f"socket:[{row[9]}]" in links]


def listening(process: int | None = None) -> list[str]:
    return of_own_sockets("0A", process)


def is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in ("0100007F", "00000000000000000000000001000000")


@contextlib.contextmanager
def another_user(act: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
    """``act`` in a forked process of another user: yields a function that has it act and returns what it returned.

    What ``act`` opened stays open until the end of the block. Made before the caller starts threads."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            kept = []  # connections that act returns along with its answer
            while asked := theirs.recv(1 << 16):
                try:
                    answer, opened = act(pickle.loads(asked))
                    kept.append(opened)
                except OSError as error:
                    answer = type(error).__name__
                theirs.sendall(pickle.dumps(answer))
        finally:
            os._exit(0)
    theirs.close()

    def ask(question: Any) -> Any:
        ours.sendall(pickle.dumps(question))
        return pickle.loads(ours.recv(1 << 16))

    try:
        yield ask
    finally:
        ours.close()
        os.waitpid(child, 0)


def connect(port: int) -> tuple[str, Any]:
    """As a rank connects to another one: with the number of the connection, which is easy to guess."""
    connection = socket.create_connection((network.LOOPBACK, port), timeout=LONGEST)
    connection.sendall(bytes(8))
    return "connected", connection


def open_places(places: list[str]) -> tuple[str, Any]:
    for place in places:
        os.close(os.open(place, os.O_RDWR))
    return "opened", None


def form_a_group() -> dict[str, Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for _ in range(2):
        dist.new_group(list(range(dist.get_world_size())))
    dist.barrier()
    return {"listening": listening(), "connected": of_own_sockets("01")}


def test_ranks_listen_on_the_loopback_address_alone(distributed) -> None:
    for rank in distributed(form_a_group, 2):
        assert rank["listening"] and all(map(is_loopback, rank["listening"]))  # gloo's own
        assert rank["connected"] and all(map(is_loopback, rank["connected"]))


def form_a_group_without_a_launcher() -> dict[str, Any]:
    for name in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    network._meeting = None
    network.make_private()
    return form_a_group()


def test_so_does_a_verb_of_one_process(distributed) -> None:
    ((rank),) = distributed(form_a_group_without_a_launcher, 1)
    assert rank["listening"] and all(map(is_loopback, rank["listening"]))


@needs_another_user
def test_another_user_cannot_open_the_file_in_which_ranks_meet() -> None:
    file = network.anonymous_file()
    place = f"/proc/{os.getpid()}/fd/{file}"
    with another_user(open_places) as ask:
        assert ask([place]) == "PermissionError"
    assert open_places([place])[0] == "opened"
    os.close(file)


def meet_a_stranger() -> tuple[str, list[str]]:
    """Rank 0's connections before and after another user has connected to its port."""
    import torch.distributed as dist

    with another_user(connect) as ask:
        dist.init_process_group("gloo")
        found = []
        network.refuse_strangers()
        dist.barrier()
        if dist.get_rank() == 0:
            (port,) = {int(address.rpartition(":")[2], 16) for address in listening()}
            before = len(of_own_sockets("01"))
            found.append(ask(port))
            while len(of_own_sockets("01")) == before:  # until gloo has accepted it
                pass
            try:
                network.refuse_strangers()
            except RunError as error:
                found.append(str(error))
        dist.barrier()
    return found


@needs_another_user
def test_a_connection_of_another_user_is_refused(distributed) -> None:
    """gloo takes it: it would be a rank if it had come first."""
    (answer, refusal), nothing = distributed(meet_a_stranger, 2)
    assert answer == "connected"
    assert f"the user with number {NOBODY}" in refusal and "rank 0" in refusal
    assert nothing == []


def test_megatron_asks_after_its_groups_have_formed(monkeypatch) -> None:
    done = []
    training = SimpleNamespace(initialize_megatron=lambda **named: done.append(named) or "finish")
    monkeypatch.setattr(network, "refuse_strangers", lambda: done.append("asked"))
    network.guard(training)
    network.guard(training)
    assert training.initialize_megatron(store=1) == "finish"
    assert done == [{"store": 1}, "asked"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("WORLD_SIZE=2", "WORLD_SIZE: expected both, from a launcher, got 2 without RANK"),
        ("WORLD_SIZE=two", "WORLD_SIZE: expected a whole number from 1 on, got 'two'"),
        ("WORLD_SIZE=0 RANK=0", "WORLD_SIZE: expected a whole number from 1 on"),
        ("RANK=-1", "RANK: expected a whole number from 0 on, got '-1'"),
        ("RANK=3", "RANK: expected less than 1, the number of ranks"),
        ("WORLD_SIZE=4 RANK=1 LOCAL_WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK: expected less than 2"),
        ("MASTER_PORT=x", "MASTER_PORT: expected a whole number"),
        ("WORLD_SIZE=4 RANK=3 LOCAL_WORLD_SIZE=2 LOCAL_RANK=1 MASTER_PORT=29500", None),
        ("RANK=0", None),
    ],
)
def test_variables_of_a_launcher_are_whole(monkeypatch: pytest.MonkeyPatch, line: str, said: str | None) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in line.split():
        monkeypatch.setenv(*word.split("="))
    if said is None:
        network.check_launcher()
        return
    with pytest.raises(UsageError) as refused:
        network.check_launcher()
    assert str(refused.value).startswith(said)


def test_a_rendezvous_that_nobody_joins_says_what_it_waits_for_and_ends(monkeypatch, capsys) -> None:
    from torch.distributed import TCPStore

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "SECONDS_UNTIL_SAID", 0.0)
    with pytest.raises(RunError, match="they did not come .*1/2 clients joined"), network.watch_rendezvous():
        TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=datetime.timedelta(seconds=2))
    assert "rank 0 waits for the other ranks of 2 at 127.0.0.1:" in capsys.readouterr().out


def addresses_of_this_machine() -> list[str]:
    """Its addresses other than the loopback one."""
    found = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    return [address for address in found if ":" not in address and not address.startswith("127.")]


def reach(places: list[tuple[str, int]]) -> tuple[int, Any]:
    reached = []
    for place in places:
        with contextlib.suppress(OSError):
            reached.append(socket.create_connection(place, timeout=LONGEST))
    return len(reached), reached


def test_only_this_machine_reaches_torchruns_store() -> None:
    store = network.store_of_this_machine()
    own = [address for address in listening() if address.endswith(f":{store.port:04X}")]
    assert own == [f"0100007F:{store.port:04X}"]
    assert reach([(address, store.port) for address in addresses_of_this_machine()])[0] == 0
    assert reach([(network.LOOPBACK, store.port)])[0] == 1


# -- torchrun -------------------------------------------------------------------------------------

UNDER_TORCHRUN = """
import os, sys
from megatron_prune.engine import network
from tests.engine.test_network import form_a_group, is_loopback, listening
network.make_private()
formed = form_a_group()
import torch.distributed as dist
told = [None, None]
dist.all_gather_object(told, dist.get_rank())
network.refuse_strangers()
agent = listening(os.getppid())
loopback = all(map(is_loopback, formed["listening"])), len(agent), all(map(is_loopback, agent))
line = ["rank", dist.get_rank(), told, *loopback, os.readlink(f"/proc/self/fd/{network._meeting}")]
os.write(1, (" ".join(map(str, line)) + "\\n").encode())  # at once: the other rank writes too
"""


def test_ranks_of_our_torchrun_meet_among_themselves(tmp_path) -> None:
    """Whatever the environment says of rendezvous, as ``launch/node.sh`` sets it for several nodes."""
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    command = [sys.executable, "-m", "megatron_prune.engine.launch", "-", "--nproc-per-node", "2", script]
    chosen = {"PET_STANDALONE": "1", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "localhost:29500"}
    search = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **chosen, **search})
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert lines == [f"rank {rank} [0, 1] True 1 True /memfd:megatron_prune_rendezvous (deleted)" for rank in (0, 1)], (
        done.stderr
    )


@pytest.fixture
def told(monkeypatch) -> Iterator[Callable[[str], int]]:
    """What a rank makes of a place that it reads in torchrun's store."""
    import torch.distributed

    def ask(place: str) -> int:
        store = SimpleNamespace(get=lambda key: place.encode("utf-8", "surrogateescape"))
        monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 1, 2)]))
        return network._file_of_first_rank()

    yield ask


def test_the_place_of_the_file_is_not_trusted(told, tmp_path) -> None:
    file = network.anonymous_file()
    os.write(file, b"here")
    found = told(f"/proc/{os.getpid()}/fd/{file}")
    assert os.pread(found, 9, 0) == b"here"
    os.close(found)
    own = tmp_path / "own"
    own.write_text("precious")
    with open(own, "r+") as other:
        for place in (
            str(own), "", "/proc/self/fd/1", f"/proc/{os.getpid()}/fd/{other.fileno()}",
            f"/proc/{os.getpid()}/fd/../fd/{file}", f"/proc/{os.getpid()}/fd/99999", "\udcff\0",
        ):  # fmt: skip
            with pytest.raises(RunError, match="rank 1: expected the first rank's file for rendezvous"):
                told(place)
    os.close(file)


def make_a_file(_: Any) -> tuple[str, Any]:
    return f"/proc/{os.getpid()}/fd/{network.anonymous_file()}", None


@needs_another_user
def test_a_file_of_another_user_is_refused(told) -> None:
    with another_user(make_a_file) as ask, pytest.raises(RunError, match="it is another file"):
        told(ask(None))


# -- objects --------------------------------------------------------------------------------------


class Touches:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


@pytest.fixture
def objects(monkeypatch) -> SimpleNamespace:
    """torch's conversion of objects to what it sends, and back; changes to it end with the test."""
    from torch.distributed import distributed_c10d as c10d

    for name in ("_pickler", "_unpickler"):
        monkeypatch.setattr(c10d, name, getattr(c10d, name))
    return SimpleNamespace(
        sent=lambda value: c10d._object_to_tensor(value, "cpu", None)[0],
        received=lambda tensor: c10d._tensor_to_object(tensor, tensor.numel(), None),
    )


def test_an_object_that_is_not_signed_is_not_unpickled(objects, tmp_path) -> None:
    evil = objects.sent(Touches(tmp_path / "executed"))
    objects.received(evil)
    assert (tmp_path / "executed").exists()  # as torch does it
    (tmp_path / "executed").unlink()

    network.sign_objects(b"k" * 32)
    good = objects.sent({"a": [1, None]})
    assert objects.received(good) == {"a": [1, None]}
    flipped = good.clone()
    flipped[-3] ^= 1
    network.sign_objects(b"x" * 32)
    of_another_job = objects.sent(Touches(tmp_path / "executed"))
    network.sign_objects(b"k" * 32)
    for bad in (evil, flipped, of_another_job, good[:10], good[:0]):
        with pytest.raises(RunError, match="a rank of this job has signed"):
            objects.received(bad)
    assert not (tmp_path / "executed").exists()


def key_of_a_rank() -> tuple[bool, bytes]:
    from torch.distributed import distributed_c10d as c10d

    file = io.BytesIO()
    c10d._pickler(file).dump("word")
    return c10d._unpickler is pickle.Unpickler, file.getvalue()


def test_ranks_of_a_job_have_one_key_and_no_other_job_has_it(distributed) -> None:
    first, second = distributed(key_of_a_rank, 2), distributed(key_of_a_rank, 1)
    assert not any(plain for plain, _ in (*first, *second))
    assert first[0] == first[1] and first[0] != second[0]


def test_on_several_machines_the_key_is_in_the_environment(objects, monkeypatch) -> None:
    monkeypatch.setattr(network, "_meeting", None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    plain = objects.sent("word")
    network.make_private()
    assert objects.received(plain) == "word"  # no key: as torch does it
    monkeypatch.setenv(network.KEY_VARIABLE, "short")
    with pytest.raises(UsageError, match=network.KEY_VARIABLE):
        network.make_private()
    monkeypatch.setenv(network.KEY_VARIABLE, "k" * 64)
    network.make_private()
    with pytest.raises(RunError, match="signed"):
        objects.received(plain)
    assert network._meeting is None
