"""Logical matrices in fused, sharded linears: against Megatron's layout written out by hand, at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.sparse.matrices import MODULES, local_rows, matrices, to_columns, to_rows

# heads, groups, head size, hidden, ffn
SIZES = {
    "gqa": (12, 6, 12, 96, 192),
    "mha": (6, 6, 4, 24, 36),
    "few groups": (12, 2, 8, 96, 192),
    "wide": (6, 3, 16, 24, 18),
}


def shape_of(name: str, gated: bool = True) -> ModelShape:
    heads, groups, d, hidden, ffn = SIZES[name]
    return ModelShape(2, hidden, heads, groups, d, ffn, 128, tied=False, gated=gated)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [*((name, ranks) for name in ("gqa", "mha") for ranks in (1, 2, 3, 6)), ("wide", 3), ("few groups", 4)],
)
@pytest.mark.parametrize("gated", [True, False])
def test_every_row_is_some_ranks(name: str, gated: bool, ranks: int) -> None:
    """Rows are labelled by hand in the whole weight; the ranks' places find each once, in order."""
    shape = shape_of(name, gated)
    heads, groups, d, hidden, ffn = SIZES[name]
    labels = {"qkv": [], "fc1": [("gate", i) for i in range(ffn)] if gated else []}
    labels["fc1"] += [("up", i) for i in range(ffn)]
    for group in range(groups):
        for head in range(heads // groups):
            labels["qkv"] += [("q", (group * (heads // groups) + head) * d + i) for i in range(d)]
        labels["qkv"] += [("k", group * d + i) for i in range(d)]
        labels["qkv"] += [("v", group * d + i) for i in range(d)]
    labels["proj"] = [("o", i) for i in range(hidden)]
    labels["fc2"] = [("down", i) for i in range(hidden)]

    for module in MODULES:
        rows = labels[module]
        for matrix in matrices(module, shape):
            assert matrix.rows == sum(label[0] == matrix.name for label in rows)
            found = []
            for rank in range(ranks):
                if module == "fc1":  # [gate_r; up_r]
                    shard = [
                        r for part in range(len(rows) // ffn) for r in chunk(rows[part * ffn :][:ffn], rank, ranks)
                    ]
                else:
                    shard = chunk(rows, rank, ranks)
                local = local_rows(matrix, shape, rank, ranks)
                here = [shard[int(i)] for i in torch.arange(len(shard))[local.places]]
                assert len(here) == local.count and all(label[0] == matrix.name for label in here)
                assert local.first == len(found)
                found += [number for _, number in here]
            assert found == list(range(matrix.rows)), (matrix, ranks)


def chunk(rows: list, rank: int, ranks: int) -> list:
    """A rank's share; where they do not divide evenly (rows of proj and fc2 alone), the first have one more."""
    return [rows[int(i)] for i in torch.arange(len(rows)).tensor_split(ranks)[rank]]


def exchange(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    columns = whole.chunk(group.size(), dim=1)[group.rank()]
    rows = to_rows(columns, group)
    return rows, to_columns(rows, len(whole), group)


@pytest.mark.parametrize("rows", [7, 9, 2])
def test_columns_become_rows_and_columns_again(distributed: Callable[..., list], rows: int) -> None:
    """Also where ranks do not share the rows evenly, and where one has none."""
    whole = torch.randn(rows, 12)
    found = distributed(exchange, 3, whole)
    assert torch.equal(torch.cat([row for row, _ in found]), whole)
    assert torch.equal(torch.cat([column for _, column in found], dim=1), whole)
