"""Sheared-LLaMA (2310.06694): what survives is learned by training, by a hard-concrete mask on all that may go.

The units of a mask are layers, query groups, query heads inside their group, FFN channels and hidden channels: those of
which the target has fewer. Each has a number log α, and in training a factor

    z = clip(1.2·σ((logit u + log α)/T) − 0.1, 0, 1),    T = 2/3,  u uniform on (0, 1)

of what it multiplies (``training/learned_masks.py`` says where). P(z > 0) = 1 − σ(T·ln(0.1/1.1) − log α) makes the
expected sparsity of a row of units ŝ = 1 − mean P, and Lagrange multipliers, which are ascended while all else
descends, push it to the target t of that kind of unit, which is ramped up from 0:

    loss = cross entropy + Σ_kinds mean_rows[λ₁(ŝ − t) + λ₂(ŝ − t)²]

At the end exactly as many units of every row stay as the target has, those of the highest log α, and each that stays
keeps the soft factor σ(0.8·log α/T), which ``apply`` folds into the weights. The loss is not asked again.

A row is what is cut to one size: the layers of the model; the groups of a layer; the heads of a group (the references
know multi-head attention alone, where a group is a head); the FFN channels of a layer; the model's hidden channels.
Kinds that the target does not cut have no mask. The plan reads log α from what ``learn-masks`` wrote.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import DIMENSIONS, WIDTH, Gates, NearTie, PruningRequest, RankingMethod, Selection
from megatron_prune.methods.options import NoOptions
from megatron_prune.methods.ranking import keep_highest

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1  # the concrete distribution is stretched to this, and clipped to [0, 1]
EDGE = 1e-6  # how near P and u may come to 0 and 1
BOUNDS = (math.log(1e-2), math.log(1e2))  # of log α
SHARPNESS = 0.8  # of the factor that a unit keeps
SETTLED = 0.01  # ŝ of a row may miss the target by this
NEAR = 2e-3  # of log α: what rounding at another layout changes in a short run is below half of it
_ZERO = math.log(-LOW / HIGH)  # the logit of what stretches to 0


@dataclass(frozen=True)
class Kind:
    """The masks of one kind of unit: rows of ``size`` units, of which ``kept`` are to stay."""

    name: str  # layer, group, head, ffn, hidden
    shape: tuple[int, ...]  # [rows …, size]
    kept: int

    @property
    def size(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return torch.Size(self.shape[:-1]).numel()

    @property
    def sparsity(self) -> float:
        """The fraction of a row that is to go."""
        return 1 - self.kept / self.size


def kinds(source: ModelShape, target: ModelShape) -> tuple[Kind, ...]:
    """What has masks where ``source`` is to become ``target``: the kinds of which less stays."""
    layers, groups, heads = source.num_layers, source.num_query_groups, source.heads_per_group
    found = (
        Kind("layer", (layers,), target.num_layers),
        Kind("group", (layers, groups), target.num_query_groups),
        Kind("head", (layers, groups, heads), target.heads_per_group),
        Kind("ffn", (layers, source.ffn_hidden_size), target.ffn_hidden_size),
        Kind("hidden", (source.hidden_size,), target.hidden_size),
    )
    return tuple(kind for kind in found if kind.kept < kind.size)


def refuse_unfit(source: ModelShape, target: ModelShape) -> None:
    """UsageError for a target whose masks a model of this kind cannot have."""
    if source.norm_bias and target.hidden_size < source.hidden_size:
        raise UsageError(
            "--target-hidden-size",
            got=target.hidden_size,
            expected=f"{source.hidden_size}, for a parent with LayerNorm",
            why="masked channels count in LayerNorm's mean; only RMSNorm can be narrowed",
        )


def start(kind: Kind) -> torch.Tensor:
    """log α before the first step, fp32. The paper draws N(5, 0.01) and clamps it before it is used: to the bound."""
    return torch.full(kind.shape, BOUNDS[1])


def sample(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """z for the uniform numbers ``u`` of (0, 1), in the shape of both."""
    u = u.clamp(EDGE, 1 - EDGE)
    y = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / TEMPERATURE)
    return (y * (HIGH - LOW) + LOW).clamp(0, 1)


def slope(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """dz/d(log α) of ``sample``: 0 where z is clipped."""
    u = u.clamp(EDGE, 1 - EDGE)
    y = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / TEMPERATURE)
    z = y * (HIGH - LOW) + LOW
    return torch.where((z > 0) & (z < 1), y * (1 - y) * (HIGH - LOW) / TEMPERATURE, 0)


def probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(z > 0)."""
    return 1 - torch.sigmoid(TEMPERATURE * _ZERO - log_alpha).clamp(EDGE, 1 - EDGE)


def ramped(sparsity: float, step: int, ramp: int) -> float:
    """The target at a step, counted from 0: it rises linearly over ``ramp`` steps."""
    return sparsity * min(1.0, step / ramp) if ramp > 0 else sparsity


def expected_size(log_alpha: torch.Tensor) -> torch.Tensor:
    """How many units of every row are expected to stay, int64 [rows …]."""
    return probability(log_alpha).sum(-1).round().long()


def factors(log_alpha: torch.Tensor, kept: int | torch.Tensor) -> torch.Tensor:
    """z without drawing, as a model is evaluated and cut: of every row the ``kept`` highest keep σ(0.8·log α/T), the
    others are 0. Between equals the lower index stays. ``kept``: one number, or one for each row, [rows …]."""
    order = log_alpha.sort(dim=-1, descending=True, stable=True).indices
    place = order.argsort(dim=-1)  # of every unit in its row's order
    stays = place < (kept if isinstance(kept, int) else kept[..., None])
    return torch.sigmoid(log_alpha * SHARPNESS / TEMPERATURE) * stays


def keep(log_alpha: torch.Tensor, kind: Kind, **place: int) -> tuple[tuple[int, ...], list[NearTie]]:
    """The units of one row that stay, ascending, and the near-tie at the cut, if any. ``place``: its layer, group."""
    return keep_highest(log_alpha, kind.kept, kind.name, within=NEAR, **place)


@dataclass(frozen=True)
class Unsettled:
    """A row of a mask that says something else than its cut: its expected size is off, or units are undecided."""

    kind: str
    row: tuple[int, ...]  # layer, and group of a head
    expected: float  # units that are expected to stay
    kept: int
    size: int
    undecided: int  # kept with P(z > 0) below a half, or removed with one above

    def __str__(self) -> str:
        place = "".join(f"{name} {number}, " for name, number in zip(("layer", "group"), self.row, strict=False))
        return (
            f"{place}{self.kind}: expects {self.expected:.1f} of {self.size}, the cut keeps {self.kept}; "
            f"{self.undecided} undecided"
        )


def unsettled(log_alpha: torch.Tensor, kind: Kind) -> list[Unsettled]:
    """The rows that miss their target by more than ``SETTLED`` of their size, or in which a unit is undecided."""
    found = []
    chance = probability(log_alpha.double()).reshape(-1, kind.size)  # [rows, size]
    stays = factors(log_alpha.double(), kind.kept).reshape(-1, kind.size) > 0
    rows = itertools.product(*map(range, kind.shape[:-1]))
    for row, p, kept in zip(rows, chance, stays, strict=True):
        expected = float(p.sum())
        undecided = int(((p >= 0.5) != kept).sum())
        if undecided or abs(expected - kind.kept) > SETTLED * kind.size:
            found.append(Unsettled(kind.name, row, expected, kind.kept, kind.size, undecided))
    return found


class ShearedLlama(RankingMethod[NoOptions]):
    """Its statistics are the learned log α of every kind that is cut, by the kind's name."""

    dimensions = DIMENSIONS
    learned = True

    def free_dimensions(self, settings: NoOptions) -> tuple[str, ...]:
        return WIDTH

    def needs(self, settings: NoOptions) -> tuple[str, ...]:
        return ("layer", "group", "head", "ffn", "hidden")

    def select(self, request: PruningRequest[NoOptions]) -> Selection:
        source, target = request.source, request.target
        cut = {kind.name: kind for kind in kinds(source, target)}
        learned = {name: request.statistics[name].double() for name in cut}
        whole = {"layer": source.num_layers, "group": source.num_query_groups, "head": source.heads_per_group}
        near: list[NearTie] = []

        def stays(name: str, row: tuple[int, ...] = (), **place: int) -> tuple[int, ...]:
            """The units of a row that stay; all of them where the kind is not cut."""
            if name not in cut:
                return tuple(range(whole[name]))
            kept, ties = keep(learned[name][row], cut[name], **place)
            near.extend(ties)
            return kept

        layers = stays("layer")
        heads = ffn = hidden = None
        if "group" in cut or "head" in cut:
            each = source.heads_per_group
            heads = tuple(
                tuple(
                    group * each + head
                    for group in stays("group", (layer,), layer=layer)
                    for head in stays("head", (layer, group), layer=layer, group=group)
                )
                for layer in layers
            )
        if "ffn" in cut:
            ffn = tuple(stays("ffn", (layer,), layer=layer) for layer in layers)
        if "hidden" in cut:
            hidden = stays("hidden")
        z = {name: factors(learned[name], kind.kept) for name, kind in cut.items()}
        return Selection(layers, hidden, heads, ffn, tuple(near), _gates(source, z, layers, hidden, heads, ffn))


def of_heads(source: ModelShape, z: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """z of every query head [L, H], of groups and heads together; None where neither has a mask."""
    groups, heads = z.get("group"), z.get("head")
    if groups is None and heads is None:
        return None
    whole = torch.ones(source.num_layers, source.num_query_groups, source.heads_per_group)
    if groups is not None:
        whole = whole.to(groups) * groups[..., None]
    if heads is not None:
        whole = whole.to(heads) * heads
    return whole.flatten(1)


def _gates(
    source: ModelShape,
    z: Mapping[str, torch.Tensor],
    layers: tuple[int, ...],
    hidden: tuple[int, ...] | None,
    heads: tuple[tuple[int, ...], ...] | None,
    ffn: tuple[tuple[int, ...], ...] | None,
) -> Gates:
    """The factors of what stays, in its order."""

    def numbers(values: torch.Tensor, kept: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(float(f"{value:.9g}") for value in values[list(kept)].tolist())  # what fp32 can tell apart

    per_head = of_heads(source, z)
    return Gates(
        layers=numbers(z["layer"], layers) if "layer" in z else None,
        hidden=numbers(z["hidden"], hidden) if hidden is not None else None,
        heads=tuple(numbers(per_head[layer], kept) for layer, kept in zip(layers, heads, strict=True))
        if heads is not None and per_head is not None
        else None,
        ffn=tuple(numbers(z["ffn"][layer], kept) for layer, kept in zip(layers, ffn, strict=True))
        if ffn is not None
        else None,
    )


METHOD = ShearedLlama()
