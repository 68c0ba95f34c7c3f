"""Pruned checkpoints for masked runs: ``tiny_parent`` under random masks, and ``tiny_hf``'s model under the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training import small_masked


@dataclass(frozen=True)
class Pruned:
    """A checkpoint with masks next to it, and a file with them for ranks (logical name → bool [out, in])."""

    path: Path
    kept: small_masked.Kept
    file: str

    @property
    def masks(self) -> Path:
        return self.path / "masks"


@pytest.fixture(scope="session")
def tiny_pruned(tmp_path_factory: pytest.TempPathFactory, tiny_parent: Path) -> Callable[..., Pruned]:
    """``tiny_pruned("2:4")`` or ``tiny_pruned("unstructured")``; built once each."""
    from megatron_prune.checkpoint.reader import open_checkpoint

    built: dict[str, Pruned] = {}

    def get(pattern: str) -> Pruned:
        if pattern not in built:
            folder = tmp_path_factory.mktemp("pruned")
            kept = small_masked.kept_at_random(open_checkpoint(tiny_parent).shape, pattern)
            (folder / "kept.pickle").write_bytes(pickle.dumps(kept))
            path = small_masked.write_pruned(tiny_parent, kept, pattern, folder / "checkpoint")
            built[pattern] = Pruned(path, kept, str(folder / "kept.pickle"))
        return built[pattern]

    return get
