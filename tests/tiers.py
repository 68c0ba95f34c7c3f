"""Which tests run when, by measured duration: ``durations.txt``, processor seconds of a test and of all processes that
it started.

``--quick`` leaves out tests that took 0.4 seconds or more, tests marked ``slow`` or ``gpu``, and files with fixtures
that take seconds. A test without a measurement is quick unless it starts ranks. ``tests/run.sh --quick`` does this with
the files in ``quick.txt``: some of each room, since all files together take minutes. Under xdist, the longest files run
first, so that all workers end together.

    python -m pytest --measure tests/durations.txt [FILES]     measures again; one process, on an idle machine
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

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
    group.addoption("--measure", metavar="FILE", help="write what every test takes into FILE, where it is listed")


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
    """Processor seconds by the test's name."""
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    return {name: float(seconds) for seconds, name in lines}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    asked = item.config.getoption("--measure")
    before = processor_seconds() if asked else 0.0
    yield
    if asked:
        path = item.config.invocation_params.dir / asked  # tests change the working directory
        taken = durations(path)
        taken.pop(item.nodeid, None)
        seconds = processor_seconds() - before
        if seconds >= SHORTEST or not RANKS.isdisjoint(getattr(item, "fixturenames", ())):
            taken[item.nodeid] = seconds
        path.write_text("".join(f"{taken[name]:.1f} {name}\n" for name in sorted(taken)))


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
