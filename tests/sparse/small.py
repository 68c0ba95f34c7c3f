"""Flags of a small pruning, and its masks as logical matrices, cut out of Megatron's fused ones by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.masks import open_masks, verify

SEQUENCES, LENGTH = 7, 64  # an odd number: data-parallel ranks share it unevenly
LAYOUTS = {  # name: processes, tensor and pipeline parallel
    "tp1": (1, 1, 1),
    "tp3": (3, 3, 1),
    "pp2": (2, 1, 2),
    "dp2": (2, 1, 1),
    "tp2pp2": (4, 2, 2),
    "tp2dp2": (4, 2, 1),
}
CALIBRATION = ("--calibration-sequences", SEQUENCES, "--calibration-seq-length", LENGTH)


def flags(parent: Path, save: Path, method: str, *more: object, corpus: Path | None = None) -> list[Any]:
    """The command line of ``sparsify``; a corpus for the methods that read one."""
    text = () if corpus is None else ("--calibration-data-path", corpus, *CALIBRATION)
    return ["sparsify", "--load", parent, "--method", method, "--save", save, *text, *more]


def layout(name: str) -> list[Any]:
    _, tp, pp = LAYOUTS[name]
    return ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]


def split(weight: torch.Tensor, module: str, heads: int = 12, groups: int = 6) -> dict[str, torch.Tensor]:
    """The matrices in a fused weight [rows, in] of a gated model."""
    if module == "linear_qkv":
        d = len(weight) // (heads + 2 * groups)
        per_group = weight.view(groups, heads // groups + 2, d, -1)
        q, k, v = per_group[:, :-2], per_group[:, -2], per_group[:, -1]
        return {name: part.reshape(-1, weight.shape[1]) for name, part in (("q", q), ("k", k), ("v", v))}
    if module == "linear_fc1":
        gate, up = weight.chunk(2)
        return {"gate": gate, "up": up}
    return {{"linear_proj": "o", "linear_fc2": "down"}[module]: weight}


def result(save: Path) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, matrix): (weight, mask) of a pruned checkpoint, whose masks are verified first."""
    checkpoint, masks = open_checkpoint(save), open_masks(save / "masks")
    checkpoint.verify(hashes=True)
    verify(masks, checkpoint)
    found = {}
    for name in masks.entries:
        layer, module = int(name.split(".")[2]), name.split(".")[-2]
        shape = checkpoint.shape.by_layer()[layer]
        sizes = (shape.num_attention_heads, shape.num_query_groups)
        weights = split(checkpoint.read(name), module, *sizes)
        kept = split(masks.read(name), module, *sizes)
        found |= {(layer, matrix): (weights[matrix], kept[matrix]) for matrix in weights}
    return found


def agreement(one: dict, other: dict, layer: int | None = None) -> float:
    """The share of mask bits in which two results agree, over all layers or in one."""
    assert one.keys() == other.keys()
    keys = [key for key in one if layer in (None, key[0])]
    same = sum(int((one[key][1] == other[key][1]).sum()) for key in keys)
    return same / sum(one[key][1].numel() for key in keys)


def corpus_windows(corpus: Path) -> torch.Tensor:
    """The first windows of the corpus, read without our reader: int64 [SEQUENCES, LENGTH + 1]."""
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[k * LENGTH : (k + 1) * LENGTH + 1] for k in range(SEQUENCES)]))
