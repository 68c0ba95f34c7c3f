"""Made-up answers of two arms to the questions of tasks, with a known true difference of accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

SKILL, GAP, NOISE = 0.3, 0.3, 0.7  # probits: of the scratch arm, of the pruned arm beyond it, of one answer


def differences(
    generator: np.random.Generator, studies: int, seeds: int, tasks: Sequence[int], *, seed: float = 0.1,
    question: float = 0.5, gap: float = GAP,
) -> tuple[list[np.ndarray], float]:  # fmt: skip
    """Per task a table [studies, seeds, questions] of the pruned arm's answer minus scratch's; the true difference.

    ``seed``: deviation of a run's skill. ``question``: how much a question may suit one arm. Both arms find the same
    questions hard.
    """
    skills = [generator.normal(0, seed, (studies, seeds, 1)) for _ in range(2)]
    found = []
    for questions in tasks:
        hard = generator.normal(0, 1, (studies, 1, questions))
        right = [
            SKILL + own + skill + hard + generator.normal(0, question, (studies, 1, questions))
            + generator.normal(0, NOISE, (studies, seeds, questions)) > 0
            for own, skill in zip((gap, 0), skills, strict=True)
        ]  # fmt: skip
        found.append(right[0].astype(np.int8) - right[1].astype(np.int8))
    scale = np.sqrt(seed**2 + 1 + question**2 + NOISE**2)
    truth = stats.norm.cdf((SKILL + gap) / scale) - stats.norm.cdf(SKILL / scale)
    return found, float(truth)
