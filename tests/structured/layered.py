"""A parent of which every layer keeps other sizes: its plan, and the same cut of the Hugging Face model by masking."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.methods.base import Selection
from megatron_prune.structured import apply
from megatron_prune.structured.plan import PruningPlan

# Query groups (of 6, two heads each) and FFN channels (of 192) of the four layers. A single group: fewer than TP = 2.
SIZES = ((6, 50), (0, 192), (1, 64), (4, 0))


def selection(sizes: Any = SIZES, *, heads_per_group: int = 2, of: tuple[int, int] = (6, 192)) -> Selection:
    """Scattered groups and channels of these numbers."""
    draw = random.Random(3)
    heads, ffn = [], []
    for groups, channels in sizes:
        chosen = sorted(draw.sample(range(of[0]), groups))
        heads.append(tuple(g * heads_per_group + h for g in chosen for h in range(heads_per_group)))
        ffn.append(tuple(sorted(draw.sample(range(of[1]), channels))))
    return Selection(tuple(range(len(sizes))), heads=tuple(heads), ffn=tuple(ffn))


def plan(parent: Checkpoint, kept: Selection) -> PruningPlan:
    return PruningPlan(
        method="minitron-width", settings={}, seed=None, ratio=None, ratio_of="linears", source=parent.shape,
        target=kept.shape(parent.shape), parent=parent.fingerprint(), kept_layers=kept.layers, kept_hidden=kept.hidden,
        kept_heads=kept.heads, kept_ffn=kept.ffn,
    )  # fmt: skip


def cut(parent: Path, folder: Path, sizes: Any = SIZES) -> Path:
    """The checkpoint of the parent that keeps ``selection(sizes)``."""
    apply.apply_plan(parent, plan(open_checkpoint(parent), selection(sizes)), folder)
    return folder


def masked(folder: Path, kept: Selection, *, head: int = 12) -> Any:
    """transformers' model in float64 whose removed heads and channels are zero where the next matrix reads them."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert kept.heads is not None and kept.ffn is not None
    with torch.no_grad():
        for layer, heads, ffn in zip(model.model.layers, kept.heads, kept.ffn, strict=True):
            for matrix, channels in (
                (layer.self_attn.o_proj, [h * head + i for h in heads for i in range(head)]),
                (layer.mlp.down_proj, list(ffn)),
            ):
                alive = torch.zeros(matrix.weight.shape[1], dtype=torch.bool)
                alive[channels] = True
                matrix.weight[:, ~alive] = 0
    return model
