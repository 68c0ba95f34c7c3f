"""Ranks that write and read masks: unusual slices, failures of one rank, masks of another model."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.masks import open_masks, write_single
from tests.masks import ranks


def test_more_tensor_parallel_ranks_than_query_groups(distributed, tmp_path):
    """A rank's rows of linear_qkv then begin and end inside a group."""
    shape = ModelShape(**{**vars(ranks.SHAPE), "num_query_groups": 2})
    whole = ranks.random_masks(shape=shape)
    distributed(ranks.write, 4, str(tmp_path / "masks"), 4, 1, whole, "unstructured", "--num-query-groups", "2")
    masks = open_masks(tmp_path / "masks")
    assert masks.model == shape and all(torch.equal(masks.read(name), kept) for name, kept in whole.items())


@pytest.mark.parametrize(
    ("how", "first", "others"),
    [
        (
            "disk",
            r"could not be written on rank 1, nothing was kept \([\d.]+ GB are free there\).*OSError",
            "on another rank",
        ),
        ("pattern", r"breaks 2:4: row \d+, inputs 8 to 11 are \[", "rank 0: .*breaks 2:4"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_leaves_nothing(how, first, others, distributed, tmp_path):
    results = distributed(ranks.fail_to_write, 2, str(tmp_path / "masks"), how)
    for (error, gone), message in zip(results, (first, others), strict=True):
        assert re.search(message, error, re.DOTALL), error
        assert gone


def test_masks_of_another_model_are_refused_by_ranks(distributed, tmp_path):
    other = ModelShape(**{**vars(ranks.SHAPE), "num_layers": 5})
    whole = ranks.random_masks(shape=other)
    write_single(tmp_path / "masks", other, ((n, k, "unstructured") for n, k in whole.items()))
    [error] = distributed(ranks.read_of_another_model, 1, str(tmp_path / "masks"))
    assert "expected masks of this model, got those of another: num_layers is 5 there and 4 in this one" in error
