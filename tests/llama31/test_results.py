"""RESULTS.md as tests/gpu/results.py writes it from a GPU session: here from a made-up session, and from none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prune import artifacts
from tests.conftest import ROOT
from tests.gpu import results
from tests.llama31.example import EXAMPLE


def report(test: str, outcome: str, when: str = "call", **figures: float) -> Any:
    return SimpleNamespace(
        nodeid=f"tests/gpu/{test}", outcome=outcome, when=when, duration=1.5, user_properties=list(figures.items())
    )


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """The JSON of a session in which three tests ran."""
    collector = results.Collector(tmp_path / "tests.json")
    for one in (
        report("test_pruning.py::test_masks[wanda-bf16]", "passed", "setup"),
        report("test_pruning.py::test_masks[wanda-bf16]", "passed", masks=0.98765),
        report("test_pruning.py::test_masks[wanda-bf16]", "passed", "teardown"),
        report("test_pruning.py::test_masks[wanda-current]", "failed", masks=0.5),
        report("test_saving.py::test_asynchronous", "failed", "setup"),
        report("test_statistics.py::test_losses", "skipped", "setup"),
    ):
        collector.pytest_runtest_logreport(one)
    collector.pytest_sessionfinish()
    return tmp_path / "tests.json"


def test_the_page_says_what_ran_on_what_and_what_did_not(collected: Path, tmp_path: Path) -> None:
    found = artifacts.read_json(collected)
    found |= {
        "cards": ["NVIDIA Made Up, 570.1, 80 GiB"],
        "device": {"name": "Made Up", "kind": "cuda", "capability": "9.0"},
    }
    artifacts.write_json(collected, found)
    benchmark = {
        "card": "Made Up", "layers": 16, "peak_gigabytes": {"bf16": 61.25},
        "ratios": [{"name": "current / BF16", "median": 1.2345, "holds": True}],
    }  # fmt: skip
    artifacts.write_json(tmp_path / "benchmark.json", benchmark)
    page = tmp_path / "RESULTS.md"
    words = [str(collected), "--benchmark", str(tmp_path / "benchmark.json"), "--output", str(page)]
    assert results.main(words) == 1  # one failed
    text = page.read_text()
    rows = {line.split("`tests/gpu/")[1].split("`")[0]: line for line in text.splitlines() if "| `tests/gpu/" in line}
    assert rows["test_pruning.py"].endswith("| 1 passed, 1 failed |")
    assert rows["test_saving.py"].endswith("| 1 failed |")
    assert rows["test_statistics.py"].endswith("| not run (1 skipped) |") and rows["test_training.py"].endswith(
        "| not run |"
    )
    assert "Made Up (cuda 9.0)" in text and "NVIDIA Made Up, 570.1, 80 GiB" in text
    assert f"torch {found['versions']['torch']}" in text and "`bash tests/run.sh --gpu`" in text
    assert "| masks | 0.9877 | passed |" in text and "| masks | 0.5 | failed |" in text
    assert "* `test_saving.py::test_asynchronous`" in text
    assert "| current / BF16 | 1.234 |" in text and "| bf16 | 61.2 |" in text


def test_a_session_without_a_gpu_leaves_the_page_as_it_is(tmp_path: Path) -> None:
    collector = results.Collector(tmp_path / "tests.json")
    collector.pytest_runtest_logreport(report("test_pruning.py::test_masks", "skipped", "setup"))
    collector.pytest_sessionfinish()
    page = tmp_path / "RESULTS.md"
    assert results.main([str(tmp_path / "tests.json"), "--output", str(page)]) == 1 and not page.exists()


def test_the_page_in_the_repository_is_what_would_be_written_of_nothing() -> None:
    assert (EXAMPLE / "RESULTS.md").read_text() == results.render(None)


def test_every_file_of_tests_has_a_row() -> None:
    here = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")} - {"test_dry_run.py"}
    assert here == set(results.SUBJECTS)
