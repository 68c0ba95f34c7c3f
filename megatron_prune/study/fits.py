"""Loss against training tokens as a law, for one arm of a comparison.

Scratch: ``E + A * N**-alpha``, with N its training tokens (Hoffmann et al. 2022, arXiv:2203.15556, at one model size).
Pruned: ``E + A * (N + N0)**-alpha``, with N its retraining tokens and N0 what its start was worth in tokens.

Given alpha and N0 the law is linear in E and A, so that only these two are searched (variable projection): on a
grid first, since the valley is long and flat, then by SciPy's least squares.

Whether a law describes the losses is asked by an F test: its residuals against how far runs scatter. A seed's runs
share their order of the data at every budget, and so an offset; what all budgets have in common is no scatter, and of
the law of the mean over seeds it moves the floor alone. Where the floor ends at 0, a p below 0.01 comes at 2% of true
laws in place of 1%.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

FEWEST_BUDGETS = 5
EXPONENTS = (0.02, 3.0)
STARTS = (1e-2, 1e3)  # N0, as multiples of the smallest and of the largest number of tokens
POOR = 0.01  # p of the test of lack of fit below which a law is not used


@dataclass(frozen=True)
class Law:
    """``floor + scale * (tokens + start)**-exponent``, in nats."""

    floor: float
    scale: float
    exponent: float
    start: float = 0.0  # N0; 0 for scratch

    def __call__(self, tokens: np.ndarray | float) -> np.ndarray:
        return self.floor + self.scale * (np.asarray(tokens, dtype=np.float64) + self.start) ** -self.exponent

    @property
    def at_bound(self) -> bool:
        """Whether the exponent is at an end of what is searched: these losses do not determine it."""
        return not 1.01 * EXPONENTS[0] < self.exponent < 0.99 * EXPONENTS[1]

    @property
    def words(self) -> str:
        inside = f"(N + {self.start:.3g})" if self.start else "N"
        undetermined = " (exponent not determined)" * self.at_bound
        return f"{self.floor:.3f} + {self.scale:.3g} {inside}^-{self.exponent:.3f}{undetermined}"


@dataclass(frozen=True)
class Fit:
    """A law of the mean over seeds, how far it is off, and whether it describes them."""

    law: Law
    rms: float  # nats between the law and the means at the budgets
    lack_of_fit: float | None  # p of the F test against the scatter of runs; None for one seed

    @property
    def good(self) -> bool:
        return self.lack_of_fit is None or self.lack_of_fit >= POOR


def fit(tokens: Sequence[float], losses: np.ndarray, *, pruned: bool) -> Fit | None:
    """The law of one arm; ``losses`` [seeds, budgets]. None for fewer than ``FEWEST_BUDGETS`` budgets."""
    losses = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    seeds, budgets = losses.shape
    if budgets < FEWEST_BUDGETS:
        return None
    found = law(tokens, losses.mean(axis=0), pruned=pruned)
    residuals = losses.mean(axis=0) - found(np.asarray(tokens))
    p = None
    if seeds > 1:
        free = budgets - (4 if pruned else 3)
        # What is left without the means of every seed and every budget: errors of the single runs.
        errors = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
        own = (budgets - 1) * (seeds - 1)
        scatter, lack = float((errors**2).sum()) / own, seeds * float(residuals @ residuals) / free
        p = float(stats.f.sf(lack / scatter, free, own)) if scatter > 1e-20 else float(lack < 1e-12)
    return Fit(found, float(np.sqrt(np.mean(residuals**2))), p)


def law(budgets: Sequence[float], losses: np.ndarray, *, pruned: bool) -> Law:
    """The law of least squares through ``losses`` at ``budgets``, with E, A and N0 not negative."""
    tokens = np.asarray(budgets, dtype=np.float64)
    losses = np.asarray(losses, dtype=np.float64)
    points, bases = _grid(tuple(tokens.tolist()), pruned)
    centred = bases - bases.mean(axis=1, keepdims=True)
    # The squared error of the best E and A at every point of the grid; a falling law cannot explain rising losses.
    explained = np.maximum(centred @ losses, 0.0) ** 2 / (centred**2).sum(axis=1)
    begin = points[int(np.argmax(explained))]
    low, high = np.log(_bounds(tokens, pruned))

    def residuals(logs: np.ndarray) -> np.ndarray:
        basis = _basis(tokens, *np.exp(logs))
        floor, scale = _floor_and_scale(basis, losses)
        left: np.ndarray = floor + scale * basis - losses
        return left

    found = optimize.least_squares(
        residuals, np.clip(np.log(begin), low + 1e-9, high - 1e-9), bounds=(low, high), xtol=1e-10, ftol=1e-10,
        max_nfev=60,
    ).x  # fmt: skip
    exponent, *start = np.exp(found)
    floor, scale = _floor_and_scale(_basis(tokens, exponent, *start), losses)
    start_tokens = float(start[0]) if start else 0.0
    return Law(floor, scale * (tokens[0] + start_tokens) ** exponent, float(exponent), start_tokens)


def _basis(tokens: np.ndarray, exponent: float, start: float = 0.0) -> np.ndarray:
    """(N + N0)**-alpha, 1 at the first budget."""
    terms: np.ndarray = ((tokens + start) / (tokens[0] + start)) ** -exponent
    return terms


def _floor_and_scale(basis: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """Least squares with both not negative."""
    centred = basis - basis.mean()
    scale = float(centred @ losses) / max(float(centred @ centred), 1e-300)
    floor = float(losses.mean() - scale * basis.mean())
    if scale < 0:
        return float(losses.mean()), 0.0
    if floor < 0:
        return 0.0, float(basis @ losses) / float(basis @ basis)
    return floor, scale


def _bounds(tokens: np.ndarray, pruned: bool) -> tuple[list[float], list[float]]:
    """Of alpha, and of N0 for a pruned model."""
    low, high = [EXPONENTS[0]], [EXPONENTS[1]]
    return (low + [STARTS[0] * tokens[0]], high + [STARTS[1] * tokens[-1]]) if pruned else (low, high)


@functools.cache
def _grid(tokens: tuple[float, ...], pruned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points of the search [points, 1 or 2], evenly spaced in their logarithms, and the basis at each [points, B]."""
    values = np.array(tokens)
    axes = [np.geomspace(low, high, 40) for low, high in zip(*_bounds(values, pruned), strict=True)]
    points = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    return points, np.array([_basis(values, *point) for point in points])
