"""A request to ``sparsify``: a method, and how much of which linears to remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape, layer_name
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.data.windows import Windows
from megatron_prune.errors import UsageError
from megatron_prune.masks import Masks, find_masks, open_masks, require_masks, verify
from megatron_prune.methods.allocation import GlobalRanking, OutlierWeighing, whole_inputs
from megatron_prune.methods.base import SparseMethod, Sparsity
from megatron_prune.methods.evolution import Evolution
from megatron_prune.methods.level_search import LevelGrid
from megatron_prune.settings import numbers_of
from megatron_prune.sparse.matrices import MODULES, SUFFIXES, Matrix, matrices

Allocation = OutlierWeighing | GlobalRanking | Evolution


@dataclass(frozen=True)
class SparsifyRequest:
    """A sparse pruning, not yet checked against a model (``check``)."""

    name: str
    method: SparseMethod
    of: Mapping[str, Sparsity]  # by module that is pruned
    layers: tuple[int, ...] | None  # None: all
    seed: int | None
    allocation: Allocation | None = None  # None: every layer has the same ratio
    by_layer: Mapping[tuple[int, str], Sparsity] = field(default_factory=dict)  # with it, once it is known

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.of)

    @property
    def reads_text(self) -> bool:
        """True if calibration text is read: by the method, or to allocate ratios."""
        return self.method.statistic != "none" or isinstance(self.allocation, (OutlierWeighing, Evolution))

    def sparsity(self, layer: int, module: str) -> Sparsity:
        """What is removed from a linear. With an ``allocation`` it must be ``allocated`` first."""
        return self.of[module] if self.allocation is None else self.by_layer[layer, module]

    def modules_of(self, shape: ModelShape, layer: int) -> tuple[str, ...]:
        """The modules to prune in a layer: those that it has."""
        here = shape.by_layer()[layer]
        return tuple(module for module in self.of if here.has(SUFFIXES[module]))

    def weights_of(self, shape: ModelShape, layer: int) -> int:
        """How many weights the modules to prune have in a layer."""
        sizes = shape.of_layer(layer)
        modules = self.modules_of(shape, layer)
        return sum(matrix.rows * matrix.inputs for module in modules for matrix in matrices(module, sizes))

    @property
    def ratio(self) -> float:
        """What is removed of all layers together, if no module has a ratio of its own."""
        return float(next(iter(self.of.values())).ratio)

    def most(self, shape: ModelShape, ranking: GlobalRanking) -> list[Fraction]:
        """The largest ratio that ``ranking`` gives each layer that is pruned."""
        return [
            ranking.most(matrices(module, shape.of_layer(layer))[0].inputs for module in self.modules_of(shape, layer))
            for layer in self.chosen(shape)
        ]

    def grid(self, shape: ModelShape) -> LevelGrid:
        """The levels of a search, in a model whose layers have one shape."""
        inputs = [matrices(module, shape)[0].inputs for module in self.modules]
        return LevelGrid.of(inputs, [float(sparsity.ratio) for sparsity in self.of.values()])

    def allocated(self, shape: ModelShape, shifts: Sequence[Fraction]) -> SparsifyRequest:
        """This request where the ratios of the layers that are pruned differ by ``shifts`` from what was asked for."""
        found: dict[tuple[int, str], Sparsity] = {}
        for module, asked in self.of.items():
            having, sizes = [], []
            for layer, shift in zip(self.chosen(shape), shifts, strict=True):
                if module in self.modules_of(shape, layer):
                    of_module = matrices(module, shape.of_layer(layer))
                    having.append((layer, shift))
                    sizes.append((sum(matrix.rows for matrix in of_module), of_module[0].inputs))
            counts = whole_inputs(sizes, float(asked.ratio), [shift for _, shift in having])
            for (layer, _), (_, inputs), count in zip(having, sizes, counts, strict=True):
                found[layer, module] = Sparsity(Fraction(count, inputs), asked.pattern)
        return replace(self, by_layer=found)

    def chosen(self, shape: ModelShape) -> tuple[int, ...]:
        """The layers to prune, ascending: those that were asked for, or all, without any that has nothing to prune."""
        asked = range(shape.num_layers) if self.layers is None else self.layers
        return tuple(layer for layer in asked if self.modules_of(shape, layer))

    def check(self, shape: ModelShape) -> None:
        """UsageError if a model of ``shape`` lacks one of the layers, or M does not divide a matrix's inputs."""
        beyond = [layer for layer in self.layers or () if layer >= shape.num_layers]
        if beyond:
            raise UsageError("--layers", got=beyond[-1], expected=f"layers from 0 to {shape.num_layers - 1}")
        chosen = self.chosen(shape)
        for layer in range(shape.num_layers) if self.layers is None else self.layers:
            if layer not in chosen and (self.layers is not None or not chosen):
                modules = ",".join(self.of)
                raise UsageError("--layers", got=layer, expected=f"layers that have one of --modules {modules}")
        for layer in chosen:
            for module in self.modules_of(shape, layer):
                for matrix in matrices(module, shape.of_layer(layer)):
                    inputs = f"{matrix.name} ({layer_name(layer, SUFFIXES[module])})"
                    self.of[module].pattern.check_inputs(inputs, matrix.inputs)
        if isinstance(self.allocation, GlobalRanking):
            sizes = [self.weights_of(shape, layer) for layer in chosen]
            self.allocation.check_layers(self.ratio, self.most(shape, self.allocation), sizes)
        if isinstance(self.allocation, Evolution):
            if isinstance(shape, HeterogeneousShape):
                raise UsageError(
                    "--allocation", got="search for a model whose layers differ", expected="global, owl or uniform",
                    why="the search moves equal shares between layers, which are equal weights in equal layers alone",
                )  # fmt: skip
            self.grid(shape)
            if len(self.chosen(shape)) < 2:
                raise UsageError("--allocation", got="search", expected="uniform for a single layer")

    def describe(self) -> dict[str, Any]:
        """As JSON: everything that decides the result, given the parent and the calibration."""
        return {
            "method": self.name,
            "pattern": str(next(iter(self.of.values())).pattern),
            "ratios": {module: float(sparsity.ratio) for module, sparsity in self.of.items()},
            "allocation": {"name": "uniform"} if self.allocation is None else self.allocation.describe(),
            "layers": None if self.layers is None else list(self.layers),
            "seed": self.seed,
        }


def choose(name: str, asked: verbs.SparsitySettings, seed: int | None = None) -> SparsifyRequest:
    """The request that the settings describe. UsageError if they contradict each other.

    ``seed`` is dropped if the method draws no random numbers.
    """
    method = methods.get_sparse(name)
    modules = _modules(asked.modules)
    own = _module_ratios(asked.module_ratio, modules)
    of = {
        module: Sparsity.parse(
            own.get(module, asked.ratio), asked.pattern, "--module-ratio" if module in own else "--ratio"
        )
        for module in modules
    }
    if own and asked.ratio is not None:
        Sparsity.parse(asked.ratio, asked.pattern)  # refuse a wrong --ratio even if every module has its own
    layers = None if asked.layers is None else numbers_of(asked.layers, "--layers")
    allocation = _allocation(name, asked, of, own, seed or 0)
    return SparsifyRequest(name, method, of, layers, seed if method.random else None, allocation)


def _allocation(
    name: str, asked: verbs.SparsitySettings, of: Mapping[str, Sparsity], own: Mapping[str, float], seed: int
) -> Allocation | None:
    """How ratios are allocated. UsageError for a pattern that fixes them, or settings that do not fit."""
    for setting, needed in (
        ("owl_threshold", "owl"), ("owl_bound", "owl"), ("least_kept", "global"), ("search_generations", "search")
    ):  # fmt: skip
        if asked.was_given(setting) and asked.allocation != needed:
            flag = "--" + setting.replace("_", "-")
            raise UsageError(flag, got=f"--allocation {asked.allocation}", expected=f"--allocation {needed} with it")
    if asked.allocation == "uniform":
        return None
    for sparsity in of.values():
        if sparsity.pattern.m is not None:
            raise UsageError(
                "--allocation",
                got=asked.allocation,
                expected="uniform with an N:M --pattern",
                why=f"{sparsity.pattern} gives every layer the same ratio",
            )
    if name == "random" and asked.allocation != "owl":
        raise UsageError("--allocation", got=asked.allocation, expected="owl or uniform with --method random")
    if asked.allocation == "search":
        return Evolution.of(asked.search_generations, seed)
    if asked.allocation == "global":
        if own:
            raise UsageError(
                "--module-ratio", got="--allocation global", expected="another --allocation with it",
                why="one ranking of all weights has one ratio",
            )  # fmt: skip
        ranking = GlobalRanking(asked.least_kept)
        ranking.check(float(next(iter(of.values())).ratio), "--ratio")
        return ranking
    owl = OutlierWeighing.of(asked.owl_threshold, asked.owl_bound)
    for module, sparsity in of.items():
        owl.check(float(sparsity.ratio), f"--module-ratio {module}=" if module in own else "--ratio")
    return owl


def _modules(text: str | None) -> tuple[str, ...]:
    if text is None:
        return MODULES
    named = text.split(",")
    for name in named:
        if name not in MODULES or named.count(name) > 1:
            raise UsageError("--modules", got=text, expected=f"some of {','.join(MODULES)}, each once")
    return tuple(module for module in MODULES if module in named)


def _module_ratios(pairs: Sequence[str], modules: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in pairs:
        module, _, ratio = pair.partition("=")
        try:
            value = float(ratio)
        except ValueError:
            value = float("nan")
        if module not in modules or module in found or value != value:
            raise UsageError("--module-ratio", got=pair, expected=f"MODULE=RATIO, each of {','.join(modules)} once")
        found[module] = value
    return found


# The work that a request describes, and the record of what it did to each matrix.


@dataclass(frozen=True)
class SparsifyTask:
    """Prune ``parent`` as ``request`` says, using its inputs on ``windows`` (None: the method reads no inputs)."""

    parent: Checkpoint
    request: SparsifyRequest
    windows: Windows | None
    question: Mapping[str, Any]  # everything that decides the result, as JSON
    save: Path

    @property
    def layers(self) -> tuple[int, ...]:
        return self.request.chosen(self.parent.shape)

    @property
    def patterns(self) -> dict[str, str]:
        """The patterns of the weights that are pruned, by logical name."""
        return {
            layer_name(layer, SUFFIXES[module]): str(self.request.of[module].pattern)
            for layer in self.layers
            for module in self.request.modules_of(self.parent.shape, layer)
        }

    def held_masks(self) -> Masks | None:
        """The parent's own masks: those of weights that are not pruned now are kept."""
        folder = find_masks(self.parent.root)
        return None if folder is None else open_masks(folder)

    def check_parent_masks(self, names: Sequence[str], *, allow_missing: bool = False) -> None:
        """MasksError if masks of the parent are missing (unless ``allow_missing``), damaged, or do not fit its weights
        ``names``: the result's hash would cover those that are kept as they are, and hide the damage."""
        folder = require_masks(self.parent, allow_missing=allow_missing)
        if folder is not None:
            verify(open_masks(folder), self.parent, names)


@dataclass(frozen=True)
class Sums:
    """What pruning did to one matrix, over all its rows."""

    matrix: Matrix
    removed: int
    error: float | None  # tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ); None where W·H·Wᵀ is zero

    def row(self) -> dict[str, Any]:
        """Its row in ``pruning/sparsity.json``, without the layer."""
        matrix = self.matrix
        return {
            "matrix": matrix.name,
            "rows": matrix.rows,
            "inputs": matrix.inputs,
            "removed": self.removed,
            "error": self.error,
        }
