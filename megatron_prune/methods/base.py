"""The interfaces of the structured and the sparse pruning methods.

A structured method cuts whole dimensions. It declares which dimensions it cuts and which statistics it needs, and
turns statistics and a target shape into a ``Selection``, or into several candidates among which the model's loss
decides. A sparse method keeps every shape and zeroes weights, one matrix at a time, based on the matrix and possibly
its inputs. Neither kind reads a model or a checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch

from megatron_prune import artifacts
from megatron_prune.checkpoint.kept import Kept
from megatron_prune.checkpoint.layout import Axis, ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.masks.pattern import Pattern
from megatron_prune.methods.selection import Rows
from megatron_prune.settings import Settings

DEPTH = ("num_layers",)
WIDTH = ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")
DIMENSIONS = DEPTH + WIDTH


@dataclass(frozen=True)
class NearTie:
    """The cut runs between two units whose scores differ by at most 1e-5 relative, or whose learned log α by 2e-3.

    Rounding under another layout may choose differently among ``kept``, ``removed`` and ``others`` (further units in
    the same band). ``layer`` and ``group`` are source numbers; None if the choice is not made per layer or group.
    """

    unit: str  # layer, hidden, group, head, ffn, candidate, survivor (of a search's round), or finalist (is retrained)
    kept: int
    removed: int
    kept_score: float
    removed_score: float
    others: tuple[int, ...] = ()
    layer: int | None = None
    group: int | None = None

    def renumbered(self, numbers: Sequence[int]) -> NearTie:
        """This tie between indices of ``numbers`` as one between the units with these numbers."""
        others = tuple(sorted(numbers[i] for i in self.others))
        return replace(self, kept=numbers[self.kept], removed=numbers[self.removed], others=others)


@dataclass(frozen=True)
class Gates:
    """Factors that multiply what is kept, in the order of a ``Selection``'s indices; None: 1 everywhere.

    ``hidden`` multiplies what is read from and written to the residual stream, ``layers`` the output of a layer's
    attention and MLP, ``heads`` and ``ffn`` the inputs of ``linear_proj`` and ``linear_fc2``.
    """

    layers: tuple[float, ...] | None = None
    hidden: tuple[float, ...] | None = None
    heads: tuple[tuple[float, ...], ...] | None = None
    ffn: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Compensation:
    """Mean inputs of what is removed, ascending in source order, one entry per kept layer.

    What the removed columns make of them is added to the biases: ``heads``, of the channels of removed heads, to
    linear_proj's, and ``ffn`` to linear_fc2's (structured/compensation.py). None: nothing is removed there.
    """

    heads: tuple[tuple[float, ...], ...] | None = None
    ffn: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Selection:
    """What is kept, in source numbering and ascending; None keeps everything.

    ``heads`` and ``ffn`` have one entry per kept layer, in the order of ``layers``. Entries may differ in length; an
    empty one leaves the layer without attention, or without an MLP.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    ffn: tuple[tuple[int, ...], ...] | None = None
    near_ties: tuple[NearTie, ...] = ()
    gates: Gates | None = None  # of learned masks
    compensation: Compensation | None = None

    @property
    def key(self) -> str:
        """Hex digest of what is kept, and whether biases make up for the rest: the key of its score."""
        made_up = [] if self.compensation is None else ["means"]
        return artifacts.sha256_json([self.layers, self.hidden, self.heads, self.ffn, *made_up])

    def shape(self, source: ModelShape) -> ModelShape:
        """What is left of a model of the shape ``source``. CheckpointError if all attention or all MLPs go."""
        given, layers = source.by_layer(), []
        for place, layer in enumerate(self.layers):
            heads = None if self.heads is None else self.heads[place]
            ffn = None if self.ffn is None else self.ffn[place]
            layers.append(Kept(heads=heads, ffn=ffn).shrink(given[layer]))
        shape = source.with_layers(layers)
        shape = shape if self.compensation is None else shape.with_biases()
        return shape if self.hidden is None else replace(shape, hidden_size=len(self.hidden))


@dataclass(frozen=True)
class Retraining:
    """The best ``candidates`` of a search are each trained on ``tokens`` tokens before one is chosen."""

    candidates: int
    tokens: int


@dataclass(frozen=True)
class Search:
    """Which sizes a search varies (of DIMENSIONS), and how many shapes it may score (None: all near the target).

    If the user lists the competing shapes, ``shapes`` are their sizes on ``axes``.
    """

    axes: tuple[str, ...]
    max_candidates: int | None
    retraining: Retraining | None = None
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class TaskFile:
    """A multiple-choice task whose accuracy chooses among candidates."""

    path: str  # JSON lines, see data/multiple_choice.py
    metric: str  # one of options.METRICS


@dataclass(frozen=True)
class Budget:
    """What may be kept where layers may differ: how many parameters, and the sizes that ranks and kernels can take.

    ``parameters`` is the number to keep, ``of`` the blocks' linears or all. FFN sizes are multiples of ``ffn_step``
    (a layer's own full size may stay), heads' channels of ``head_step``; ``tensor_parallel`` divides heads and FFN
    sizes, and divides or is divided by the number of groups.
    """

    parameters: float
    of: Literal["linears", "all"] = "linears"
    ffn_step: int = 1
    head_step: int = 1
    tensor_parallel: int = 1
    apart: bool = False  # explicit sizes: heads and FFN channels each keep their own total

    TOLERANCE: ClassVar[float] = 0.005  # of ``parameters``

    def count(self, shape: ModelShape) -> int:
        """The parameters of ``shape`` that count."""
        return shape.linear_parameters() if self.of == "linears" else shape.parameters()

    def error(self, shape: ModelShape) -> float:
        """How far ``shape`` is off the budget, as a fraction of it; negative if it keeps too little."""
        return self.count(shape) / self.parameters - 1


@dataclass(frozen=True)
class PruningRequest[O: Settings]:
    """A request to a method: cut ``source`` to ``target`` using these statistics.

    A method whose layers may differ gets a ``budget`` too, which its selection must meet in place of ``target``.
    """

    source: ModelShape
    target: ModelShape
    settings: O  # the method's own flags
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)  # float64, see structured/statistics.py
    seed: int | None = None
    tokens: int = 0  # that the sums of ``statistics`` are over
    budget: Budget | None = None
    layers: tuple[int, ...] | None = None  # those that stay, if a search of depth and width chose them already

    def of_layer(self, key: str, layer: int, axis: Axis) -> torch.Tensor:
        """A layer's own entries of a statistic of the channels of ``axis``; none where it lacks that part."""
        return self.statistics[key][layer, : self.source.extents(axis)[layer]]


class Method[O: Settings](ABC):
    """A structured method, with its settings ``O``. Stateless; the docstring of its file explains it.

    Most rank by statistics alone and are ``RankingMethod``s.
    """

    #: Dimensions that an explicit ``--target-…`` may cut (names of ``ModelShape`` fields).
    dimensions: tuple[str, ...]
    #: True if the method draws random numbers whatever its settings (``draws``), and so takes ``--seed``.
    random: bool = False
    #: True where its statistics are masks that were learned for one target (``learn-masks``), not a calibration's.
    learned: bool = False

    def free_dimensions(self, settings: O) -> tuple[str, ...]:
        """Dimensions that may be chosen to meet ``--ratio`` or ``--target-params``."""
        return self.dimensions

    def adds_biases(self, settings: O) -> bool:
        """True if the pruned model has biases on its linears, whether or not the parent has."""
        return False

    def search(self, settings: O) -> Search | None:
        """The competing shapes that meet ``--ratio`` or ``--target-params``; None: a rule gives the shape."""
        return None

    def task(self, settings: O) -> TaskFile | None:
        """The task on which candidates are scored; None: they are scored by the loss on the calibration text."""
        return None

    def heterogeneous(self, settings: O) -> bool:
        """True if layers may come out with different shapes: a selection then meets the request's budget within
        ``Budget.TOLERANCE``, and need not have the shape of its target."""
        return False

    def evolution(self, settings: O) -> int | None:
        """Generations of a search for every layer's sizes (``evolution.py``); None: there is no such search."""
        return None

    def draws(self, settings: O) -> bool:
        """True if it draws random numbers with these settings."""
        return self.random or self.evolution(settings) is not None

    def check(self, settings: O) -> None:  # noqa: B027 (most have nothing to refuse)
        """UsageError for settings that contradict each other, whatever the parent."""

    def check_budget(  # noqa: B027
        self, settings: O, source: ModelShape, target: ModelShape, budget: Budget
    ) -> None:
        """UsageError for settings that do not fit ``source``, with the biases that the method adds, or its budget."""

    def needs_scores(self, settings: O) -> bool:
        """True if the model must be run with every candidate before one can be chosen."""
        return self.search(settings) is not None or self.evolution(settings) is not None

    @abstractmethod
    def needs(self, settings: O) -> tuple[str, ...]:
        """Keys of the statistics that ``candidates`` reads; empty where it reads none."""

    @abstractmethod
    def candidates(self, request: PruningRequest[O]) -> list[Selection]:
        """The selections to choose among, each exactly ``request.target`` (or, where layers may differ, on the budget).
        Among equal losses the first wins."""


class RankingMethod[O: Settings](Method[O]):
    """A method that chooses by scores alone once the target is known."""

    def candidates(self, request: PruningRequest[O]) -> list[Selection]:
        return [self.select(request)]

    @abstractmethod
    def select(self, request: PruningRequest[O]) -> Selection:
        """Choose what is kept: exactly ``request.target``, or, where layers may differ, on the budget."""


@dataclass(frozen=True)
class Sparsity:
    """How much of a matrix is removed, and in which pattern."""

    ratio: float | Fraction  # the fraction removed, exact if it is a Fraction; N:M implies it
    pattern: Pattern

    @staticmethod
    def parse(ratio: float | None, pattern: str, flag: str = "--ratio") -> Sparsity:
        """The sparsity that ``--ratio`` (or ``flag``) and ``--pattern`` give; UsageError if they contradict each other.

        The ratio may be omitted if the pattern is N:M.
        """
        chosen = Pattern.parse(pattern)
        if ratio is None and chosen.ratio is None:
            raise UsageError(flag, got="nothing", expected="a number between 0 and 1, or an N:M --pattern in its place")
        if ratio is None:
            assert chosen.ratio is not None
            return Sparsity(chosen.ratio, chosen)
        if not 0 < ratio < 1:
            raise UsageError(flag, got=ratio, expected="the fraction to remove, a number between 0 and 1")
        if chosen.ratio is not None and abs(ratio - chosen.ratio) > 1e-9:
            raise UsageError(
                flag, got=ratio, expected=f"no such flag, or {chosen.ratio:g}", why=f"{chosen} removes {chosen.ratio:g}"
            )
        return Sparsity(chosen.ratio or ratio, chosen)

    def removed(self, count: int) -> int:
        """⌊count · ratio⌋, with a float read as a decimal: 0.29 of 100 is 29, not 28."""
        exact = self.ratio if isinstance(self.ratio, Fraction) else Fraction(str(float(self.ratio)))
        return int(exact * count)


class SparseMethod(ABC):
    """A sparse method: zeroes weights of one matrix at a time. Stateless, like ``Method``.

    Every sparse method is a ``WeightMethod`` or an ``InputMethod``.
    """

    #: What it reads about a matrix's inputs: nothing, ``accumulators.SquareSums.mean()`` or
    #: ``hessian.Hessian.factor()``. Matrices with the same input share one.
    statistic: Literal["none", "square_sums", "hessian"]
    #: True if the method draws random numbers.
    random: bool = False


class WeightMethod(SparseMethod):
    """A method that reads weights alone: it removes the lowest scores of a whole matrix, or of every M inputs.

    It needs nothing else of the model, and a matrix is never whole in memory: ``sparse/weights_only.py``.
    """

    statistic = "none"

    @abstractmethod
    def scores(self, weight: torch.Tensor, first: int, seed: tuple[int, ...]) -> torch.Tensor:
        """Scores of rows of one logical matrix (q, k, v, o, gate, up or down); repeated calls give the same scores.

        ``weight`` is [rows, in], the matrix's rows from ``first`` on, bf16, fp16 or fp32. ``seed`` identifies the
        matrix: (the run's seed, layer, matrix). Returns [rows, in], one of these types, never negative.
        """


class InputMethod(SparseMethod):
    """A method that reads statistics of a matrix's inputs."""

    @abstractmethod
    def prune(
        self, weight: torch.Tensor, statistic: Any, sparsity: Sparsity, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prune this rank's rows of one logical matrix (q, k, v, o, gate, up or down).

        ``weight`` is fp32 [rows, in] with the whole input dimension, and is changed in place. ``rows`` says which rows
        of the matrix these are; every rank that holds other rows makes this call too. ``in`` must be divisible by
        ``sparsity``'s M (``Pattern.check_inputs``).

        Returns (weight, kept): kept is bool [rows, in], True where a weight stays; removed weights are +0.
        """
