"""Simulated evaluation text: documents of uneven length, each with its own gap between two models."""

from __future__ import annotations

import numpy as np

TRUTH = 0.1


def windows(generator: np.random.Generator, documents: int, *, skewed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Gaps of windows, whose mean over all text is ``TRUTH``, and the document of each.

    Lengths are geometric, of three windows; a document's own gap is shifted log-normal where ``skewed``, normal where
    not, and windows of it scatter around it.
    """
    lengths = generator.geometric(1 / 3, documents)
    own = generator.normal(0, 1, documents)
    if skewed:
        own = (np.exp(own) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    place = np.repeat(np.arange(documents), lengths)
    return TRUTH + 0.2 * own[place] + generator.normal(0, 0.1, len(place)), place
