"""A search for every layer's sizes (``methods/evolution.py``), as far as the scores of its candidates say.

Nothing is stored but scores: the search is followed again from its start, with the losses that the statistics hold,
until one is missing. So it can be stopped anywhere, and continues wherever its statistics are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_prune.methods import evolution
from megatron_prune.methods.base import PruningRequest
from megatron_prune.methods.evolution import Evolution
from megatron_prune.methods.size_search import Layers
from megatron_prune.methods.units import UnitMethod
from megatron_prune.structured.candidate import Candidate


@dataclass(frozen=True)
class SearchState:
    """The candidates that were tried, in order, and those to run next on the first ``windows`` windows, if any are."""

    tried: list[Candidate]
    missing: list[Candidate]
    windows: int


class _Unscored(Exception):  # noqa: N818 (it ends a search that is to go on, and is no error)
    def __init__(self, missing: list[Candidate], windows: int) -> None:
        super().__init__(missing)
        self.missing, self.windows = missing, windows


class SizeEvolution:
    """The search of one request; ``windows`` is the number of all calibration windows."""

    def __init__(self, method: UnitMethod[Any], request: PruningRequest[Any], windows: int) -> None:
        generations = method.evolution(request.settings)
        assert generations is not None
        self._method, self._request, self._windows = method, request, windows
        self._search = Evolution(generations, request.seed or 0)
        self._starts, self._swaps = method.starts(request), method.swaps(request)
        self._made: dict[Layers, Candidate] = {}

    def progress(self, loss_on: Callable[[str, int], float | None]) -> SearchState:
        """``loss_on`` gives the loss of the candidate with a key on the first so many windows, if it is known."""
        tried: dict[Layers, Candidate] = {}

        def losses(allocations: Sequence[Layers], first: int, last: int) -> list[float]:
            asked = [tried.setdefault(one, self._candidate(one)) for one in allocations]
            if missing := [one for one in asked if loss_on(one.key, last) is None]:
                raise _Unscored(missing, last)
            return [_mean(one.key, first, last) for one in asked]

        def _mean(key: str, first: int, last: int) -> float:
            whole, part = loss_on(key, last), loss_on(key, first) if first else 0.0
            assert whole is not None and part is not None  # the same was run in the round before
            return (last * whole - first * part) / (last - first)

        try:
            found = evolution.begin(self._starts, self._windows, losses)
            while found.generation < self._search.generations:
                found = evolution.generation(found, self._search, self._swaps.offspring, self._windows, losses)
        except _Unscored as stop:
            return SearchState(list(tried.values()), stop.missing, stop.windows)
        return SearchState(list(tried.values()), [], self._windows)

    def _candidate(self, sizes: Layers) -> Candidate:
        """Made once: its key takes time to compute."""
        if sizes not in self._made:
            choose = partial(self._method.of_sizes, self._request, sizes)
            source = self._request.source
            target = source.with_layers(sizes)
            biased = self._method.adds_biases(self._request.settings)
            self._made[sizes] = Candidate(source, target.with_biases() if biased else target, choose)
        return self._made[sizes]
