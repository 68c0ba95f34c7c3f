"""Masks on disk, in one process: round trips, and refusals by name of masks that do not fit."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import CheckpointError, MasksError, MegatronPruneError, UsageError
from megatron_prune.masks import Masks, Pattern, find_masks, open_masks, verify, write_single
from megatron_prune.masks import mask_reader as reader_module
from megatron_prune.masks import mask_writer as writer_module
from megatron_prune.masks.with_weights import guarded
from tests.checkpoint.small import disk_with
from tests.masks import small
from tests.masks.ranks import random_masks


@pytest.mark.parametrize(("text", "ratio"), [("unstructured", None), ("2:4", 0.5), ("1:2", 0.5), ("31:32", 1 / 32)])
def test_patterns_that_exist(text, ratio):
    assert str(Pattern.parse(text)) == text and Pattern.parse(text).ratio == ratio


@pytest.mark.parametrize(
    "text", ["", "4:4", "0:4", "5:4", "2:33", "2:4:8", "-1:4", "2.0:4", "structured", "2:", "²:4", "2:4\n"]
)
def test_patterns_that_do_not(text):
    with pytest.raises(UsageError, match="--pattern: expected"):
        Pattern.parse(text)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:8"])
def test_rectangles_and_blocks(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "BLOCK_BYTES", 7 * 48)
    monkeypatch.setattr(writer_module, "_RECORD_BYTES", 9 * 6)
    masks, expected = small.write_masks(tmp_path / "masks", pattern), random_masks(pattern, shape=small.SHAPE)
    generator = torch.Generator().manual_seed(0)
    for name, kept in expected.items():
        assert torch.equal(masks.read(name), kept)
        assert torch.equal(torch.cat(list(masks.row_blocks(name))), kept)
        for _ in range(20):
            out, inputs = kept.shape
            r0, r1 = sorted(torch.randint(out + 1, (2,), generator=generator).tolist())
            c0, c1 = sorted(torch.randint(inputs + 1, (2,), generator=generator).tolist())
            assert torch.equal(masks.read(name, slice(r0, r1), slice(c0, c1)), kept[r0:r1, c0:c1])
    with pytest.raises(MasksError, match=r"a mask for decoder\.layers\.1\.mlp\.linear_fc1\.weight"):
        masks.read("decoder.layers.1.mlp.linear_fc1.weight")


def test_rows_that_are_no_whole_bytes(tmp_path):
    """The padding bits of a row are not inputs; they are not read, counted or hashed."""
    for inputs in (1, 7, 8, 9, 15, 17):
        shape = ModelShape(num_layers=1, hidden_size=inputs, num_attention_heads=1, num_query_groups=1, kv_channels=1,
                           ffn_hidden_size=3, padded_vocab_size=8, tied=True)  # fmt: skip
        name = "decoder.layers.0.mlp.linear_fc1.weight"
        kept = torch.rand(6, inputs, generator=torch.Generator().manual_seed(inputs)) < 0.5
        masks = write_single(tmp_path / str(inputs), shape, [(name, kept, "unstructured")])
        assert torch.equal(masks.read(name), kept) and masks.removed == int((~kept).sum())


def test_one_bit_a_weight_and_never_a_whole_mask_in_memory(tmp_path, monkeypatch):
    shape = ModelShape(num_layers=1, hidden_size=1024, num_attention_heads=8, num_query_groups=8, kv_channels=128,
                       ffn_hidden_size=12288, padded_vocab_size=128, tied=True)  # fmt: skip
    read, largest = Masks.read, []

    def recording(self, name, rows=slice(None), columns=slice(None)):
        kept = read(self, name, rows, columns)
        largest.append(kept.numel())
        return kept

    monkeypatch.setattr(Masks, "read", recording)
    row = torch.arange(1024) % 3 == 0
    blocks = (row.expand(512, 1024) for _ in range(48))
    masks = write_single(
        tmp_path / "masks", shape, [("decoder.layers.0.mlp.linear_fc1.weight", blocks, "unstructured")]
    )
    assert max(largest) <= 8 << 20 and sum(largest) == 24576 * 1024  # read back once, to be counted and hashed
    assert masks.removed == 24576 * 682
    size = sum(file.stat().st_size for file in (tmp_path / "masks").iterdir())
    assert size < 24576 * 1024 / 8 * 1.05


def test_the_hash_is_over_names_shapes_patterns_and_bits(tmp_path):
    kept = random_masks("2:4", shape=small.SHAPE)
    hashes = [small.write_masks(tmp_path / "masks").hash]

    def write(change):
        entries = [change(name, mask, "2:4") for name, mask in kept.items()]
        hashes.append(write_single(tmp_path / str(len(hashes)), small.SHAPE, [e for e in entries if e]).hash)

    write(lambda name, mask, pattern: (name, iter(mask.split(5)), pattern))
    assert hashes[0] == hashes[1]
    write(lambda name, mask, pattern: (name, mask, "unstructured" if name == small.FC2 else pattern))
    write(lambda name, mask, pattern: (name, mask.flip(0) if name == small.FC2 else mask, pattern))
    write(lambda name, mask, pattern: None if name == small.FC2 else (name, mask, pattern))
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda k: ("decoder.layers.9.mlp.linear_fc2.weight", k, "2:4"), "expected linear weights, each once"),
        (lambda k: ("embedding.word_embeddings.weight", k, "2:4"), "expected linear weights, each once"),
        (lambda k: (small.FC2, k[:, :-4], "2:4"), r"expected bool \[32, 48\], got torch.bool \[32, 44\]"),
        (lambda k: (small.FC2, k[:-1], "2:4"), "expected 32 rows, got 31"),
        (lambda k: (small.FC2, k.float(), "2:4"), "got torch.float32"),
        (lambda k: (small.FC2, k, "3:5"), "expected a pattern that divides its 48 inputs, got 3:5"),
        (lambda k: (small.FC2, k, "1:4"), r"breaks 1:4: row 0, inputs 0 to 3 are \["),
        (lambda k: (small.FC2, k, "half"), "--pattern: expected .*, got half"),
    ],
)
def test_masks_that_do_not_fit_are_not_written(given, message, tmp_path):
    kept = random_masks("2:4", shape=small.SHAPE)[small.FC2]
    with pytest.raises(MasksError, match=message):
        write_single(tmp_path / "masks", small.SHAPE, [given(kept)])
    assert os.listdir(tmp_path) == []


def test_no_masks_and_the_same_mask_twice_are_refused(tmp_path):
    with pytest.raises(MasksError, match="expected masks, got none"):
        write_single(tmp_path / "masks", small.SHAPE, [])
    kept = random_masks("2:4", shape=small.SHAPE)[small.FC2]
    with pytest.raises(MasksError, match="linear_fc2.weight twice"):
        write_single(tmp_path / "masks", small.SHAPE, [(small.FC2, kept, "2:4")] * 2)
    small.write_masks(tmp_path / "masks")
    with pytest.raises(MegatronPruneError, match="already exists"):
        small.write_masks(tmp_path / "masks")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    written = disk_with(monkeypatch, 5_000)
    with pytest.raises(CheckpointError, match="no space left while writing .*masks"):
        small.write_masks(tmp_path / "masks")
    assert sum(written) > 5_000 and os.listdir(tmp_path) == []


def test_masks_are_found_from_a_root_and_from_its_iterations(tmp_path):
    root = small.write(tmp_path / "made")
    assert find_masks(root) == find_masks(root / "release") == find_masks(str(root)) == root / "masks"
    assert find_masks(tmp_path) is None and find_masks(tmp_path / "nothing") is None


def test_the_checkpoint_beside_masks_is_as_without(tmp_path):
    """Its readers, its hashes and its identity do not see them."""
    root = small.write(tmp_path / "made")
    checkpoint = open_checkpoint(root)
    checkpoint.verify(hashes=True)
    os.rename(root / "masks", tmp_path / "moved")
    assert open_checkpoint(root).fingerprint() == checkpoint.fingerprint()


# -- verification ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_masks_and_weights_that_belong_together(pattern, tmp_path):
    root = small.write(tmp_path / "made", pattern)
    verify(open_masks(root / "masks"), open_checkpoint(root))


def test_zeros_that_are_kept_are_no_violation(tmp_path):
    changes = {small.FC2: torch.zeros(32, 48), "decoder.layers.0.mlp.linear_fc2.weight": -torch.zeros(32, 48)}
    root = small.write(tmp_path / "made", changes=changes)
    verify(open_masks(root / "masks"), open_checkpoint(root))


@pytest.mark.parametrize("value", [1.5, float("nan"), 1e-45, float("inf")])
def test_the_first_weight_that_is_not_zero_is_named(value, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prune.checkpoint.reader._BLOCK_BYTES", 48 * 4 * 5)
    kept, changes = random_masks("2:4", shape=small.SHAPE), {}
    for name in ("decoder.layers.2.self_attention.linear_qkv.weight", small.FC2):
        tensor = small.masked_tensors()[name].clone()
        removed = (~kept[name]).nonzero()
        places = removed[removed[:, 0] >= 17]
        for row, column in places[[0, 3]]:
            tensor[row, column] = value
        changes[name] = tensor
        if name == small.FC2:
            row, column = places[0].tolist()
    root = small.write(tmp_path / "made", changes=changes)
    shown = f"{value:g}".replace("1e-45", "1.4013e-45")
    with pytest.raises(MasksError, match=rf"linear_fc2\.weight\[{row}, {column}\] is {shown}") as caught:
        verify(open_masks(root / "masks"), open_checkpoint(root))
    assert small.FC2 in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_type_of_weight_is_guarded(dtype, tmp_path):
    masks, kept = small.write_masks(tmp_path / "masks"), random_masks("2:4", shape=small.SHAPE)[small.FC2]
    good = torch.where(kept, torch.tensor([1.0, 0.0, -2.0], dtype=dtype).repeat(16), -torch.zeros((), dtype=dtype))
    assert torch.equal(torch.cat(list(guarded(masks, small.FC2, good.split(7)))), good)
    for tiny in (torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).max, float("nan")):
        bad = good.clone()
        row, column = (int(i) for i in (~kept).nonzero()[-1])
        bad[row, column] = tiny
        with pytest.raises(MasksError, match=rf"linear_fc2\.weight\[{row}, {column}\] is"):
            list(guarded(masks, small.FC2, bad.split(7)))
        list(guarded(masks, "decoder.layers.1.mlp.linear_fc1.weight", bad.split(7)))  # has no mask


def test_masks_of_another_model_are_refused_by_what_differs(tmp_path):
    masks = small.write_masks(tmp_path / "masks")
    for changes, message in (
        ({"num_layers": 5}, "num_layers is 4 there and 5"),
        ({"ffn_hidden_size": 96, "num_query_groups": 4}, "num_query_groups is 2 there and 4, ffn_hidden_size is 48"),
        (
            {"kv_channels": 16, "num_attention_heads": 2},
            "num_attention_heads is 4 there and 2, kv_channels is 10 there",
        ),
        ({"gated": False}, "gated is True there and False"),
    ):
        other = ModelShape(**{**vars(small.SHAPE), **changes})
        with pytest.raises(
            MasksError, match=f"expected masks of this model, got those of another: {message}.* in that one"
        ):
            masks.check_model(other, "that one")
    masks.check_model(ModelShape(**{**vars(small.SHAPE), "padded_vocab_size": 256, "tied": True}), "that one")


def test_the_masks_of_other_weights_of_the_same_shape_are_refused(tmp_path):
    root = small.write(tmp_path / "made", seed=0)
    other = small.write_masks(tmp_path / "masks", seed=1)
    with pytest.raises(MasksError, match=r"do not fit these weights: decoder\.layers\.0\.self_attention\.linear_qkv"):
        verify(other, open_checkpoint(root))


def test_counts_are_as_the_bits(tmp_path):
    masks = small.write_masks(tmp_path / "masks", "unstructured")
    expected = random_masks("unstructured", shape=small.SHAPE)
    assert {n: e.removed for n, e in masks.entries.items()} == {n: int((~k).sum()) for n, k in expected.items()}
    assert masks.removed == sum(int((~k).sum()) for k in expected.values())
    entry = read_json(tmp_path / "masks" / "masks.json")["masks"][small.FC2]
    assert entry["removed"] / (32 * 48) == masks.entries[small.FC2].ratio
    assert sum(w.is_linear for w in weights(small.SHAPE)) == len(masks.entries) + 1
