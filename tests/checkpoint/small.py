"""A small checkpoint written by our writer, for tests that damage or read one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint import record
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.writer import CheckpointWriter
from tests.checkpoint.ranks import STORED_ARGS as ARGS

__all__ = ["ARGS", "TOOLS", "tensors", "write"]
TOOLS = Path(__file__).parents[2] / "tools"


def tensors(args=ARGS, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights of the model that ``args`` describe."""
    generator = torch.Generator().manual_seed(seed)
    shape = ModelShape.from_args(args)
    return {w.name: torch.randn(w.shape, generator=generator).to(dtype) for w in weights(shape)}


def write(root: Path, args=ARGS, *, block_rows: int = 1000, dtype: torch.dtype = torch.float32, **options) -> Path:
    """Write those weights in blocks of ``block_rows`` rows; returns ``root``."""
    with CheckpointWriter(root, args=args, dtype=dtype, **options) as writer:
        for name, tensor in tensors(args, dtype=dtype).items():
            writer.add(name, tensor.shape, tensor.split(block_rows))
    return root


def disk_with(monkeypatch: Any, room: int) -> list[int]:
    """Let writes of records fail as on a full disk after ``room`` bytes; the sizes of the writes."""
    written: list[int] = []

    def write(handle: Any, segments: Any, real: Any = record.RecordFiles._write) -> None:
        written.append(sum(map(len, segments)))
        if sum(written) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, segments)

    monkeypatch.setattr(record.RecordFiles, "_write", staticmethod(write))
    return written
