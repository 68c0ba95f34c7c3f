"""Methods that rank query groups and FFN channels: the same number in every layer, or sizes that differ.

With ``--allocation uniform`` every layer keeps what the target says, ranked per layer. With ``owl`` a layer keeps more
where outliers are dense among its weights (``outlier_sizes.py``). With ``global`` the lowest scores of all layers go
until the target's parameters are met (``layer_sizes.py``): with ``--ratio`` or ``--target-params`` groups and channels
in one ranking, with explicit sizes in two, of which each keeps as many on average as its size says. With ``search`` the
calibration loss decides every layer's sizes, from the better of equal sizes and the ranking on (``size_search.py``);
the scores then only rank the units of a layer. Layers differ with all but ``uniform``; ``--least-kept`` says how much
of each stays in any case. Of a parent whose layers differ already, ``uniform`` takes the same share of every layer, and
``global`` ranks what is there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence

import torch

from megatron_prune.checkpoint.layout import Axis, HeterogeneousShape, ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods import layer_sizes, outlier_sizes
from megatron_prune.methods.allocation import OUTLIERS, THRESHOLDS, OutlierWeighing
from megatron_prune.methods.base import Budget, NearTie, PruningRequest, RankingMethod, Selection
from megatron_prune.methods.evolution import Evolution
from megatron_prune.methods.options import UnitOptions
from megatron_prune.methods.ranking import keep_heads, keep_highest
from megatron_prune.methods.size_search import Layers, SizeSwaps

# The inputs of linear_proj and linear_fc2, as statistics call them.
SITES: dict[str, Axis] = {"attention": "heads", "mlp": "ffn"}


class UnitMethod[O: UnitOptions](RankingMethod[O]):
    """A method with scores of heads and FFN channels; the score of a query group is the sum of its heads'."""

    dimensions = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")

    def free_dimensions(self, settings: O) -> tuple[str, ...]:
        return "num_query_groups", "ffn_hidden_size"  # whole groups

    def heterogeneous(self, settings: O) -> bool:
        return settings.allocation != "uniform" or bool(self.exempt(settings))

    def needs(self, settings: O) -> tuple[str, ...]:
        return *self.reads(settings), *([OUTLIERS] if settings.allocation == "owl" else [])

    @abstractmethod
    def reads(self, settings: O) -> tuple[str, ...]:
        """Keys of the statistics that its scores read."""

    def evolution(self, settings: O) -> int | None:
        if settings.allocation != "search":
            return None
        return Evolution.of(settings.search_generations, 0).generations

    def exempt(self, settings: O) -> Collection[int]:
        """Layers that stay whole."""
        return ()

    @abstractmethod
    def scores(self, request: PruningRequest[O], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a layer's heads [H] and FFN channels [F], which compare within it."""

    @abstractmethod
    def comparable(self, request: PruningRequest[O], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a layer's query groups [G] and FFN channels [F], which compare over layers and with each other."""

    def check(self, settings: O) -> None:
        got = f"--allocation {settings.allocation}"
        for flag, given in (("--owl-threshold", settings.owl_threshold), ("--owl-bound", settings.owl_bound)):
            if given is not None and settings.allocation != "owl":
                raise UsageError(flag, got=got, expected="--allocation owl with it")
        if settings.owl_threshold is not None and settings.owl_threshold not in THRESHOLDS:
            raise UsageError(
                "--owl-threshold", got=settings.owl_threshold,
                expected=f"one of {', '.join(f'{one:g}' for one in THRESHOLDS)} with a structured method",
                why="calibrate counts outliers for these",
            )  # fmt: skip
        if settings.least_kept and settings.allocation == "uniform":
            raise UsageError("--least-kept", got=got, expected="--allocation owl, global or search with it")
        if settings.search_generations is not None and settings.allocation != "search":
            raise UsageError("--search-generations", got=got, expected="--allocation search with it")
        self.evolution(settings)  # refuses a number below 1

    def check_budget(self, settings: O, source: ModelShape, target: ModelShape, budget: Budget) -> None:
        exempt, allocation = self.exempt(settings), settings.allocation
        if budget.apart and allocation in ("search", "owl"):
            raise UsageError(
                "--allocation", got=f"{allocation} for explicit sizes", expected="--ratio or --target-params with it",
                why={"search": "it trades query groups for FFN channels", "owl": "it divides one ratio"}[allocation],
            )  # fmt: skip
        if beyond := [layer for layer in exempt if layer >= source.num_layers]:
            raise UsageError(
                "--exempt-layers", got=beyond[0], expected=f"layers below the parent's {source.num_layers}"
            )
        layer_sizes.refuse_least(source, target, budget, settings.least_kept, exempt=exempt)
        if allocation == "owl":
            outlier_sizes.check(source, budget, weighing(settings), exempt=exempt)

    def select(self, request: PruningRequest[O]) -> Selection:
        source, target, budget = request.source, request.target, request.budget
        if budget is None:
            return self.finished(keep_units(source, target, *self._all_scores(request)), request)
        (sizes,) = self.starts(request)
        return self.of_sizes(request, sizes)

    def of_sizes(self, request: PruningRequest[O], sizes: Layers) -> Selection:
        """What is kept if layers have these sizes: the highest scores of each."""
        return self.finished(layer_sizes.keep(request.source, sizes, *self._all_scores(request)), request)

    def finished(self, kept: Selection, request: PruningRequest[O]) -> Selection:
        """``kept`` with what else the method leaves."""
        return kept

    def starts(self, request: PruningRequest[O]) -> list[Layers]:
        """The sizes of all layers that the allocation says, or, of a search, from the better of which it starts."""
        source, target, budget = request.source, request.target, request.budget
        assert budget is not None
        if not isinstance(source, HeterogeneousShape) and target.heads_per_group != source.heads_per_group:
            raise UsageError(
                "--target-num-attention-heads", got=f"{target.heads_per_group} heads per query group",
                expected=f"the parent's {source.heads_per_group} where layers may differ", why="whole groups go",
            )  # fmt: skip
        allocation = request.settings.allocation
        makers = {
            "uniform": [self._alike], "owl": [self._weighed], "global": [self._ranked],
            "search": [self._alike, self._ranked],
        }  # fmt: skip
        return list(dict.fromkeys(make(request, budget) for make in makers[allocation]))

    def swaps(self, request: PruningRequest[O]) -> SizeSwaps:
        """The moves of a search."""
        assert request.budget is not None
        settings = request.settings
        exempt, least = self.exempt(settings), settings.least_kept
        return SizeSwaps(self._counted(request), request.budget, exempt=exempt, least=least)

    def _all_scores(self, request: PruningRequest[O]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Of every layer's heads, and of its FFN channels."""
        heads, channels = zip(*(self.scores(request, n) for n in range(request.source.num_layers)), strict=True)
        return heads, channels

    def _counted(self, request: PruningRequest[O]) -> ModelShape:
        """The parent with the biases that the method adds: their parameters count."""
        return request.source.with_biases() if self.adds_biases(request.settings) else request.source

    def _alike(self, request: PruningRequest[O], budget: Budget) -> Layers:
        """The same sizes in every layer that is not exempt, or the same share of each, as near as possible."""
        return layer_sizes.evenly(self._counted(request), budget, exempt=self.exempt(request.settings))

    def _weighed(self, request: PruningRequest[O], budget: Budget) -> Layers:
        """By the outliers of every layer."""
        settings = request.settings
        return outlier_sizes.by_outliers(
            self._counted(request), request.statistics[OUTLIERS], budget, weighing(settings),
            exempt=self.exempt(settings), least=settings.least_kept,
        )  # fmt: skip

    def _ranked(self, request: PruningRequest[O], budget: Budget) -> Layers:
        """By rankings over all layers."""
        settings, source = request.settings, self._counted(request)
        exempt, least = self.exempt(settings), settings.least_kept
        groups, units = zip(*(self.comparable(request, n) for n in range(source.num_layers)), strict=True)
        if budget.apart:
            return layer_sizes.by_two_rankings(
                source, request.target, groups, units, budget, exempt=exempt, least=least
            )
        return layer_sizes.by_global_ranking(source, groups, units, budget, exempt=exempt, least=least)


def weighing(settings: UnitOptions) -> OutlierWeighing:
    """How OWL divides the ratio with these settings."""
    return OutlierWeighing.of(settings.owl_threshold, settings.owl_bound)


def keep_units(
    source: ModelShape, target: ModelShape, heads: Sequence[torch.Tensor], channels: Sequence[torch.Tensor]
) -> Selection:
    """Heads and FFN channels of every layer, by its scores [H] and [F], as many in each as ``target`` has."""
    layers = range(source.num_layers)
    near: list[NearTie] = []
    kept_heads = kept_ffn = None
    if target.num_attention_heads < source.num_attention_heads:
        chosen = [keep_heads(heads[layer], source, target, layer) for layer in layers]
        kept_heads = tuple(kept for kept, _ in chosen)
        near += [tie for _, ties in chosen for tie in ties]
    if target.ffn_hidden_size < source.ffn_hidden_size:
        chosen = [keep_highest(channels[layer], target.ffn_hidden_size, "ffn", layer=layer) for layer in layers]
        kept_ffn = tuple(kept for kept, _ in chosen)
        near += [tie for _, ties in chosen for tie in ties]
    return Selection(tuple(layers), None, kept_heads, kept_ffn, tuple(near))


def by_head(inputs: torch.Tensor, source: ModelShape) -> torch.Tensor:
    """What is about the inputs of a layer's linear_proj [H·d], as [H, d]."""
    return inputs.view(-1, source.kv_channels)


def by_group(inputs: torch.Tensor, source: ModelShape, layer: int) -> torch.Tensor:
    """The same as [G, H/G·d]."""
    groups = source.by_layer()[layer].num_query_groups
    return inputs.view(groups, len(inputs) // max(1, groups))


def standardized(scores: torch.Tensor) -> torch.Tensor:
    """A layer's scores [n] minus their mean, over their standard deviation."""
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / torch.where(spread > 0, spread, 1.0)
