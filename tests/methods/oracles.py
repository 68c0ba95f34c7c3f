"""The sparse methods as their papers define them: float64, plain loops, numpy; nothing of the package.

Matrices are [out, in]; inputs are lists of sequences [tokens, in]. Masks are bool, True where a weight stays.
Of equal scores the lower index stays, and ``ratio`` is a Fraction, so that counts are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def lowest(scores: Sequence[float] | np.ndarray, count: int) -> list[int]:
    """Indices of the ``count`` lowest; of equal ones the higher index goes first."""
    return np.lexsort((-np.arange(len(scores)), scores))[:count].tolist()


def lowest_of_each_group(scores: np.ndarray, keep: int, m: int) -> np.ndarray:
    """True for all but the ``keep`` highest of every ``m`` consecutive scores of a row."""
    chosen = np.zeros(scores.shape, bool)
    for row in range(len(scores)):
        for start in range(0, scores.shape[1], m):
            group = scores[row, start : start + m].tolist()
            for i in sorted(range(m), key=lambda i: (group[i], -i))[: m - keep]:
                chosen[row, start + i] = True
    return chosen


def magnitude(weight: np.ndarray, ratio: Fraction, keep: int = 0, m: int = 0) -> np.ndarray:
    scores = np.abs(weight)
    if m:
        return ~lowest_of_each_group(scores, keep, m)
    kept = np.ones(weight.size, bool)
    kept[lowest(scores.ravel(), int(ratio * weight.size))] = False
    return kept.reshape(weight.shape)


def wanda_scores(weight: np.ndarray, inputs: Sequence[np.ndarray]) -> np.ndarray:
    squares = np.mean([(x.astype(np.float64) ** 2).sum(0) for x in inputs], axis=0)  # [in]
    return np.abs(weight) * np.sqrt(squares)


def wanda(weight: np.ndarray, inputs: Sequence[np.ndarray], ratio: Fraction, keep: int = 0, m: int = 0) -> np.ndarray:
    scores = wanda_scores(weight, inputs)
    if m:
        return ~lowest_of_each_group(scores, keep, m)
    kept = np.ones(weight.shape, bool)
    for row in range(len(weight)):
        kept[row, lowest(scores[row], int(ratio * weight.shape[1]))] = False
    return kept


def hessian(inputs: Sequence[np.ndarray]) -> np.ndarray:
    """(2 / n) Σ X Xᵀ over n sequences, undamped."""
    return sum(2 / len(inputs) * x.astype(np.float64).T @ x.astype(np.float64) for x in inputs)


def eliminated(hessian: np.ndarray) -> np.ndarray:
    """Row i: row i of the damped H's inverse once columns before i are gone, by Gaussian elimination.

    That is the inverse of H restricted to columns i and later; the optimal-brain-surgeon step reads this row.
    """
    h, columns = hessian.copy(), len(hessian)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(columns))
    rows = np.zeros((columns, columns))
    for i in range(columns):
        rows[i, i:] = inverse[i, i:]
        inverse[i:, i:] -= np.outer(inverse[i:, i], inverse[i, i:]) / inverse[i, i]
    return rows


def sparsegpt(
    weight: np.ndarray, hessian: np.ndarray, lead: np.ndarray, ratio: Fraction, keep: int = 0, m: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(pruned weight, mask), not in the factored form; ``lead`` is ``eliminated(hessian)``."""
    w = weight.astype(np.float64)
    rows, columns = w.shape
    w[:, np.diag(hessian) == 0] = 0
    width = 128 // (m or 1) * (m or 1)
    removed = np.zeros(w.shape, bool)
    for i in range(columns):
        if not m and i % width == 0:
            stop = min(i + width, columns)
            costs = w[:, i:stop] ** 2 / np.diag(lead)[i:stop]
            go = np.zeros(costs.size, bool)
            go[lowest(costs.ravel(), int(ratio * rows * stop) - int(ratio * rows * i))] = True
            removed[:, i:stop] = go.reshape(costs.shape)
        if m and i % m == 0:
            costs = w[:, i : i + m] ** 2 / np.diag(lead)[i : i + m]
            removed[:, i : i + m] = lowest_of_each_group(costs, keep, m)
        error = np.where(removed[:, i], w[:, i], 0) / lead[i, i]
        w[:, i:] -= np.outer(error, lead[i, i:])
        w[removed[:, i], i] = 0
    return w, ~removed


def reconstruction(weight: np.ndarray, pruned: np.ndarray, hessian: np.ndarray) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ)"""
    difference = weight.astype(np.float64) - pruned.astype(np.float64)
    return float(np.sum((difference @ hessian) * difference))
