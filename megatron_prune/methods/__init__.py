"""The structured pruning methods: one file a method, and the small interface they share.

A method file defines ``METHOD``, an instance of a ``Method`` subclass; the file's name with dashes
is the method's name (``minitron_width.py`` is ``minitron-width``). ``get`` and ``names`` find it by
its file: there is no list to keep.

A method says which dimensions it cuts and which statistics it needs, and turns statistics and a
target shape into a ``Selection``, or into several between which the loss of the model decides. It
sees no model, no checkpoint and no process group.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError

DEPTH = ("num_layers",)
WIDTH = ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
DIMENSIONS = DEPTH + WIDTH


@dataclass(frozen=True)
class NearTie:
    """The cut runs between two units whose scores lie within 1e-5 relative.

    Another layout's rounding may choose otherwise among ``kept``, ``removed`` and ``others``
    (further units inside the same band). ``layer`` and ``group`` are source numbers; None where
    the choice is not made per layer or group.
    """

    unit: str  # layer, hidden, group, head or ffn
    kept: int
    removed: int
    kept_score: float
    removed_score: float
    others: tuple[int, ...] = ()
    layer: int | None = None
    group: int | None = None


@dataclass(frozen=True)
class Selection:
    """What survives, in source numbering and ascending; None keeps everything.

    ``heads`` and ``ffn`` have one entry a kept layer, in the order of ``layers``.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    ffn: tuple[tuple[int, ...], ...] | None = None
    near_ties: tuple[NearTie, ...] = ()

    @property
    def key(self) -> str:
        """Hex digest of what survives: the name under which its score is kept."""
        return artifacts.sha256_json([self.layers, self.hidden, self.heads, self.ffn])


@dataclass(frozen=True)
class Search:
    """Which sizes a search varies (of WIDTH), and how many shapes it may score."""

    axes: tuple[str, ...]
    max_candidates: int


@dataclass(frozen=True)
class Request:
    """What a method is asked: cut ``source`` to ``target`` by these statistics."""

    source: ModelShape
    target: ModelShape
    statistics: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # float64, see calibrate/statistics.py
    settings: Mapping[str, Any] = field(default_factory=dict)  # the method's own flags
    seed: int | None = None


class Method(ABC):
    """A structured method. Subclasses are stateless; their file's docstring explains the method.

    Most rank by statistics alone: they are ``RankingMethod``s.
    """

    #: Dimensions that an explicit ``--target-…`` may cut (names of ``ModelShape`` fields).
    dimensions: tuple[str, ...]
    #: True where the method draws random numbers, and so takes ``--seed``.
    random: bool = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - most have none
        """Add the method's own flags; they arrive as ``Request.settings`` under their ``dest``."""

    def free_dimensions(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Dimensions that may be chosen to meet ``--ratio`` or ``--target-params``."""
        return self.dimensions

    def search(self, settings: Mapping[str, Any]) -> Search | None:
        """Which shapes compete to meet ``--ratio`` or ``--target-params``; None: a rule gives the shape."""
        return None

    def needs_scores(self, settings: Mapping[str, Any]) -> bool:
        """True where the model must be run with every candidate before one can be chosen."""
        return self.search(settings) is not None

    @abstractmethod
    def needs(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Keys of the statistics that ``candidates`` reads; empty where it reads none."""

    @abstractmethod
    def candidates(self, request: Request) -> list[Selection]:
        """What may survive: each exactly ``request.target``. Between equal losses the first is taken."""


class RankingMethod(Method):
    """A method whose scores say what survives once the target is known."""

    def candidates(self, request: Request) -> list[Selection]:
        return [self.select(request)]

    @abstractmethod
    def select(self, request: Request) -> Selection:
        """Choose what survives: exactly ``request.target``."""


def names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Method:
    """The method of that name; UsageError lists the names there are."""
    if name not in names():
        raise UsageError("--method", given=name, allowed="one of " + ", ".join(names()))
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
