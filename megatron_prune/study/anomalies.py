"""Loss spikes and numbers that are none: one policy for every run of a study, and a count of what happened.

The policy: Megatron stops a run at the first loss or gradient that is not finite; the runner starts it
again from its last save, and gives its cell up after ``launch.retries``. A spike is counted, and nothing else: no batch
is skipped, and nothing is wound back. The flags behind it are the recipe's, and ``match`` compares all of those.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

WINDOW, DEVIATIONS, LEAST = 64, 10.0, 0.1
CHUNK = 4096  # steps whose windows are looked at together


def count(losses: Path) -> dict[str, int]:
    """Steps of a ``losses.csv`` whose loss was no number, and spikes.

    A spike is a loss above the median of the ``WINDOW`` steps before it by ``DEVIATIONS`` times their median absolute
    deviation, and by ``LEAST`` nats at least. The first quarter of a window has none.
    """
    with open(losses, newline="") as handle:
        values = np.array([float(row["loss"]) for row in csv.DictReader(handle)])
    finite = np.where(np.isfinite(values), values, np.nan)
    padded = np.concatenate([np.full(WINDOW, np.nan), finite])
    spikes = 0
    for start in range(0, len(values), CHUNK):
        own = finite[start : start + CHUNK]
        before = np.lib.stride_tricks.sliding_window_view(padded[start : start + len(own) + WINDOW - 1], WINDOW)
        enough = np.isfinite(own) & (np.isfinite(before).sum(axis=1) >= WINDOW // 4)
        whole = np.isfinite(before).all(axis=1)
        for rows, median in ((enough & whole, np.median), (enough & ~whole, np.nanmedian)):  # the former is faster
            middle = median(before[rows], axis=1)
            spread = median(np.abs(before[rows] - middle[:, None]), axis=1)
            spikes += int((own[rows] - middle > np.maximum(DEVIATIONS * spread, LEAST)).sum())
    return {"not_finite": int(np.isnan(finite).sum()), "spikes": spikes}
