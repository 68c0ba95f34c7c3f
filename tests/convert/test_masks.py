"""Masks go to Hugging Face and back with their model, bit by bit; a mismatch is refused and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_prune.__main__ import main
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert import masks as huggingface
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import MasksError
from megatron_prune.masks import open_masks, verify, write_single
from tests.masks.conftest import by_hand
from tests.masks.ranks import random_masks


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha-tied"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("block", [500, 8 << 20])
def test_there_and_back_is_bit_identical(name, pattern, block, sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "BLOCK_BYTES", block)
    root, kept = sparse(pattern, name)
    export_hf(root, tmp_path / "hf")
    back = import_hf(tmp_path / "hf", tmp_path / "back")
    masks, again = open_masks(root / "masks"), open_masks(tmp_path / "back" / "masks")
    assert again.hash == masks.hash and again.entries == masks.entries
    assert all(torch.equal(again.read(n), k) for n, k in kept.items())
    assert back.fingerprint() == open_checkpoint(root).fingerprint()
    verify(again, back)
    export_hf(tmp_path / "back", tmp_path / "twice")
    assert (tmp_path / "twice" / "masks.safetensors").read_bytes() == (
        tmp_path / "hf" / "masks.safetensors"
    ).read_bytes()


def test_the_file_is_as_documented(sparse, tmp_path):
    """Names, packing and metadata, read by safetensors and numpy alone, against masks split by hand."""
    root, kept = sparse("2:4")
    export_hf(root, tmp_path / "hf")
    expected = by_hand(kept, layers=2, heads=12, groups=6, d=12, ffn=192)
    stored = load_file(tmp_path / "hf" / "masks.safetensors")
    assert stored.keys() == expected.keys()
    for name, mask in expected.items():
        assert stored[name].dtype == torch.uint8 and list(stored[name].shape) == [len(mask), mask.shape[1] // 8]
        assert numpy.array_equal(numpy.unpackbits(stored[name].numpy(), axis=1, bitorder="little"), mask.numpy())
    with safe_open(tmp_path / "hf" / "masks.safetensors", framework="pt") as handle:
        metadata = handle.metadata()
    assert json.loads(metadata["patterns"]) == dict.fromkeys(expected, "2:4")
    assert json.loads(metadata["shapes"]) == {name: list(mask.shape) for name, mask in expected.items()}
    assert metadata["hash"] == open_masks(root / "masks").hash
    weights_there = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(bool((weights_there[name][~mask] == 0).all()) for name, mask in expected.items())


def test_transformers_loads_what_lies_beside_masks(sparse, tmp_path):
    from transformers import AutoModelForCausalLM

    export_hf(sparse("2:4")[0], tmp_path / "hf")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_without_masks_nothing_changes(tiny_hf, tmp_path):
    import_hf(tiny_hf("llama-gqa"), tmp_path / "made")
    export_hf(tmp_path / "made", tmp_path / "hf")
    assert not (tmp_path / "made" / "masks").exists() and not (tmp_path / "hf" / "masks.safetensors").exists()
    assert set(os.listdir(tmp_path / "made")) == {"release", "huggingface", "latest_checkpointed_iteration.txt"}


def test_an_iteration_is_exported_with_its_roots_masks(sparse, tmp_path):
    root, _ = sparse("2:4")
    export_hf(root / "release", tmp_path / "hf")
    assert (tmp_path / "hf" / "masks.safetensors").is_file()


def test_masks_that_do_not_fit_the_weights_are_not_exported(sparse, tmp_path):
    root = shutil.copytree(sparse("2:4")[0], tmp_path / "made")
    shutil.rmtree(root / "masks")
    shape = open_checkpoint(root).shape
    masks = write_single(root / "masks", shape, ((n, ~k, "2:4") for n, k in random_masks("2:4", shape=shape).items()))
    with pytest.raises(MasksError, match=r"do not fit these weights: decoder\.layers\.\d"):
        export_hf(root, tmp_path / "hf")
    kept = {n: masks.read(n) for n in masks.entries}
    shutil.rmtree(root / "masks")
    other = type(shape)(**{**vars(shape), "num_layers": 3})
    write_single(root / "masks", other, ((n, k, "2:4") for n, k in kept.items()))
    with pytest.raises(
        MasksError, match="expected masks of this model, got those of another: num_layers is 3 there and 2"
    ):
        export_hf(root, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


Q, K, GATE, DOWN = (
    f"model.layers.0.{x}.weight" for x in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
)


def _pattern(name, pattern):
    return lambda tensors, texts: texts["patterns"].update({name: pattern})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, texts: tensors.pop(K), "q_proj.*k_proj.*v_proj.* one matrix in Megatron"),
        (_pattern(GATE, "1:4"), "gate_proj.*up_proj.* one matrix in Megatron: expected masks of one pattern"),
        (_pattern(DOWN, "1:4"), r"linear_fc2\.weight breaks 1:4"),
        (_pattern(DOWN, "5:7"), "expected a pattern that divides its 192 inputs, got 5:7"),
        (_pattern(DOWN, {}), "expected .*, got {}"),
        (lambda tensors, texts: tensors.update({DOWN: tensors[DOWN][:-1]}), r"expected U8 .*, got U8 \[95, 24\]"),
        (lambda tensors, texts: tensors.update({DOWN: tensors[DOWN].float()}), r"expected U8 .*, got F32"),
        (
            lambda tensors, texts: texts["shapes"].update({DOWN: [96, 190]}),
            r"expected shape .* in the header, got \[96, 190\]",
        ),
        (
            lambda tensors, texts: tensors.update(x=tensors[DOWN].clone()),
            "expected masks of this model's linear weights, got one of x",
        ),
        (lambda tensors, texts: texts.pop("patterns"), "expected patterns in its header, got none that is readable"),
        (lambda tensors, texts: texts.update(patterns={}), "q_proj.*k_proj.*v_proj.* one matrix in Megatron"),
        (
            lambda tensors, texts: texts.update(patterns="[" * 100_000),
            "expected patterns in its header, got none that is readable",
        ),
        (lambda tensors, texts: texts.update(hash="0" * 64), "is damaged: expected masks with the hash"),
        (lambda tensors, texts: tensors[DOWN].bitwise_not_(), "do not fit these weights|hash"),
        (lambda tensors, texts: [tensors.pop(name) for name in list(tensors)], "expected masks, got none"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_written(change, message, sparse, tmp_path):
    export_hf(sparse("2:4")[0], tmp_path / "hf")
    file = tmp_path / "hf" / "masks.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as handle:
        texts = {k: json.loads(v) if k in ("patterns", "shapes") else v for k, v in handle.metadata().items()}
    change(tensors, texts)
    save_file(tensors, file, {k: v if isinstance(v, str) else json.dumps(v) for k, v in texts.items()})
    with pytest.raises(MasksError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "made")
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("cut", [4, 200, -1])
def test_a_truncated_file_is_refused(cut, sparse, tmp_path):
    export_hf(sparse("2:4")[0], tmp_path / "hf")
    file = tmp_path / "hf" / "masks.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(MasksError, match="truncated or damaged"):
        import_hf(tmp_path / "hf", tmp_path / "made")
    assert os.listdir(tmp_path) == ["hf"]


def test_the_tools(sparse, tmp_path, capsys):
    """Both directions by the command line, and the inspector shows the masks."""
    root, kept = sparse("2:4")

    def tool(*words):
        return main([str(word) for word in words]), *capsys.readouterr()

    assert tool("convert", "export", "--load", root, "--hf", tmp_path / "hf")[0] == 0
    assert tool("convert", "import", "--hf", tmp_path / "hf", "--save", tmp_path / "back")[0] == 0
    hashed = open_masks(root / "masks").hash
    code, out, _ = tool("inspect", tmp_path / "back", "--json", "--verify-integrity")
    found = json.loads(out)
    assert code == 0 and found["masks"]["hash"] == hashed
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert found["masks"]["removed"] == sum(int((~k).sum()) for k in kept.values())
    assert found["masks"]["tensors"][name] == {"pattern": "2:4", "removed": 96 * 192 // 2, "ratio": 0.5}
    code, out, _ = tool("inspect", tmp_path / "back")
    assert code == 0 and hashed in out and "2:4 mask, 50.00% removed" in out
    os.remove(tmp_path / "back" / "masks" / "masks.json")
    code, _, err = tool("inspect", tmp_path / "back")
    assert code == 2 and "expected masks with a masks.json" in err
