"""A Hugging Face model as a checkpoint with masks, and its masks under Hugging Face names, split by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.checkpoint.layout import weights
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.masks import write_single
from tests.masks.ranks import random_masks


@pytest.fixture(scope="session")
def sparse(tiny_hf, tmp_path_factory):
    """``sparse(pattern)``: a checkpoint with masks, made from a Hugging Face model; its masks by logical name."""
    built = {}

    def get(pattern, name="llama-gqa"):
        if (pattern, name) not in built:
            root = tmp_path_factory.mktemp("sparse") / "made"
            dense = import_hf(tiny_hf(name), tmp_path_factory.mktemp("dense") / "made")
            kept = random_masks(pattern, shape=dense.shape)
            with CheckpointWriter(root, args=dense.args, dtype=torch.float32, huggingface=dense.huggingface) as writer:
                write_single(writer.beside("masks"), dense.shape, ((n, k, pattern) for n, k in kept.items()))
                for weight in weights(dense.shape):
                    tensor = dense.read(weight.name)
                    writer.add(
                        weight.name, weight.shape, [tensor * kept[weight.name] if weight.name in kept else tensor]
                    )
            built[pattern, name] = root, kept
        return built[pattern, name]

    return get


def by_hand(kept, layers, heads, groups, d, ffn):
    """Hugging Face masks, split from Megatron's by its description of the fused weights."""
    found = {}
    for layer in range(layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        if f"{ours}self_attention.linear_qkv.weight" in kept:
            fused = kept[f"{ours}self_attention.linear_qkv.weight"]
            parts = {"q": [], "k": [], "v": []}
            row = 0
            for _ in range(groups):
                for part, count in (("q", heads // groups), ("k", 1), ("v", 1)):
                    parts[part].append(fused[row : row + count * d])
                    row += count * d
            found |= {f"{theirs}self_attn.{p}_proj.weight": torch.cat(rows) for p, rows in parts.items()}
        if f"{ours}mlp.linear_fc1.weight" in kept:
            fused = kept[f"{ours}mlp.linear_fc1.weight"]
            found[f"{theirs}mlp.gate_proj.weight"], found[f"{theirs}mlp.up_proj.weight"] = fused[:ffn], fused[ffn:]
        found[f"{theirs}self_attn.o_proj.weight"] = kept[f"{ours}self_attention.linear_proj.weight"]
        found[f"{theirs}mlp.down_proj.weight"] = kept[f"{ours}mlp.linear_fc2.weight"]
    return found
