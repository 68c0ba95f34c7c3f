"""What runs were made with: versions, the kind of device, and the precision. Listed where two compared runs differ.

A difference here is no reason not to compare: it is shown at the top of the report. Settings of precision are
arguments too, and ``match`` refuses those that differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Environment = Mapping[str, str]
PRECISIONS = ("fp4", "fp8", "fp16", "bf16")  # arguments; the first that is set says it


def of_account(account: Mapping[str, Any]) -> dict[str, str]:
    """Of a training: all of its attempts. The device is that of the rank that keeps the account."""
    attempts = account.get("attempts", [])
    found = _together([_of(attempt) for attempt in attempts])
    return {**found, "precision": precision(account["arguments"])}


def of_scores(scores: Mapping[str, Any]) -> dict[str, str]:
    """Of an evaluation."""
    return _of(scores)


def precision(arguments: Mapping[str, Any]) -> str:
    """``bf16``, ``fp8 (hybrid)`` …; ``fp32`` where no flag says another."""
    for name in PRECISIONS:
        if value := arguments.get(name):
            return name if value is True else f"{name} ({value})"
    return "fp32"


def differences(pruned: Environment, scratch: Environment) -> list[tuple[str, str, str]]:
    """Each thing that either of two runs says, with what they say."""
    names = [*pruned, *(name for name in scratch if name not in pruned)]
    return [(name, pruned.get(name, "none"), scratch.get(name, "none")) for name in names]


def words(environments: Iterable[Environment]) -> str:
    """All of them, for a footer: ``3 runs: torch 2.9, …, on NVIDIA H100``."""
    counts = Counter(
        ", ".join(f"{name} {value}" for name, value in sorted(one.items()) if name != "device")
        + (f", on {one['device']}" if "device" in one else "")
        for one in environments
    )
    return "; ".join(f"{count} run{'s' * (count != 1)}: {text}" for text, count in counts.items())


def _of(made: Mapping[str, Any]) -> dict[str, str]:
    device = made.get("device")
    own = {"device": f"{device['name']} ({device['kind']} {device['capability']})"} if device else {}
    return {**made.get("versions", {}), **own}


def _together(attempts: Sequence[Environment]) -> dict[str, str]:
    """One for all attempts at a run; what changed between them is joined by ``then``."""
    names = dict.fromkeys(name for attempt in attempts for name in attempt)
    return {name: " then ".join(dict.fromkeys(one.get(name, "none") for one in attempts)) for name in names}
