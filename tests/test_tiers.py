"""The tests' own tools: which tests are quick, and waiting for progress."""

from __future__ import annotations

import os
import tomllib
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import tiers, waiting

ROOT = Path(__file__).resolve().parents[1]


def item(name: str, *, fixtures: tuple[str, ...] = (), marker: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(nodeid=name, fixturenames=fixtures, get_closest_marker=lambda asked: asked == marker)


def test_quick_is_what_was_measured_to_be():
    taken = {"short": 0.3, "long": 0.4, "ranks": 0.3}
    quick = [
        item("short"), item("new"), item("ranks", fixtures=("job",)), item("long"), item("short", marker="slow"),
        item("short", marker="gpu"), item("new ranks", fixtures=("tmp_path", "distributed")),
    ]  # fmt: skip
    assert [tiers._is_quick(one, taken) for one in quick] == [True, True, True, False, False, False, False]


def test_the_fast_loop_has_tests_of_every_room():
    listed = [ROOT / line for line in tiers.FAST_LOOP.read_text().split()]
    assert [path for path in listed if not path.exists()] == []
    rooms = {path.name for path in (ROOT / "megatron_prune").iterdir()} & {
        path.name for path in (ROOT / "tests").iterdir()
    }
    assert rooms - {path.relative_to(ROOT / "tests").parts[0] for path in listed} == set()


def test_durations_are_read_by_names_with_spaces(tmp_path):
    calls = {"tests/a.py::test[a b-c]": 1.5, "tests/b.py::test": 0.2}
    measured: tiers.Measurements = {("call", name): (1, seconds) for name, seconds in calls.items()}
    measured["setup", "tests/b.py::test"] = (1, 3.0)
    tiers.write_measurements(tmp_path / "d.txt", measured)
    assert tiers.durations(tmp_path / "d.txt") == calls
    assert tiers.durations(tmp_path / "none.txt") == {}


TIMED = """
import pytest

def burn(seconds):
    import time
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def inner():
    burn(0.3)

@pytest.fixture(scope="module")
def outer(inner, request):
    request.getfixturevalue("late")
    burn(0.5)

@pytest.fixture(scope="module")
def late():
    yield burn(0.4)
    burn(0.6)

@pytest.fixture(params=["", "/"])
def short(outer):
    pass

def test(short):
    burn(0.7)
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_every_phase_is_measured_once(tmp_path, workers):
    """Fixtures apart from the set-up that asks for them, and each without those that it asks for itself."""
    import subprocess
    import sys

    (tmp_path / "test_timed.py").write_text(TIMED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.tiers", "--measure", "d.txt", *workers]
    command += ["--rootdir", tmp_path, "--import-mode=importlib", "test_timed.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    measured = {key: seconds for key, (_, seconds) in tiers.read_measurements(tmp_path / "d.txt").items()}
    expected = {
        ("fixture", "inner test_timed.py"): 0.3, ("fixture", "outer test_timed.py"): 0.5,
        ("fixture", "late test_timed.py"): 0.4, ("call", "test_timed.py::test[]"): 0.7,
        ("call", "test_timed.py::test[/]"): 0.7, ("teardown", "test_timed.py::test[/]"): 0.6,
    }  # fmt: skip
    assert {key: measured[key] for key in expected} == pytest.approx(expected, abs=0.15)
    assert measured["setup", tiers.OTHERS] == pytest.approx(0, abs=0.15)
    assert measured["collection", "collection"] >= 0


def test_the_work_of_other_processes_counts():
    import subprocess
    import sys

    before = tiers.processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert tiers.processor_seconds() > before


def test_waiting_ends_when_it_holds_and_fails_when_nothing_moves(monkeypatch):
    now = count(step=10.0)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(waiting.time, "sleep", lambda _: None)
    looks, moves = count(), count()
    waiting.wait_for_progress(lambda: next(looks) == 100, "all of it", lambda: next(moves))  # 1,000 s, ever moving
    with pytest.raises(AssertionError, match="a save: nothing has moved for 300 s"):
        waiting.wait_for_progress(lambda: False, "a save")
    with pytest.raises(AssertionError, match="a save: not within 3600 s"):
        waiting.wait_for_progress(lambda: False, "a save", lambda: next(moves))


def test_every_module_that_is_mutated_and_every_test_of_it_is_there():
    table = tomllib.loads((ROOT / "tests" / "mutation" / "modules.toml").read_text())["modules"]
    gone = [module for module in table if not (ROOT / "megatron_prune" / f"{module}.py").is_file()]
    gone += [test for tests in table.values() for test in tests if not (ROOT / test).exists()]
    assert gone == []
