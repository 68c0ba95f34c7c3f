"""Loss spikes and numbers that are none: one policy for every run of a study, and a count of what happened.

The policy: Megatron stops a run at the first loss or gradient that is not finite; the runner starts it
again from its last save, and gives its cell up after ``launch.retries``. A spike is counted, and nothing else: no batch
is skipped, and nothing is wound back. The flags behind it are the recipe's, and ``match`` compares all of those.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import median

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
