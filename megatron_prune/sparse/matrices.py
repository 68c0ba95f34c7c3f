"""The logical matrices inside Megatron's fused and sharded linears, and how a rank gets rows with all their inputs.

A block has four linears ("modules"), which hold the seven matrices that the methods prune one by one:

    qkv   q, k, v     rows group by group: a group's query heads, its key, its value    rows sharded over TP
    proj  o                                                                            inputs sharded over TP
    fc1   gate, up    gate rows, then up rows (no gate: up alone)                       rows sharded over TP
    fc2   down                                                                         inputs sharded over TP

Matrices of one module read the same inputs and share a statistic of them. Methods need rows with all their inputs:
``to_rows`` turns a tensor-parallel rank's slice of all rows into its share of whole rows, ``to_columns`` reverses it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from megatron_prune.checkpoint.layout import LINEARS, ModelShape
from megatron_prune.engine.spec import ROW_PARALLEL
from megatron_prune.verbs import MODULES as MODULES

SUFFIXES = dict(zip(MODULES, LINEARS, strict=True))
# The order numbers them for random draws.
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Matrix:
    """One logical matrix [rows, inputs] of a block."""

    name: str
    module: str
    rows: int
    inputs: int

    @property
    def number(self) -> int:
        return NAMES.index(self.name)


@dataclass(frozen=True)
class LocalRows:
    """The rows of a matrix in a rank's shard of its linear: at ``places`` in the shard, from row ``first``."""

    places: slice | torch.Tensor
    first: int
    count: int


@dataclass(frozen=True)
class RowRun:
    """Rows [start, stop) of a module's weight, which are a matrix's rows from ``first`` on."""

    matrix: Matrix
    start: int
    stop: int
    first: int


def matrices(module: str, shape: ModelShape) -> tuple[Matrix, ...]:
    """The matrices of a module, in the order of their rows."""
    heads, groups = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    table = {
        "qkv": (("q", heads, hidden), ("k", groups, hidden), ("v", groups, hidden)),
        "proj": (("o", hidden, heads),),
        "fc1": ((("gate", ffn, hidden),) if shape.gated else ()) + (("up", ffn, hidden),),
        "fc2": (("down", hidden, ffn),),
    }
    return tuple(Matrix(name, module, rows, inputs) for name, rows, inputs in table[module])


def runs(module: str, shape: ModelShape) -> list[RowRun]:
    """A module's whole weight, from its first row to its last, as runs of rows that belong to one matrix."""
    if module == "qkv":
        q, k, v = matrices(module, shape)
        d = shape.kv_channels
        lengths = [(q, shape.heads_per_group * d), (k, d), (v, d)] * shape.num_query_groups
    else:
        lengths = [(matrix, matrix.rows) for matrix in matrices(module, shape)]
    found: list[RowRun] = []
    seen: dict[Matrix, int] = defaultdict(int)
    start = 0
    for matrix, length in lengths:
        found.append(RowRun(matrix, start, start + length, seen[matrix]))
        start, seen[matrix] = start + length, seen[matrix] + length
    return found


def local_rows(matrix: Matrix, shape: ModelShape, rank: int, ranks: int) -> LocalRows:
    """Where tensor-parallel rank ``rank`` of ``ranks`` has rows of a matrix, once it holds whole rows."""
    if matrix.module in ROW_PARALLEL:
        counts = row_counts(matrix.rows, ranks)
        return LocalRows(slice(None), sum(counts[:rank]), counts[rank])
    if matrix.module == "fc1":  # [gate_r; up_r]
        count = matrix.rows // ranks
        start = count if shape.gated and matrix.name == "up" else 0
        return LocalRows(slice(start, start + count), rank * count, count)
    # A rank's rows are a run of the fused rows; with fewer groups than ranks it may begin inside a group.
    rows = _qkv_rows(matrix.name, shape)
    share = shape.axis_size("qkv") // ranks
    first, last = (int(torch.searchsorted(rows, share * r)) for r in (rank, rank + 1))
    return LocalRows(rows[first:last] - share * rank, first, last - first)


def _qkv_rows(name: str, shape: ModelShape) -> torch.Tensor:
    """Rows of q, k or v in the fused weight, ascending int64."""
    per_group = shape.heads_per_group
    rows = torch.arange(shape.axis_size("qkv")).view(shape.num_query_groups, per_group + 2, -1)  # [G, H/G + 2, d]
    heads = {"q": slice(per_group), "k": slice(per_group, per_group + 1), "v": slice(per_group + 1, None)}[name]
    return rows[:, heads].flatten()


def row_counts(rows: int, ranks: int) -> list[int]:
    """The number of rows per rank; if they do not divide evenly, the first ranks take one more."""
    return [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]


def to_rows(columns: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[out, in/TP], this rank's inputs of all rows, to [out_r, in], all inputs of its share of the rows. Collective."""
    out, width = columns.shape
    ranks, rank = group.size(), group.rank()
    counts = row_counts(out, ranks)
    received = columns.new_empty(ranks * counts[rank], width)
    torch.distributed.all_to_all_single(
        received, columns.contiguous(), [counts[rank]] * ranks, counts, group=group
    )  # [TP·out_r, in/TP]: rank after rank, each its inputs of our rows
    return received.view(ranks, counts[rank], width).transpose(0, 1).reshape(counts[rank], ranks * width)


def to_columns(rows: torch.Tensor, out: int, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[out_r, in], all inputs of this rank's rows, to [out, in/TP], its inputs of all ``out`` rows. Collective."""
    ranks, rank = group.size(), group.rank()
    counts = row_counts(out, ranks)
    width = rows.shape[1] // ranks
    by_rank = rows.view(counts[rank], ranks, width).transpose(0, 1).reshape(ranks * counts[rank], width)
    received = rows.new_empty(out, width)
    torch.distributed.all_to_all_single(received, by_rank, counts, [counts[rank]] * ranks, group=group)
    return received
