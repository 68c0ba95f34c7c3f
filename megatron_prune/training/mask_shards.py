"""What one rank holds of the masks that are learned: the shards of its own weights, and their random numbers.

Masks of FFN channels, query heads and query groups are sharded like the weights they are on: a rank has the units of
its own layers, and of those its own consecutive part under tensor parallelism. Masks of layers and hidden channels are
whole on every rank. With fewer query groups than tensor-parallel ranks, ranks share a group, and each has the masks of
all groups of its layers.

A shard is a matrix [own layers, own units], whatever the kind: heads of all groups are in one row. Its numbers have the
same place in a list of all units of the model at every layout, and u of a unit is a function of that place alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from megatron_prune.methods.sheared_llama import Kind

_PER_COUNT = 8  # fp32 numbers that Philox makes per counter
REPLICATED = ("layer", "hidden")


@dataclass(frozen=True)
class MaskShards:
    """The shards of one rank: of ``kinds`` in this order, on ``layers`` of the source, tensor-parallel ``rank`` of
    ``ranks``."""

    kinds: Sequence[Kind]
    layers: Sequence[int]
    rank: int = 0
    ranks: int = 1

    def is_split(self, kind: Kind) -> bool:
        """True if tensor-parallel ranks have different units."""
        return kind.name in ("head", "ffn") or kind.name == "group" and kind.size % self.ranks == 0

    def part(self, kind: Kind) -> slice:
        """The rank's units, of those of one layer or of the model."""
        units = _units(kind)
        if not self.is_split(kind):
            return slice(0, units)
        count = units // self.ranks
        return slice(self.rank * count, (self.rank + 1) * count)

    def cut(self, kind: Kind, whole: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the values of all units, in the kind's shape."""
        if kind.name in REPLICATED:
            return whole
        return self.own(kind, whole[list(self.layers)])

    def own(self, kind: Kind, rows: torch.Tensor) -> torch.Tensor:
        """The same where ``rows`` has this rank's layers only. [own layers, own units]"""
        return rows.flatten(1)[:, self.part(kind)].contiguous()

    def rows(self, kind: Kind, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of ``own``: the shards of all tensor-parallel ranks, in their order, side by side."""
        if kind.name in REPLICATED:
            return parts[0]
        joined = torch.cat(list(parts), dim=1) if self.is_split(kind) else parts[0]
        return joined.view(len(self.layers), *kind.shape[1:])

    def row_sums(self, kind: Kind, values: torch.Tensor) -> torch.Tensor:
        """Of every row of this rank's layers, the sum over the units that are here. [own layers, rows of a layer]

        A row is what is cut to one size: a layer's FFN channels or groups, or the heads of one group."""
        if kind.name in REPLICATED:
            return values.sum().view(1, 1)
        numbers = torch.arange(_units(kind), device=values.device)[self.part(kind)] // kind.size
        sums = values.new_zeros(len(values), _units(kind) // kind.size)
        return sums.index_add(1, numbers, values)

    # -- random numbers -------------------------------------------------------------------------------------------

    def uniform(self, seed: int, step: int, micro_batch: int) -> dict[str, torch.Tensor]:
        """u of every unit that is here, by kind: fp32 on the CPU, in the shape of the shard.

        ``micro_batch`` is counted from 0 over all replicas: the numbers do not depend on how a batch is divided.
        """
        key = int.from_bytes(hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()[:16], "little")
        ranges = [span for kind, first in self._firsts() for span in self._spans(kind, first)]
        drawn = torch.from_numpy(numpy.concatenate([_random(key, *run) for run in _joined(ranges)]))
        sizes = [self.count(kind) for kind in self.kinds]
        return {
            kind.name: values if kind.name in REPLICATED else values.view(len(self.layers), -1)
            for kind, values in zip(self.kinds, torch.split(drawn, sizes), strict=True)
        }

    def _firsts(self) -> Iterator[tuple[Kind, int]]:
        """Every kind, and the place of its first unit in the list of all."""
        first = 0
        for kind in self.kinds:
            yield kind, first
            first += torch.Size(kind.shape).numel()

    def _spans(self, kind: Kind, first: int) -> Iterator[tuple[int, int]]:
        """The places of the units that are here, in their order."""
        units, part = _units(kind), self.part(kind)
        for layer in [0] if kind.name in REPLICATED else self.layers:
            yield first + layer * units + part.start, first + layer * units + part.stop

    def count(self, kind: Kind) -> int:
        """How many units are here."""
        part = self.part(kind)
        return int(part.stop - part.start) * (1 if kind.name in REPLICATED else len(self.layers))

    # -- Megatron's checkpoints -----------------------------------------------------------------------------------

    def sharded(self, key: str, kind: Kind, values: torch.Tensor, replica: int) -> list[Any]:
        """A shard's values as ShardedTensors of one tensor [L, units of a layer]. ``replica`` is this rank's number
        among data-parallel ones: of equal shards that with number 0 is written."""
        from megatron.core.dist_checkpointing import ShardedTensor

        split = self.is_split(kind)
        offsets = [(1, self.rank, self.ranks)] if split else []
        copy = (0, 0 if split else self.rank, replica)
        return [
            ShardedTensor.from_rank_offsets(
                key, row, (0, layer, kind.shape[0]), *offsets, replica_id=copy, prepend_axis_num=1
            )
            for layer, row in zip(self.layers, values, strict=True)
        ]


def _units(kind: Kind) -> int:
    """Units of one layer, or of the model where the kind has no layers."""
    shape = kind.shape if kind.name in REPLICATED else kind.shape[1:]
    return torch.Size(shape).numel()


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same places in as few ranges as they make."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


def _random(key: int, start: int, stop: int) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
    """Numbers [start, stop) of the sequence that belongs to ``key``."""
    bits = numpy.random.Philox(key=key)
    bits.advance(start // _PER_COUNT)
    before = start % _PER_COUNT
    return numpy.random.Generator(bits).random(before + stop - start, dtype=numpy.float32)[before:]
