"""Compare two measurements on a machine whose speed drifts: interleaved pairs, a ratio, its interval.

A benchmark here is a script: ``python tests/benchmarks/<name>.py [--pairs N] [--json FILE]``. It
prints the median of the pairwise ratios with an exact 95% interval (order statistics: no
assumption about how times are distributed) and exits with code 1 if the upper end is over its limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.stats

from megatron_prune import artifacts


@dataclasses.dataclass(frozen=True)
class Ratio:
    """``a / b`` of interleaved pairs; a and b in the unit of their measurement."""

    name: str
    median: float
    low: float
    high: float
    a: list[float]
    b: list[float]
    limit: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the whole interval is within the limit."""
        return self.limit is None or self.high <= self.limit

    def __str__(self) -> str:
        text = (
            f"{self.name}: ratio {self.median:.3f}, 95% interval [{self.low:.3f}, {self.high:.3f}], "
            f"{len(self.a)} interleaved pairs; medians {statistics.median(self.a):.4g} and "
            f"{statistics.median(self.b):.4g}"
        )
        if self.limit is not None:
            text += f"; limit {self.limit}: {'holds' if self.holds else 'EXCEEDED'}"
        return text


def interleaved(
    name: str,
    a: Callable[[], float],
    b: Callable[[], float],
    *,
    pairs: int = 10,
    limit: float | None = None,
    say: Callable[[str], None] = print,
) -> Ratio:
    """Measure ``a()`` and ``b()`` ``pairs`` times, taking turns at going first, after one warm-up each.

    Each call returns its measurement (seconds, or bytes). Fewer than six pairs cannot bound a
    median at 95% and are refused.
    """
    if pairs < 6:
        raise ValueError(f"{pairs} pairs have no 95% interval for a median: at least 6")
    a(), b()
    found_a, found_b = [], []
    for pair in range(pairs):
        if pair % 2:
            second, first = b(), a()
        else:
            first, second = a(), b()
        found_a.append(first)
        found_b.append(second)
        say(f"  pair {pair + 1}/{pairs}: {first:.4g} / {second:.4g} = {first / second:.3f}")
    return summarise(name, found_a, found_b, limit)


def summarise(name: str, a: list[float], b: list[float], limit: float | None = None) -> Ratio:
    """The median of the pairwise ratios and its exact two-sided 95% interval."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    interval = scipy.stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return Ratio(name, statistics.median(ratios), float(interval.low), float(interval.high), a, b, limit)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="interleaved pairs (default: 10)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def finish(ratios: list[Ratio], args: argparse.Namespace, **facts: Any) -> int:
    """Print, write ``--json``, and return the exit code: 1 when a limit is exceeded."""
    for ratio in ratios:
        print(ratio)
    if args.json:
        figures = [dataclasses.asdict(ratio) | {"holds": ratio.holds} for ratio in ratios]
        artifacts.write_json(
            args.json, {"ratios": figures, **facts, "machine": machine(), "versions": artifacts.versions()}
        )
    return 0 if all(ratio.holds for ratio in ratios) else 1


def machine() -> dict[str, Any]:
    """The machine, for the figures."""
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
