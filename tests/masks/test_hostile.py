"""Hostile and damaged masks are refused by name, and nothing in them runs."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune.artifacts import sha256_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import MasksError
from megatron_prune.masks import open_masks, verify
from tests.checkpoint.test_safe import Touches, ViaBuild, replace_metadata, replace_record, saved
from tests.masks import small

FC2 = small.FC2


@pytest.fixture
def folder(tmp_path):
    small.write_masks(tmp_path / "masks")
    return tmp_path / "masks"


def change_json(folder, change):
    found = json.loads((folder / "masks.json").read_text())
    change(found)
    (folder / "masks.json").write_text(json.dumps(found))


def seal(found):
    """Give an altered ``masks.json`` the hash that its entries have, as an attacker would."""
    entries = found["masks"].items()
    found["hash"] = sha256_json([[n, e["shape"], e["pattern"], e["digest"]] for n, e in entries])


@pytest.mark.parametrize("attack", [Touches, ViaBuild])
def test_code_in_the_index_does_not_run(folder, tmp_path, attack):
    (folder / ".metadata").write_bytes(pickle.dumps(attack(tmp_path / "executed")))
    with pytest.raises(MasksError, match=r"\.metadata is refused: it asks for posix\.system"):
        open_masks(folder)
    assert not (tmp_path / "executed").exists()


def test_code_in_a_mask_does_not_run(folder, tmp_path):
    replace_record(folder, FC2, saved(Touches(tmp_path / "executed")) + b"\0" * 1000)
    with pytest.raises(MasksError, match=r"__hostile\.distcp .*linear_fc2.*posix\.system|damaged"):
        open_masks(folder).read(FC2)
    assert not (tmp_path / "executed").exists()


def test_code_in_the_common_state_does_not_run(folder, tmp_path):
    replace_record(folder, "common_state/shard_0_1", saved([Touches(tmp_path / "executed")]))
    with pytest.raises(MasksError, match=r"the record common_state/shard_0_1 is refused.*posix\.system"):
        open_masks(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a/b"])
def test_files_outside_the_folder_are_refused(folder, name):
    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == FC2)
        metadata.storage_data[index] = _StorageInfo(name, 0, 100)

    replace_metadata(folder, change)
    with pytest.raises(MasksError, match="not inside the checkpoint"):
        open_masks(folder)


@pytest.mark.parametrize(
    "payload",
    [b"", b"x" * 500, saved(torch.zeros(32, 5, dtype=torch.uint8)), saved(torch.zeros(32, 6)), saved({"a": 1})],
    ids=["empty", "garbage", "narrow", "float", "dictionary"],
)
def test_damaged_records_are_refused(folder, payload):
    replace_record(folder, FC2, payload)
    with pytest.raises(MasksError, match=r"__hostile|truncated"):
        open_masks(folder).read(FC2)


def test_a_missing_or_short_file_is_refused_before_anything_is_read(folder):
    file = folder / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(MasksError, match=r"__0_0\.distcp is truncated: expected \d+ bytes, got \d+"):
        open_masks(folder)
    file.unlink()
    with pytest.raises(MasksError, match=r"__0_0\.distcp is missing"):
        open_masks(folder)


@pytest.mark.parametrize("what", ["dropped", "doubled", "unnamed"])
def test_a_missing_or_doubled_shard_is_refused(folder, what):
    def change(metadata):
        entry = metadata.state_dict_metadata[FC2]
        if what == "dropped":
            entry.chunks.pop()
        elif what == "doubled":
            entry.chunks.append(entry.chunks[0])
        else:
            index = next(index for index in metadata.storage_data if index.fqn == FC2)
            del metadata.storage_data[index]

    replace_metadata(folder, change)
    with pytest.raises(
        MasksError,
        match=r"linear_fc2\.weight(: expected the mask exactly once| is missing or duplicated| at .*, got none)",
    ):
        open_masks(folder)


@pytest.mark.parametrize("missing", ["masks.json", ".metadata"])
def test_an_unfinished_folder_is_refused(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(MasksError, match=missing.replace(".", r"\.")):
        open_masks(folder)
    with pytest.raises(MasksError, match="expected masks with a masks.json"):
        open_masks(folder.parent / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("masks"), "KeyError"),
        (lambda f: f.update(version=2), "version 2, expected 1"),
        (lambda f: f.update(masks=[]), "AttributeError"),
        (lambda f: f.update(masks={}), "expected masks, got none"),
        (lambda f: f.update(hash="0" * 64), "expected the hash of its entries"),
        (lambda f: f["model"].update(hidden_size=1 << 40), "hidden_size is 1099511627776"),
        (lambda f: f["model"].update(hidden_size="32"), "hidden_size is '32'"),
        (lambda f: f["model"].update(more=1), "the model's shape has the keys"),
        (lambda f: f["model"].update(num_query_groups=3), "num_attention_heads: expected a multiple"),
        (
            lambda f: f["model"].update(ffn_hidden_size=40),
            r"linear_fc1\.weight: expected shape \[80, 32\], got \[96, 32\]",
        ),
        (lambda f: f["masks"][FC2].update(shape=[32]), "ValueError"),
        (lambda f: f["masks"][FC2].update(shape=[32, -48]), "the mask of .*: expected shape .*, got"),
        (lambda f: f["masks"][FC2].update(shape=[32.0, 48]), "an entry has other types"),
        (lambda f: f["masks"][FC2].update(removed=True), "an entry has other types"),
        (lambda f: f["masks"][FC2].update(removed=767), "767 of 1536 weights removed"),
        (lambda f: f["masks"][FC2].update(pattern="unstructured", removed=-1), "-1 of 1536 weights removed"),
        (lambda f: f["masks"][FC2].update(pattern="2:5"), "expected a pattern that divides its 48 inputs, got 2:5"),
        (lambda f: f["masks"][FC2].update(pattern="any"), "expected .*, got any"),
        (lambda f: f["masks"][FC2].update(code="x"), "an entry has the keys"),
        (lambda f: f["masks"].update({"../../x": f["masks"].pop(FC2)}), "expected masks of the model's linears"),
        (lambda f: f["masks"].update({FC2.replace("1", "4"): f["masks"].pop(FC2)}), "linears, got one of .*layers.4"),
        (lambda f: f["masks"].update({FC2.replace("1", "01"): f["masks"].pop(FC2)}), "linears, got one of .*layers.01"),
        (lambda f: f["masks"].pop(FC2), "in masks.json and in the index, got .* in only one"),
        (lambda f: f["masks"][FC2].update(packed=False), r"expected uint8 \[32, 48\], got torch.uint8 \[32, 6\]"),
    ],
)
def test_a_json_that_contradicts_itself_or_the_index_is_refused(folder, change, message):
    change_json(folder, change)
    with pytest.raises(MasksError, match=message):
        open_masks(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'"x"'])
def test_a_broken_json_is_refused(folder, content):
    (folder / "masks.json").write_bytes(content)
    with pytest.raises(MasksError, match=r"masks\.json is (not valid|damaged)"):
        open_masks(folder)


def test_bits_that_were_changed_on_disk_are_found(tmp_path):
    """One group of one row has another choice: shapes, pattern and counts are right, the hash is not."""
    root = small.write(tmp_path / "made")
    file = root / "masks" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    masks = open_masks(root / "masks")
    place = masks._boxes[FC2][0].piece
    at = masks._files.record(place).offset
    byte = content[at]
    content[at] = byte & 0xF0 | (0b0011 if byte & 0x0F != 0b0011 else 0b1100)
    file.write_bytes(content)
    with pytest.raises(MasksError, match=r"linear_fc2\.weight is damaged: its bits do not match its hash"):
        verify(open_masks(root / "masks"), open_checkpoint(root))
    content[at] = byte | 0x0F
    file.write_bytes(content)
    with pytest.raises(MasksError, match=r"linear_fc2\.weight breaks 2:4: row 0, inputs 0 to 3 are \[1, 1, 1, 1\]"):
        verify(open_masks(root / "masks"), open_checkpoint(root))


def test_a_count_that_is_not_the_bits_is_found(tmp_path):
    root = small.write(tmp_path / "made", "unstructured")

    def change(found):
        found["masks"][FC2]["removed"] += 1
        seal(found)

    change_json(root / "masks", change)
    with pytest.raises(MasksError, match=r"linear_fc2\.weight: expected \d+ removed weights by its entry, got \d+"):
        verify(open_masks(root / "masks"), open_checkpoint(root))


def test_a_byte_that_is_no_bit_is_refused(folder):
    """Masks with one byte per weight: it must be 0 or 1."""
    stored = torch.full((32, 48), 2, dtype=torch.uint8)

    def change(metadata):
        entry = metadata.state_dict_metadata[FC2]
        entry.size = entry.chunks[0].sizes = torch.Size((32, 48))

    replace_metadata(folder, change)
    replace_record(folder, FC2, saved(stored))
    change_json(folder, lambda found: found["masks"][FC2].update(packed=False))
    with pytest.raises(MasksError, match=r"linear_fc2\.weight is damaged: expected the bytes 0 and 1, got 2"):
        open_masks(folder).read(FC2)


def test_copies_are_independent(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    expected = open_masks(folder)
    bits = expected.read(FC2)
    shutil.rmtree(folder)
    assert open_masks(moved).hash == expected.hash and torch.equal(open_masks(moved).read(FC2), bits)
