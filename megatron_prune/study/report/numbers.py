"""How the page writes numbers and names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_prune.study.report.drawing import SETTINGS, signed

DASH = "–"


def setting(setting: str | None, against: str | None, sparse: bool) -> str:
    """A comparison's setting for people; a dense scratch run is the rule where pruning made the shape smaller."""
    if setting is None:
        return ""
    return SETTINGS[setting] + ", dense scratch" * (sparse and against == "dense")


def loss(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def flops(value: float | None) -> str:
    return DASH if value is None else f"{value:.3e}"


def span(values: Sequence[Any], show: Callable[[Any], str]) -> str:
    """One value, or the smallest and the largest where seeds differ."""
    known = sorted({value for value in values if value is not None})
    return DASH if not known else " to ".join(dict.fromkeys((show(known[0]), show(known[-1]))))


def interval(low: float | None, high: float | None) -> str:
    return DASH if low is None or high is None else f"[{signed(low)}, {signed(high)}]"
