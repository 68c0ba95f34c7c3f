"""Measuring a latency table: small models of the parent's architecture, timed as ``benchmark`` times checkpoints.

Every model has ``depth`` layers, all of one shape, but for one with a single layer per hidden size, and, where the
family can say it, one whose layers but the first have no MLP. With T the seconds of a model, and the parent's sizes of
attention and FFN where no other is named:

    layer               (T(depth layers) - T(1 layer)) / (depth - 1)
    ends                T(1 layer) - layer
    attention           (T(first layer whole, others without MLP) - T(1 layer)) / (depth - 1)
    mlp(FFN)            (T(depth layers with FFN) - ends) / depth - attention
    attention(heads)    (T(depth layers with heads) - ends) / depth - mlp

Weights are random. In each repeat all models are built and timed in turn, so that a machine that slows down for a
while slows all of them. The table keeps the median over the repeats, the least and the most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_prune import artifacts, screen, verbs
from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.model_arguments import BY_LAYER
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.config import config_at
from megatron_prune.convert.families.model_family import told_apart
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.evaluation import efficiency
from megatron_prune.evaluation.efficiency import Workload
from megatron_prune.evaluation.latency import PHASES, LatencyTable, PartSeconds, SizeGrid


@dataclass(frozen=True)
class TableMeasurement:
    """The models that a table needs, to be timed once per repeat."""

    source: ModelShape  # the parent's
    arguments: Mapping[str, Any]  # ``told_apart``
    grid: SizeGrid
    depth: int
    apart: bool
    work: Workload
    configs: Mapping[ModelShape, Mapping[str, Any]]  # config.json of every model

    def once(self) -> dict[ModelShape, tuple[float, float]]:
        """Seconds of prefill and of a step of every model: one repeat."""
        found = {}
        for shape, config in self.configs.items():
            model = efficiency.random_model(config)
            for _ in range(self.work.warmup + 1):
                found[shape] = efficiency.time_once(model, self.work)
            del model
        return found

    def table(self, repeats: Sequence[Mapping[ModelShape, tuple[float, float]]]) -> LatencyTable:
        """MegatronPruneError if a part took less than no time."""
        parts = {phase: [self._parts(one, i) for one in repeats] for i, phase in enumerate(PHASES)}
        return LatencyTable(
            architecture=self.source,
            arguments=self.arguments,
            dtype=next(iter(self.configs.values()))["dtype"],
            workload=self.work,
            depth=self.depth,
            apart=self.apart,
            grid=self.grid,
            seconds={phase: _over(found, np.median) for phase, found in parts.items()},
            least={phase: _over(found, np.min) for phase, found in parts.items()},
            most={phase: _over(found, np.max) for phase, found in parts.items()},
            device=artifacts.device(),
            versions=artifacts.versions(),
        )

    def _parts(self, repeat: Mapping[ModelShape, tuple[float, float]], phase: int) -> PartSeconds:
        seconds = {shape: taken[phase] for shape, taken in repeat.items()}
        return parts_of(seconds, self.source, self.grid, self.depth, self.apart)


def measure_table(asked: verbs.LatencyTableSettings) -> LatencyTable:
    """The table that ``asked`` describes, written to ``asked.output``; UsageError as for ``prepare``."""
    artifacts.refuse_unwritable("--output", asked.output)
    measurement = prepare(asked)
    number = measurement.work.repeats
    table = measurement.table(
        [measurement.once() for _ in screen.progress(range(number), number, "measuring", "repeat")]
    )
    table.write(asked.output)
    return table


def prepare(asked: verbs.LatencyTableSettings) -> TableMeasurement:
    """What ``asked`` asks to measure; UsageError for settings that cannot be, and for sizes at which no family of
    Hugging Face has such models."""
    work = efficiency.workload(asked)
    for name, value, least in (("--points", asked.points, 2), ("--depth", asked.depth, 2)):
        if value < least:
            raise UsageError(name, got=value, expected=f"at least {least}")
    if not 0 < asked.smallest < 1:
        raise UsageError("--smallest", got=asked.smallest, expected="a number between 0 and 1")
    if asked.divisible_by < 1:
        raise UsageError("--divisible-by", got=asked.divisible_by, expected="an integer of at least 1")
    parent = open_checkpoint(asked.checkpoint)
    if patterns := [name for name in BY_LAYER if parent.args.get(name)]:
        raise UsageError(
            "CKPT", got=f"{parent.root}, which has {patterns[0]}",
            expected="a parent whose layers all have the same attention",
        )  # fmt: skip
    source = parent.shape.of_layer(None)
    grid = grid_of(source, asked.axes, asked.points, asked.smallest, asked.divisible_by)
    apart = True
    try:
        config_at(parent, _without_mlp(source, source.hidden_size, asked.depth))
    except CheckpointError:
        apart = False
    configs = {}
    for shape in shapes_to_time(source, grid, asked.depth, apart):
        try:
            configs[shape] = config_at(parent, shape)
        except CheckpointError as error:
            raise UsageError(
                "--axes", got=" ".join(asked.axes), expected="sizes at which the parent can be exported", why=str(error)
            ) from error
    return TableMeasurement(source, told_apart(parent.args), grid, asked.depth, apart, work, configs)


# -- which models -----------------------------------------------------------------------------------


def grid_of(source: ModelShape, axes: Sequence[str], points: int, smallest: float, divisible_by: int) -> SizeGrid:
    """``points`` sizes along each of ``axes``, evenly spaced, and the parent's alone along the others.

    Hidden and FFN sizes reach down to ``smallest`` of the parent's, in multiples of ``divisible_by``; groups and heads
    per group to 1. As in a search, multi-head attention stays multi-head.
    """
    heads = {"groups", "heads"} if source.heads_per_group == 1 else {"groups"}

    def along(which: set[str], whole: int, lowest: float, step: int) -> tuple[int, ...]:
        if not which & set(axes):
            return (whole,)
        below = {max(step, int(size // step * step)) for size in np.linspace(lowest, whole, points)[:-1]}
        return tuple(sorted({size for size in below if size < whole} | {whole}))

    return SizeGrid(
        hidden=along({"hidden"}, source.hidden_size, smallest * source.hidden_size, divisible_by),
        groups=along(heads, source.num_query_groups, 1, 1),
        heads_per_group=along({"heads"}, source.heads_per_group, 1, 1),
        ffn=along({"ffn"}, source.ffn_hidden_size, smallest * source.ffn_hidden_size, divisible_by),
    )


def shapes_to_time(source: ModelShape, grid: SizeGrid, depth: int, apart: bool) -> list[ModelShape]:
    """The models that ``parts_of`` needs the seconds of, each once."""
    found = []
    for hidden in grid.hidden:
        found += [_stack(source, hidden, 1), _stack(source, hidden, depth)]
        found += [_without_mlp(source, hidden, depth)] if apart else []
        found += [_stack(source, hidden, depth, ffn=ffn) for ffn in grid.ffn]
        found += [
            _stack(source, hidden, depth, groups=groups, per_group=per_group)
            for groups in grid.groups
            for per_group in grid.heads_per_group
        ]
    return list(dict.fromkeys(found))


def parts_of(
    seconds: Mapping[ModelShape, float], source: ModelShape, grid: SizeGrid, depth: int, apart: bool
) -> PartSeconds:
    """Seconds of the parts from those of the models (module's docstring)."""
    ends, attentions, mlps = [], [], []
    for hidden in grid.hidden:
        single = seconds[_stack(source, hidden, 1)]
        layer = (seconds[_stack(source, hidden, depth)] - single) / (depth - 1)
        end = single - layer
        attention = (seconds[_without_mlp(source, hidden, depth)] - single) / (depth - 1) if apart else 0.0
        ends.append(end)
        mlps.append([(seconds[_stack(source, hidden, depth, ffn=ffn)] - end) / depth - attention for ffn in grid.ffn])
        attentions.append(
            [
                [
                    (seconds[_stack(source, hidden, depth, groups=groups, per_group=per_group)] - end) / depth
                    - (layer - attention)
                    for per_group in grid.heads_per_group
                ]
                for groups in grid.groups
            ]
        )  # fmt: skip
    return PartSeconds(ends, attentions, mlps)


def _stack(
    source: ModelShape, hidden: int, layers: int, *, ffn: int = 0, groups: int = 0, per_group: int = 0
) -> ModelShape:
    """So many layers of one shape; the sizes that are not given are the parent's."""
    groups, per_group = groups or source.num_query_groups, per_group or source.heads_per_group
    return replace(
        source, num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn or source.ffn_hidden_size,
        num_query_groups=groups, num_attention_heads=groups * per_group,
    )  # fmt: skip


def _without_mlp(source: ModelShape, hidden: int, depth: int) -> ModelShape:
    """The parent's layers, of which only the first has an MLP."""
    whole = LayerShape(source.num_attention_heads, source.num_query_groups, source.ffn_hidden_size)
    return replace(source, hidden_size=hidden).with_layers([whole, *[replace(whole, ffn_hidden_size=0)] * (depth - 1)])


def _over(repeats: Sequence[PartSeconds], how: Any) -> PartSeconds:
    """``how`` over the repeats, at every size."""
    by_part = {part: [asdict(one)[part] for one in repeats] for part in ("ends", "attention", "mlp")}
    return PartSeconds(**{part: how(np.array(found), axis=0).tolist() for part, found in by_part.items()})
