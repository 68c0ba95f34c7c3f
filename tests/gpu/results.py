"""From the tests on a GPU to examples/llama3.1_8b/RESULTS.md: a JSON of the results, and the page made from it.

    python -m tests.gpu.results TESTS.json [--benchmark BENCHMARK.json]

``bash tests/run.sh --gpu`` does both. Every figure on the page comes from the JSON; where there is none, the page
says "not run".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import artifacts

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "examples" / "llama3.1_8b" / "RESULTS.md"
COMMAND = "bash tests/run.sh --gpu"
VARIABLE = "MEGATRON_PRUNE_GPU_RESULTS"
# What the files in tests/gpu show, in the order of the page.
SUBJECTS = {
    "test_training.py": "BF16 and FP8 training from pruned, masked and scratch starts; zeros exact; FP8 within 1% of "
    "BF16 over 200 steps",
    "test_statistics.py": "statistics and losses on the GPU against the CPU, fp32, 1e-3",
    "test_pruning.py": "`prune`, `sparsify` and `calibrate --score` in bf16 and FP8 against the CPU",
    "test_saving.py": "asynchronous saves; runs resumed from a save, in bf16 and FP8",
}
BENCHMARK = "tokens per second and peak memory, FP8 presets against BF16, BF16 against bare Megatron"
NOT_RUN = "not run"


class Collector:
    """A pytest plugin that writes the results to ``file`` when the session ends."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A skip or an error in the set-up is the only report of its test.
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self._tests.append({
                "test": report.nodeid.split("tests/gpu/")[-1], "outcome": report.outcome, "seconds": report.duration,
                "figures": dict(report.user_properties),
            })  # fmt: skip

    def pytest_sessionfinish(self) -> None:
        artifacts.write_json(self._file, {**machine(), "tests": self._tests})


def machine() -> dict[str, Any]:
    """Card, driver, versions and date."""
    found: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": artifacts.device()}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["cards"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        found["cards"] = []
    return found | {"versions": artifacts.versions(), "command": COMMAND}


def render(found: Mapping[str, Any] | None, benchmark: Mapping[str, Any] | None = None) -> str:
    """The page; for None, one that says that nothing ran."""
    lines = ["# Llama-3.1-8B: results", ""]
    if found is None:
        lines += [
            "**Not run.** No GPU has been available so far: nothing in this folder has trained a model, and no figure",
            f"here comes from an H100. These tests need a GPU; `{COMMAND}` runs them and writes this page:",
            "",
        ]
    else:
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        lines += [
            f"Written by `{found['command']}` on {found['date']}, of what it ran.",
            "",
            f"* device: {found['device']['name']} ({found['device']['kind']} {found['device']['capability']})",
            f"* cards, driver, memory: {'; '.join(found['cards']) or 'unknown'}",
            f"* versions: {versions}",
            "",
        ]
    lines += ["| what | tests | result |", "| --- | --- | --- |"]
    tests = found["tests"] if found else []
    for file, subject in SUBJECTS.items():
        lines.append(
            f"| {subject} | `tests/gpu/{file}` | {_outcome([t for t in tests if t['test'].startswith(file)])} |"
        )
    ran = NOT_RUN if benchmark is None else "below"
    lines += [f"| {BENCHMARK} | `tests/benchmarks/gpu_training.py` | {ran} |"]
    lines += [f"| the studies of this folder | their launch lines | {NOT_RUN} |", ""]
    lines += _failures(tests) + _figures(tests) + _speeds(benchmark)
    if found is None:
        lines += [
            "Results without a GPU are in the documentation: Transformer Engine's own modules, built, saved,",
            "loaded, calibrated, pruned and trained on a CPU with the arithmetic of their kernels written in torch",
            "(`bash tests/run.sh --te`), FP8 recipes through Megatron's validation as rank 0 of 64, and the",
            "comparisons of `tests/gpu/test_pruning.py` on the CPU in bf16 (`tests/gpu/test_dry_run.py`).",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _outcome(tests: list[Mapping[str, Any]]) -> str:
    counts = {outcome: sum(t["outcome"] == outcome for t in tests) for outcome in ("passed", "failed", "skipped")}
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return said if counts["passed"] + counts["failed"] else NOT_RUN + (f" ({said})" if said else "")


def _failures(tests: list[Mapping[str, Any]]) -> list[str]:
    failed = [f"* `{t['test']}`" for t in tests if t["outcome"] == "failed"]
    return ["## Failed", "", *failed, ""] if failed else []


def _figures(tests: list[Mapping[str, Any]]) -> list[str]:
    rows = [
        f"| `{t['test'].split('::')[-1]}` | {name} | {value:.4g} | {t['outcome']} |"
        for t in tests
        for name, value in t["figures"].items()
    ]
    head = ["## Measured by the tests", "", "| test | what | figure | |", "| --- | --- | ---: | --- |"]
    return [*head, *rows, ""] if rows else []


def _speeds(benchmark: Mapping[str, Any] | None) -> list[str]:
    if benchmark is None:
        return []
    lines = ["## Speed and memory", "", f"{benchmark['card']}, {benchmark['layers']} layers of the model's width.", ""]
    lines += ["| what | ratio, median of pairs | |", "| --- | ---: | --- |"]
    lines += [
        f"| {r['name']} | {r['median']:.3f} | {'' if r['holds'] else 'beyond its limit'} |" for r in benchmark["ratios"]
    ]
    lines += ["", "| run | peak memory, GB |", "| --- | ---: |"]
    return [*lines, *(f"| {arm} | {peak:.1f} |" for arm, peak in benchmark["peak_gigabytes"].items()), ""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", metavar="TESTS.json")
    parser.add_argument("--benchmark", metavar="BENCHMARK.json")
    parser.add_argument("--output", metavar="FILE.md", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    found = artifacts.read_json(args.tests)
    ran = [test for test in found["tests"] if test["outcome"] != "skipped"]
    if not ran:
        print("nothing ran (no GPU is visible?): the page stays as it is", file=sys.stderr)
        return 1
    benchmark = artifacts.read_json(args.benchmark) if args.benchmark and Path(args.benchmark).is_file() else None
    artifacts.write_bytes(args.output, render(found, benchmark).encode())
    print(f"wrote {args.output}: {len(ran)} tests ran")
    return int(any(test["outcome"] == "failed" for test in ran))


if __name__ == "__main__":
    sys.exit(main())
