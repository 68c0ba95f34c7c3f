"""A masked checkpoint that loses layers or channels: its masks lose them too, or the cut is refused."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf
from megatron_prune.errors import MasksError
from megatron_prune.masks import open_masks, verify
from megatron_prune.structured.apply import apply_plan
from tests.masks.conftest import by_hand
from tests.structured import layered
from tests.structured.test_apply import make, sliced

CUTS = {
    "depth": ("shortgpt", {"num_layers": 1}),
    "hidden": ("minitron-width", {"hidden_size": 60}),
    "heads": ("minitron-width", {"num_attention_heads": 6}),
    "groups": ("minitron-width", {"num_attention_heads": 8, "num_query_groups": 4}),
    "ffn": ("minitron-width", {"ffn_hidden_size": 72}),
    "all": ("random", {"num_layers": 1, "hidden_size": 48, "num_attention_heads": 3, "num_query_groups": 3,
                       "ffn_hidden_size": 51}),
}  # fmt: skip


def cut_by_hand(kept, made):
    """Masks of the smaller model, by Hugging Face names: cut as test_apply cuts a Hugging Face model."""
    source = made.source
    sizes = {"heads": source.num_attention_heads, "groups": source.num_query_groups, "d": source.kv_channels}
    state = by_hand(kept, layers=source.num_layers, ffn=source.ffn_hidden_size, **sizes)
    masked = set(state)
    for layer in range(source.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{norm}.weight"] = torch.ones(source.hidden_size)
        for part in ("gate_proj", "up_proj"):  # one layer's are dense
            state.setdefault(f"model.layers.{layer}.mlp.{part}.weight", torch.ones(192, 96))
    state |= {"model.embed_tokens.weight": torch.ones(1, 96), "model.norm.weight": torch.ones(96)}
    found = sliced(state, made)
    where = {new: old for new, old in enumerate(made.kept_layers)}
    return {
        name: mask
        for name, mask in found.items()
        if name.startswith("model.layers.")
        and name.replace(f".{name.split('.')[2]}.", f".{where[int(name.split('.')[2])]}.", 1) in masked
    }


@pytest.mark.parametrize("cut", CUTS)
def test_unstructured_masks_are_cut_as_the_weights(cut, sparse, tmp_path):
    root, kept = sparse("unstructured")
    made = make(open_checkpoint(root), CUTS[cut][0], **CUTS[cut][1])
    apply_plan(root, made, tmp_path / "small")
    masks, small = open_masks(tmp_path / "small" / "masks"), open_checkpoint(tmp_path / "small")
    verify(masks, small)
    assert masks.model == made.target == small.shape
    found = by_hand(
        {name: masks.read(name) for name in masks.entries}, layers=made.target.num_layers,
        heads=made.target.num_attention_heads, groups=made.target.num_query_groups, d=12,
        ffn=made.target.ffn_hidden_size,
    )  # fmt: skip
    expected = cut_by_hand(kept, made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


def test_masks_of_layers_that_differ_are_cut_as_the_weights(sparse, tmp_path):
    root, kept = sparse("unstructured")
    chosen = layered.selection(((2, 50), (6, 0)))
    apply_plan(root, layered.plan(open_checkpoint(root), chosen), tmp_path / "small")
    masks, small = open_masks(tmp_path / "small" / "masks"), open_checkpoint(tmp_path / "small")
    verify(masks, small)
    assert masks.model == small.shape and len(masks.model.layers) == 2
    assert set(masks.entries) == {name for name in kept if not name.startswith("decoder.layers.1.mlp")}
    fc2, proj = "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.self_attention.linear_proj.weight"
    assert torch.equal(masks.read(fc2), kept[fc2][:, list(chosen.ffn[0])])
    channels = [head * 12 + i for head in chosen.heads[0] for i in range(12)]
    assert torch.equal(masks.read(proj), kept[proj][:, channels])


@pytest.mark.parametrize("cut", ["depth", "heads", "groups"])
def test_whole_groups_may_go_from_n_to_m_masks(cut, sparse, tmp_path):
    """A layer, or a head: its 12 channels are three groups of 4 inputs of linear_proj."""
    root, kept = sparse("2:4")
    made = make(open_checkpoint(root), CUTS[cut][0], **CUTS[cut][1])
    apply_plan(root, made, tmp_path / "small")
    masks = open_masks(tmp_path / "small" / "masks")
    verify(masks, open_checkpoint(tmp_path / "small"))
    assert {entry.pattern for entry in masks.entries.values()} == {"2:4"}
    if cut == "depth":
        [layer] = made.kept_layers
        assert {n.replace("layers.0", f"layers.{layer}") for n in masks.entries} == {
            n for n in kept if f"layers.{layer}." in n
        }
        for name in masks.entries:
            assert torch.equal(masks.read(name), kept[name.replace("layers.0", f"layers.{layer}")])


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            "hidden",
            r"linear_qkv\.weight is pruned 2:4, but the plan removes hidden channels from its groups of 4 inputs",
        ),
        ("ffn", r"linear_fc2\.weight is pruned 2:4, but the plan removes ffn channels from its groups of 4 inputs"),
    ],
)
def test_a_cut_through_groups_is_refused(cut, message, sparse, tmp_path):
    root, _ = sparse("2:4")
    made = make(open_checkpoint(root), CUTS[cut][0], **CUTS[cut][1])
    with pytest.raises(MasksError, match=message):
        apply_plan(root, made, tmp_path / "small")
    assert os.listdir(tmp_path) == []


def test_masks_that_do_not_fit_their_parent_are_refused(sparse, tmp_path):
    root = shutil.copytree(sparse("unstructured")[0], tmp_path / "parent")
    made = make(open_checkpoint(root), "shortgpt", num_layers=1)
    shutil.rmtree(root / "masks")
    shutil.copytree(sparse("2:4")[0] / "masks", root / "masks")
    with pytest.raises(MasksError, match="do not fit these weights: decoder.layers.0"):
        apply_plan(root, made, tmp_path / "small")
    assert os.listdir(tmp_path) == ["parent"]


def test_masks_go_through_chains_and_conversions(sparse, tmp_path):
    """Sparse, then depth, then to Hugging Face: the prunings are listed, the masks are the kept layer's."""
    root, _ = sparse("2:4")
    made = make(open_checkpoint(root), "shortgpt", num_layers=1)
    apply_plan(root, made, tmp_path / "small")
    export_hf(tmp_path / "small", tmp_path / "hf")
    assert (tmp_path / "hf" / "masks.safetensors").is_file()
    assert [entry["method"] for entry in open_checkpoint(tmp_path / "small").pruning] == ["shortgpt"]
