"""Limits of shapes in study.yaml are those of ``plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.evaluation.latency import SizeGrid
from megatron_prune.study import commands, needs
from tests.evaluation.made_up_latencies import table_of
from tests.study import made_up

SHAPE = ModelShape(4, 32, 4, 2, 8, 64, 128, tied=False)  # made_up's parent
CORPORA = {name: name for name in ("train", "calibration", "validation", "test")}


def test_latency_limits_the_shapes_of_a_study_and_goes_into_its_commands(tmp_path: Path) -> None:
    """A step takes as many seconds as the hidden size."""
    parts = {"ends": lambda hidden: hidden, "attention": lambda *_: 1e-9, "mlp": lambda *_: 1e-9}
    file = str(tmp_path / "latency.json")
    table_of(SHAPE, SizeGrid((8, 32), (2,), (2,), (8, 64)), prefill=parts, decode=parts).write(file)

    def shapes(*limits: str) -> tuple[Any, Any, tuple[ModelShape, ...]]:
        own = {"divisible-by": 8, "tolerance": 0.2, "search": ["hidden", "ffn"]}
        own |= {"at-most": list(limits), "latency-table": file} if limits else {}
        study = made_up.study(CORPORA, methods=[{"name": "minitron-width", "settings": own}])
        return study, study.methods[0], needs.shapes_of(study, study.methods[0], 0.5, SHAPE)

    _, _, every = shapes()
    assert {shape.hidden_size for shape in every} == {16, 24, 32}
    study, method, within = shapes("latency=24.5s", "cache=1M")
    assert within == tuple(shape for shape in every if shape.hidden_size <= 24)
    words = commands.choice(study, method, 0.5)
    at = words.index("--at-most")
    assert words[at : at + 3] == ["--at-most", "latency=24.5s", "cache=1M"]
    assert words[words.index("--latency-table") + 1] == file
    with pytest.raises(UsageError, match="within latency=2000ms, got a shape with a predicted latency of"):
        shapes("latency=2s")
