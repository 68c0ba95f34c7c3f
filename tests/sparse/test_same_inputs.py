"""Given the same block inputs, every block is pruned equally at every layout, without noise from earlier blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sparse import ranks, small

CASES = {"wanda": ("--ratio", 0.5), "sparsegpt": ("--ratio", 0.5)}


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_every_block_agrees(
    distributed: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, method: str
) -> None:
    def run(layout: str, record: bool) -> dict:
        save = tmp_path / layout
        argv = small.flags(tiny_parent, save, method, *CASES[method], *small.layout(layout), corpus=tiny_corpus)
        nproc = small.LAYOUTS[layout][0]
        distributed(ranks.with_block_inputs, nproc, [str(word) for word in argv], str(tmp_path), record)
        return small.result(save)

    one = run("tp1", True)
    for layout in ("tp3", "pp2", "dp2", "tp2pp2"):
        other = run(layout, False)
        for layer in range(4):
            assert small.agreement(one, other, layer) >= 0.9999, (layout, layer)
