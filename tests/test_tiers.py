"""The tests' own tools: which tests are quick, and waiting for progress."""

from __future__ import annotations

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
    (tmp_path / "d.txt").write_text("1.5 tests/a.py::test[a b-c]\n0.2 tests/b.py::test\n")
    assert tiers.durations(tmp_path / "d.txt") == {"tests/a.py::test[a b-c]": 1.5, "tests/b.py::test": 0.2}
    assert tiers.durations(tmp_path / "none.txt") == {}


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
