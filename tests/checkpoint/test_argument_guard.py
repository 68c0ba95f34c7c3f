"""Every argument of Megatron's model, set to another value: its checkpoint alone has the same loss, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.checkpoint.layout import OTHER_MODELS
from megatron_prune.checkpoint.model_arguments import compared, known
from tests.checkpoint import argument_guard
from tests.checkpoint.argument_guard import OUTCOMES

TABLE = Path(__file__).parents[2] / "docs" / "model-arguments.json"
BUGS = {"DIFFERENT", "FAILED"}
# In every run: one that this package restores, one that is refused, one that splits the model (with dropout).
SAMPLE = {"window_size": "equal", "softmax_type": "refused", "tensor_model_parallel_size": "equal"}


def test_a_sample(distributed, tmp_path):
    [found] = distributed(argument_guard.examine, 1, list(SAMPLE), str(tmp_path))
    assert {one.argument: one.outcome for one in found} == SAMPLE, found


def test_the_table_has_every_argument_and_no_bug():
    """If Megatron changed: python -m tests.checkpoint.argument_guard docs/model-arguments.json; look at what is new."""
    rows = {row["argument"]: row for row in json.loads(TABLE.read_text())}
    assert set(rows) == set(known())
    for name, row in rows.items():
        assert row["outcome"] in OUTCOMES.keys() - BUGS, row
        if row["outcome"] == "equal":
            assert name not in compared() and name not in OTHER_MODELS, row
        if row["outcome"] == "refused":
            assert name in compared() or name in OTHER_MODELS, row


@pytest.mark.slow
def test_the_table_is_what_comes_out(distributed, tmp_path):
    """Every argument once more: twenty minutes of one core."""
    [found] = distributed(argument_guard.examine, 1, None, str(tmp_path), timeout=7200)
    assert not [one for one in found if one.outcome in BUGS]
    rows = {row["argument"]: row["outcome"] for row in json.loads(TABLE.read_text())}
    assert {one.argument: one.outcome for one in found} == rows
