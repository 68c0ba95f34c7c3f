"""The latency of a shape, predicted from a table that ``latency_measurement.py`` measured once, for one parent.

A search asks about more shapes than can be timed, so what is timed are their parts, at a few sizes:

    seconds(shape) = ends(hidden) + sum over layers of attention(hidden, groups, heads per group) + mlp(hidden, FFN)

Each part includes its norm; ``ends`` is what is outside the layers: embedding, final norm and output layer, for the
parent's vocabulary. Layers may differ, and there may be any number of them. Between the sizes of the table, seconds are
linear in each size, which is exact for time that is proportional to weights or FLOPs. Beyond them is an error.

Hardware-aware architecture searches predict latency in this way (ProxylessNAS, arXiv 1812.00332; Puzzle, 2411.19146).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from megatron_prune import artifacts
from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import CheckpointError, MegatronPruneError, UsageError
from megatron_prune.evaluation.efficiency import Workload
from megatron_prune.untrusted import check, show

VERSION = 1
FLAG = "--latency-table"
PHASES = ("prefill", "decode")
_SEARCHED = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")


@dataclass(frozen=True)
class SizeGrid:
    """The sizes at which parts were timed, ascending; the last of each are the parent's."""

    hidden: tuple[int, ...]
    groups: tuple[int, ...]
    heads_per_group: tuple[int, ...]
    ffn: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            sizes = getattr(self, field.name)
            if not sizes or any(b <= a for a, b in zip((0, *sizes), sizes, strict=False)):
                raise MegatronPruneError(f"grid.{field.name}: expected ascending sizes above 0, got {list(sizes)}")

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The sizes by their names in words."""
        return {field.name.replace("_", " "): getattr(self, field.name) for field in fields(self)}

    @property
    def axes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The sizes that each part depends on."""
        attention = (self.hidden, self.groups, self.heads_per_group)
        return {"ends": (self.hidden,), "attention": attention, "mlp": (self.hidden, self.ffn)}


@dataclass(frozen=True)
class PartSeconds:
    """Seconds of the parts at every size of a grid, nested in the order of ``SizeGrid.axes``."""

    ends: Any  # [hidden]
    attention: Any  # [hidden, groups, heads per group], of one layer
    mlp: Any  # [hidden, FFN], of one layer


@dataclass(frozen=True)
class PredictedLatency:
    """Seconds of reading the prompts, and of one step after them, with the workload that they are for."""

    table: str  # hash of the table
    device: str
    batch: int
    prompt: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class LatencyTable:
    """Median, least and most over the repeats, by phase.

    ``apart``: attention and MLP were told apart. If they were not, ``mlp`` is a layer with the parent's attention, and
    ``attention`` what other sizes of it add (less than nothing).
    """

    architecture: ModelShape  # the parent's
    arguments: Mapping[str, Any]  # those of Megatron that tell families apart
    dtype: str
    workload: Workload
    depth: int  # layers of the models that were timed
    apart: bool
    grid: SizeGrid
    seconds: Mapping[str, PartSeconds]
    least: Mapping[str, PartSeconds]
    most: Mapping[str, PartSeconds]
    device: Mapping[str, str]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("seconds", "least", "most"):
            by_phase = getattr(self, name)
            for phase in PHASES:
                for part, axes in self.grid.axes.items():
                    self._check(f"{name}.{phase}.{part}", getattr(by_phase[phase], part), tuple(map(len, axes)))
        for phase in PHASES:
            for part in ("ends", "mlp", *(("attention",) if self.apart else ())):
                if not (found := np.array(getattr(self.seconds[phase], part)).min()) > 0:
                    raise MegatronPruneError(
                        f"{phase}, {part}: expected times above 0, got {found:.3g} s: the machine was too busy; "
                        "measure while nothing else runs, or with more --repeats or a larger --depth"
                    )

    @staticmethod
    def _check(name: str, found: Any, shape: tuple[int, ...]) -> None:
        try:
            values = np.array(found, dtype=float)
        except ValueError:  # lists of different lengths
            values = np.zeros(0)
        if values.shape != shape or not np.isfinite(values).all():
            raise MegatronPruneError(f"{name}: expected finite numbers for every size of the grid, got others")

    # -- prediction ------------------------------------------------------------------------------

    def predict(self, shape: ModelShape) -> PredictedLatency:
        """UsageError for a shape of another architecture, or beyond the grid."""
        _refuse_differing(_fixed(self.architecture), _fixed(shape))
        seconds = self._part("ends", shape.hidden_size)
        for layer, number in Counter(shape.by_layer()).items():
            seconds = seconds + number * self._layer(shape.hidden_size, layer)
        prefill, decode = map(float, seconds)
        work = self.workload
        return PredictedLatency(self.hash, self.device.get("name", ""), work.batch, work.prompt, prefill, decode)

    def refuse_other_model(self, arguments: Mapping[str, Any], dtype: str) -> None:
        """UsageError unless the table is of models with these arguments (``told_apart``) and this type of weights."""
        _refuse_differing({**self.arguments, "dtype": self.dtype}, {**arguments, "dtype": dtype})

    def _layer(self, hidden: int, layer: LayerShape) -> np.ndarray[Any, Any]:
        """Seconds of one layer, [phase]."""
        if not self.apart and not (layer.num_attention_heads and layer.ffn_hidden_size):
            raise UsageError(
                FLAG, got="a table that cannot tell attention and MLP apart",
                expected="one that can, for a shape whose layers lack one of them",
                why="the parent cannot be exported with such layers",
            )  # fmt: skip
        found = np.zeros(len(PHASES))
        if layer.num_attention_heads:
            found += self._part("attention", hidden, layer.num_query_groups, layer.heads_per_group)
        if layer.ffn_hidden_size:
            found += self._part("mlp", hidden, layer.ffn_hidden_size)
        return found

    def _part(self, part: str, *sizes: int) -> np.ndarray[Any, Any]:
        """Seconds of a part at these sizes, [phase]; UsageError if one is beyond the grid."""
        if (part, sizes) not in self._known:
            for name, size, measured in zip(_NAMES[part], sizes, self.grid.axes[part], strict=True):
                if not measured[0] <= size <= measured[-1]:
                    raise UsageError(
                        FLAG, got=f"{name} {size}",
                        expected=f"a shape with {name} {measured[0]} to {measured[-1]}, as the table has them",
                        do="measure a table with a smaller --smallest, or with more --axes",
                    )  # fmt: skip
            self._known[part, sizes] = self._interpolators[part]([sizes])[0]
        return self._known[part, sizes]

    @cached_property
    def _known(self) -> dict[tuple[str, tuple[int, ...]], np.ndarray[Any, Any]]:
        """Seconds that were asked for before: a search asks for the same parts of many shapes."""
        return {}

    @cached_property
    def _interpolators(self) -> dict[str, Any]:
        from scipy.interpolate import RegularGridInterpolator

        return {
            part: RegularGridInterpolator(
                axes, np.stack([np.array(getattr(self.seconds[phase], part), float) for phase in PHASES], axis=-1)
            )
            for part, axes in self.grid.axes.items()
        }

    # -- the file --------------------------------------------------------------------------------

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the table's content."""
        return artifacts.sha256_json(self._json)

    @cached_property
    def _json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, path: str | Path) -> None:
        """Write the table atomically, as JSON."""
        content = {"version": VERSION, **self._json, "hash": self.hash}
        artifacts.write_results(path, artifacts.json_bytes(content))


_NAMES = {
    "ends": ("hidden size",),
    "attention": ("hidden size", "query groups", "heads per query group"),
    "mlp": ("hidden size", "FFN"),
}


def _fixed(shape: ModelShape) -> dict[str, Any]:
    """What a search never changes."""
    return {field.name: getattr(shape, field.name) for field in fields(ModelShape) if field.name not in _SEARCHED}


def _refuse_differing(own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for name in dict.fromkeys((*own, *other)):
        if own.get(name) != other.get(name):
            raise UsageError(
                FLAG, got=f"one with {name}={show(own.get(name))}",
                expected=f"a table of a model with {name}={show(other.get(name))}", do="measure one with latency-table",
            )  # fmt: skip


class _Parts(TypedDict):
    ends: list[float]
    attention: list[list[list[float]]]
    mlp: list[list[float]]


class _Phases(TypedDict):
    prefill: _Parts
    decode: _Parts


class _GridFile(TypedDict):
    hidden: list[int]
    groups: list[int]
    heads_per_group: list[int]
    ffn: list[int]


class _WorkloadFile(TypedDict):
    batch: int
    prompt: int
    new: int
    repeats: int
    warmup: int


class _TableFile(TypedDict):
    architecture: dict[str, Any]
    arguments: dict[str, Any]
    dtype: str
    workload: _WorkloadFile
    depth: int
    apart: bool
    grid: _GridFile
    seconds: _Phases
    least: _Phases
    most: _Phases
    device: dict[str, str]
    versions: dict[str, str]
    hash: str


def read(path: str | Path) -> LatencyTable:
    """Read and check a table. UsageError for another file, MegatronPruneError for a damaged one."""
    content = artifacts.read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION or "grid" not in content:
        raise UsageError(FLAG, got=path, expected=f"a file of version {VERSION} that latency-table wrote")
    check(_TableFile, content, str(path), MegatronPruneError)
    try:
        table = LatencyTable(
            **{
                **{field.name: content[field.name] for field in fields(LatencyTable)},
                "architecture": ModelShape.read(content["architecture"]),
                "workload": Workload(**content["workload"]),
                "grid": SizeGrid(**{name: tuple(sizes) for name, sizes in content["grid"].items()}),
                **{
                    name: {phase: PartSeconds(**parts) for phase, parts in content[name].items()}
                    for name in ("seconds", "least", "most")
                },
            }
        )
    except (TypeError, CheckpointError) as error:
        raise MegatronPruneError(f"{path} is damaged: {error}; measure it again") from error
    except MegatronPruneError as error:
        raise MegatronPruneError(f"{path} is damaged: {error}") from error
    if table.hash != content["hash"]:
        raise MegatronPruneError(
            f"{path}: expected the content that its hash says, got another, changed after it was measured: measure it "
            "again"
        )
    return table
