"""Which tests run when, by measured duration: ``durations.txt``, processor seconds of this process and all that it
started.

``--quick`` leaves out tests whose call took 0.4 seconds or more, tests marked ``slow`` or ``gpu``, and files with
fixtures that take seconds. A test without a measurement is quick unless it starts ranks. ``tests/run.sh --quick`` does
this with the files in ``quick.txt``: some of each room, since all files together take minutes. Under xdist, the longest
files run first, so that all workers end together.

    python -m tests.tiers --measure [ARGUMENTS OF PYTEST]     measures again, with the linters, and writes durations.txt
    python -m tests.tiers                                     prints where the seconds of durations.txt go

Processor time, not wall time: other work may share the machine. ``durations.txt`` has a line for each kind, number of
times, seconds and name. A test has its call, its set-up without fixtures and its tear-down; a fixture is counted apart,
since whoever needs it first would pay for all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

DURATIONS = Path(__file__).with_name("durations.txt")
FAST_LOOP = Path(__file__).with_name("quick.txt")
QUICK = 0.4  # processor seconds
SHORTEST = 0.2  # faster tests are not listed, unless they start ranks
RANKS = {"job", "distributed"}  # fixtures that start ranks
# Their first test takes seconds for a shared fixture: a real model, a site, a whole study.
SHARED = (
    "tests/smollm2/", "tests/storage/", "tests/fuzz/", "tests/study/report/", "tests/test_quickstart.py",
    "tests/test_docs.py", "tests/masks/test_layouts.py", "tests/study/test_contrasts.py", "tests/study/test_results.py",
    "tests/preflight/test_verdicts.py", "tests/llama31/test_launch.py", "tests/llama31/test_studies.py",
    "tests/cli/test_wrong_inputs.py", "tests/engine/test_installed.py",
)  # fmt: skip
_HERTZ = os.sysconf("SC_CLK_TCK")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers", "which tests run")
    group.addoption("--quick", action="store_true", help="only tests that take less than 0.4 seconds")
    group.addoption("--fuzz-minutes", type=float, default=0.0, help="go on for so long with each reader of tests/fuzz")
    group.addoption("--measure", metavar="FILE", help="write into FILE what every test and fixture takes")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    taken = durations(DURATIONS)
    if config.getoption("--quick"):
        kept = [item for item in items if _is_quick(item, taken)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    if hasattr(config, "workerinput"):
        of_file: dict[Path, float] = defaultdict(float)
        for item in items:
            of_file[item.path] += taken.get(item.nodeid, 0.0)
        items.sort(key=lambda item: -of_file[item.path])  # stable: a file's tests stay together and in order


def _is_quick(item: pytest.Item, taken: dict[str, float]) -> bool:
    if any(item.get_closest_marker(name) for name in ("slow", "gpu")):
        return False
    if item.nodeid.startswith(SHARED):
        return False
    starts_ranks = not RANKS.isdisjoint(getattr(item, "fixturenames", ()))
    return taken.get(item.nodeid, QUICK if starts_ranks else 0.0) < QUICK


def durations(path: Path) -> dict[str, float]:
    """Processor seconds of the calls of tests, by their names."""
    return {name: seconds for (kind, name), (_, seconds) in read_measurements(path).items() if kind == "call"}


# What was measured: (kind, name) -> (number of times, processor seconds). Kinds: see KINDS.
Measurements = dict[tuple[str, str], tuple[int, float]]
KINDS = ("linter", "collection", "fixture", "setup", "call", "teardown")
OTHERS = "(all others)"  # the sum of what was too short to be listed


def read_measurements(path: Path) -> Measurements:
    if not path.is_file():
        return {}
    rows = (line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#"))
    return {(kind, name): (int(number), float(seconds)) for kind, number, seconds, name in rows}


def write_measurements(path: Path, measured: Measurements, ranks: Iterable[str] = ()) -> None:
    """``ranks``: tests that start ranks, which are listed however short they are."""
    listed: Measurements = {}
    long = set(ranks)
    for (kind, name), (number, seconds) in measured.items():
        is_listed = seconds >= SHORTEST or kind in ("linter", "collection") or (kind == "call" and name in long)
        key = (kind, name if is_listed else OTHERS)
        before = listed.get(key, (0, 0.0))
        listed[key] = (before[0] + number, before[1] + seconds)
    lines = [f"{kind}\t{number}\t{seconds:.1f}\t{name}\n" for (kind, name), (number, seconds) in sorted(listed.items())]
    path.write_text("# kind, times, processor seconds, name: python -m tests.tiers --measure\n" + "".join(lines))


def format_table(measured: Measurements, files: int = 15) -> str:
    """Seconds by kind, then the dearest fixtures and files."""
    by_kind: dict[str, tuple[int, float]] = dict.fromkeys(KINDS, (0, 0.0))
    by_file: dict[str, float] = defaultdict(float)
    for (kind, name), (number, seconds) in measured.items():
        by_kind[kind] = (by_kind[kind][0] + number, by_kind[kind][1] + seconds)
        if "::" in name:
            by_file[name.partition("::")[0]] += seconds
    dearest = sorted(((row[1], name) for (kind, name), row in measured.items() if kind == "fixture"), reverse=True)
    lines = [f"{seconds:8.1f} s  {number:6d} x  {kind}" for kind, (number, seconds) in by_kind.items()]
    lines.append(f"{sum(seconds for _, seconds in by_kind.values()):8.1f} s            total")
    lines += ["", "fixtures:"] + [f"{seconds:8.1f} s  {name}" for seconds, name in dearest[:files]]
    lines += ["", "files, without fixtures:"]
    lines += [f"{seconds:8.1f} s  {name}" for name, seconds in sorted(by_file.items(), key=lambda row: -row[1])[:files]]
    return "\n".join(lines)


class Stopwatch:
    """Measures one pytest process, and on xdist's controller adds up what its workers measured."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: Measurements = {}
        self.ranks: set[str] = set()
        self.fixtures = 0.0  # of the set-up that is under way

    def add(self, kind: str, name: str, seconds: float, number: int = 1) -> None:
        before = self.rows.get((kind, name), (0, 0.0))
        self.rows[kind, name] = (before[0] + number, before[1] + seconds)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        before = processor_seconds()
        result = yield
        self.add("collection", "collection", processor_seconds() - before)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        outer, self.fixtures = self.fixtures, 0.0
        before = processor_seconds()
        try:
            return (yield)
        finally:
            whole = processor_seconds() - before
            self.add("fixture", f"{fixturedef.argname} {fixturedef.baseid}".strip(), whole - self.fixtures)
            self.fixtures = outer + whole

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.fixtures, before = 0.0, processor_seconds()
        try:
            return (yield)
        finally:
            self.add("setup", item.nodeid, processor_seconds() - before - self.fixtures)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        if not RANKS.isdisjoint(getattr(item, "fixturenames", ())):
            self.ranks.add(item.nodeid)
        fixtures, before = self.fixtures, processor_seconds()
        try:
            return (yield)
        finally:  # a fixture that a test asks for in its call counts as a fixture
            self.add("call", item.nodeid, processor_seconds() - before - (self.fixtures - fixtures))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        before = processor_seconds()
        try:
            return (yield)
        finally:
            self.add("teardown", item.nodeid, processor_seconds() - before)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            rows = [(*key, *row) for key, row in self.rows.items()]
            session.config.workeroutput["measured"] = (rows, sorted(self.ranks))
        else:
            write_measurements(self.path, self.rows, self.ranks)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        rows, ranks = getattr(node, "workeroutput", {}).get("measured", ((), ()))
        for kind, name, number, seconds in rows:
            self.add(kind, name, seconds, number)
        self.ranks.update(ranks)


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--measure"):
        config.pluginmanager.register(Stopwatch(config.invocation_params.dir / path), "stopwatch")


def processor_seconds() -> float:
    """Processor time of this process and its descendants, including those that have ended."""
    used: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children[int(fields[1])].append(int(folder.name))
        used[int(folder.name)] = sum(map(int, fields[11:15]))  # user and system, its own and those of ended children
    waiting, total = [os.getpid()], 0
    while waiting:
        pid = waiting.pop()
        total += used.get(pid, 0)
        waiting += children[pid]
    return total / _HERTZ


LINTERS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))


def measure(arguments: list[str]) -> int:
    """Time the linters and the tests, and write ``durations.txt``; pytest's exit code."""
    linters: Measurements = {}
    for command in LINTERS:
        before = processor_seconds()
        subprocess.run(command, check=False, cwd=DURATIONS.parents[1])
        linters["linter", " ".join(command)] = (1, processor_seconds() - before)
    pytest_command = [sys.executable, "-m", "pytest", "--measure", str(DURATIONS), *arguments]
    code = subprocess.run(pytest_command, check=False).returncode
    measured = read_measurements(DURATIONS)
    write_measurements(DURATIONS, measured | linters, ranks=durations(DURATIONS))
    return code


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tiers", description="Where the tests' seconds go.")
    parser.add_argument("--measure", action="store_true", help="measure again; other arguments go to pytest")
    options, arguments = parser.parse_known_args(argv)
    code = measure(arguments) if options.measure else 0
    print(format_table(read_measurements(DURATIONS)))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
