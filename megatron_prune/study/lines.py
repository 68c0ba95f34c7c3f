"""A line of a match: what two runs were compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One compared thing: its name, what each run has, and ``equal`` or why a difference is allowed."""

    field: str
    pruned: Any
    scratch: Any
    verdict: str = "equal"
