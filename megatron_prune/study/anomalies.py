"""Loss spikes and numbers that are none: one policy for every run of a study, and a count of what happened.

The policy (``POLICY``): Megatron stops a run at the first loss or gradient that is not finite; the runner starts it
again from its last save, and gives its cell up after ``launch.retries``. A spike is counted, and nothing else: no batch
is skipped, and nothing is wound back. The flags behind it are the recipe's, and ``match`` compares them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

POLICY = "non-finite: stopped and retried from the last save; spikes: counted; no batch skipped"
FLAGS = (  # Megatron's, as an account's arguments have them
    "check_for_nan_in_loss_and_grad", "check_for_spiky_loss", "check_for_large_grads", "rerun_mode",
    "iterations_to_skip", "clip_grad",
)  # fmt: skip
WINDOW, DEVIATIONS, LEAST = 64, 10.0, 0.1


def count(losses: Path) -> dict[str, int]:
    """Steps of a ``losses.csv`` whose loss was no number, and spikes.

    A spike is a loss above the median of the ``WINDOW`` steps before it by ``DEVIATIONS`` times their median absolute
    deviation, and by ``LEAST`` nats at least. The first quarter of a window has none.
    """
    with open(losses, newline="") as handle:
        values = [float(row["loss"]) for row in csv.DictReader(handle)]
    spikes = 0
    for step, value in enumerate(values):
        before = [earlier for earlier in values[max(0, step - WINDOW) : step] if math.isfinite(earlier)]
        if len(before) < WINDOW // 4 or not math.isfinite(value):
            continue
        middle = median(before)
        spread = median(abs(earlier - middle) for earlier in before)
        spikes += value - middle > max(DEVIATIONS * spread, LEAST)
    return {"not_finite": sum(not math.isfinite(value) for value in values), "spikes": spikes}


def policy(arguments: Mapping[str, Any]) -> str:
    """A run's policy in words, with the flags that its account says it ran under."""
    flags = ", ".join(f"{name} {arguments[name]}" for name in FLAGS if arguments.get(name) not in (None, []))
    return f"{POLICY} ({flags})" if flags else POLICY
