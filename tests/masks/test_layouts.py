"""Masks that ranks write and read: any layout writes what any other reads, sharded as the weights are."""

from __future__ import annotations

import numpy
import pytest
import torch

from megatron_prune.artifacts import read_json
from megatron_prune.masks import open_masks, write_single
from tests.masks import ranks

# name -> (TP, PP, ranks, more flags)
LAYOUTS = {
    "tp1": (1, 1, 1, ()),
    "tp3": (3, 1, 3, ()),
    "tp2-pp2": (2, 2, 4, ()),
    "pp2-virtual": (1, 2, 2, ranks.VPP),
    "dp2": (1, 1, 2, ()),
}
PATTERNS = {"tp1": "unstructured", "tp3": "2:4", "tp2-pp2": "unstructured", "pp2-virtual": "1:4", "dp2": "4:12"}


@pytest.fixture(scope="module")
def written(distributed, tmp_path_factory):
    """Masks that each layout wrote: its folder and the masks."""
    found = {}
    for layout, (tp, pp, count, more) in LAYOUTS.items():
        whole = ranks.random_masks(PATTERNS[layout], seed=len(found))
        folder = tmp_path_factory.mktemp(layout) / "masks"
        names = distributed(ranks.write, count, str(folder), tp, pp, whole, PATTERNS[layout], *more)
        assert {name for of_rank in names for name in of_rank} == set(whole)
        found[layout] = (folder, whole)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_ranks_wrote_is_read_whole_without_megatron(layout, written):
    folder, whole = written[layout]
    masks = open_masks(folder)
    assert masks.entries.keys() == whole.keys() and list(masks.entries) == list(whole)  # forward order
    for name, expected in whole.items():
        entry = masks.entries[name]
        assert torch.equal(masks.read(name), expected)
        assert (entry.shape, entry.pattern) == (tuple(expected.shape), PATTERNS[layout])
        assert entry.removed == int((~expected).sum())
        rows, columns = slice(5, 23), slice(3, 30)
        assert torch.equal(masks.read(name, rows, columns), expected[rows, columns])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hash_does_not_depend_on_who_wrote(layout, written, tmp_path):
    folder, whole = written[layout]
    alone = write_single(tmp_path / "masks", ranks.SHAPE, ((n, k, PATTERNS[layout]) for n, k in whole.items()))
    assert alone.hash == open_masks(folder).hash
    name = list(whole)[3]
    whole = whole | {name: whole[name].clone()}
    whole[name][[0, 1]] = whole[name][[1, 0]]  # another choice with the same counts
    other = write_single(tmp_path / "other", ranks.SHAPE, ((n, k, PATTERNS[layout]) for n, k in whole.items()))
    assert other.hash != alone.hash


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_what_any_layout_wrote(layout, written, distributed):
    tp, pp, count, more = LAYOUTS[layout]
    folders = [str(folder) for folder, _ in written.values()]
    seen = [set() for _ in folders]
    for rank, found in distributed(ranks.read, count, folders, tp, pp, *more):
        for number, (of_folder, (_, whole)) in enumerate(zip(found, written.values(), strict=True)):
            seen[number] |= set(of_folder)
            for name, kept in of_folder.items():
                assert torch.equal(kept, ranks.slice_of(name, whole[name], tp, rank)), (name, rank)
    assert all(names == set(whole) for names, (_, whole) in zip(seen, written.values(), strict=True))


def test_one_bit_a_weight_unless_a_shard_is_no_whole_bytes(written):
    for layout, dense in {
        "tp1": set(),
        "tp3": {"mlp.linear_fc2.weight"},  # 60 / 3 = 20; the heads are 72 / 3 = 24
        "tp2-pp2": {"mlp.linear_fc2.weight", "self_attention.linear_proj.weight"},  # 30 and 36
    }.items():
        entries = read_json(written[layout][0] / "masks.json")["masks"]
        assert all(entry["packed"] == (name.split(".", 3)[3] not in dense) for name, entry in entries.items())


@pytest.mark.parametrize("layout", ["tp2-pp2", "alone"])
def test_megatrons_own_loader_reads_them(layout, written, distributed, tmp_path):
    """The folder is torch_dist: shapes and bits as documented, read only by Megatron's code."""
    if layout == "alone":
        whole = ranks.random_masks()
        write_single(tmp_path / "masks", ranks.SHAPE, ((n, k, "unstructured") for n, k in whole.items()))
        folder, packed = tmp_path / "masks", lambda name: True
    else:
        folder, whole = written[layout]
        packed = {name: e["packed"] for name, e in read_json(folder / "masks.json")["masks"].items()}.__getitem__
    sizes = {n: (k.shape[0], -(-k.shape[1] // 8) if packed(n) else k.shape[1]) for n, k in whole.items()}
    [loaded] = distributed(ranks.load_by_megatron, 1, str(folder), sizes)
    for name, expected in whole.items():
        stored = loaded[name].numpy()
        if packed(name):
            stored = numpy.unpackbits(stored, axis=1, bitorder="little")[:, : expected.shape[1]]
        assert numpy.array_equal(stored, expected.numpy())
