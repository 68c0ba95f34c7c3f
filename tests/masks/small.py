"""A small checkpoint with masks, and masks alone, for tests that read, damage, cut or convert them."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.masks import Masks, write_single
from tests.checkpoint.small import ARGS, tensors
from tests.masks.ranks import random_masks

SHAPE = ModelShape.from_args(ARGS)
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


def write_masks(folder: Path, pattern: str = "2:4", *, seed: int = 0) -> Masks:
    """Random masks for the model of ``SHAPE``."""
    masks = random_masks(pattern, seed, SHAPE)
    return write_single(folder, SHAPE, ((name, kept, pattern) for name, kept in masks.items()))


def masked_tensors(pattern: str = "2:4", *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The small model's weights, zero under those masks."""
    found = tensors()
    for name, kept in random_masks(pattern, seed, SHAPE).items():
        found[name] = found[name] * kept
    return found


def write(root: Path, pattern: str = "2:4", *, seed: int = 0, changes: dict[str, torch.Tensor] | None = None) -> Path:
    """Write those weights, except for ``changes``, and the masks next to them; returns ``root``."""
    assert {w.name for w in weights(SHAPE)} >= set(changes or {})
    with CheckpointWriter(root, args=ARGS, dtype=torch.float32) as writer:
        write_masks(writer.beside("masks"), pattern, seed=seed)
        for name, tensor in (masked_tensors(pattern, seed=seed) | (changes or {})).items():
            writer.add(name, tensor.shape, [tensor])
    return root
