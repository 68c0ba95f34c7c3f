"""A model that was pruned or trained with masks is not loaded without them, unless a flag says so."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from megatron_prune.api.checkpoints import benchmark, export_hf
from megatron_prune.checkpoint.reader import PRUNING_FILE, open_checkpoint
from megatron_prune.errors import MasksError
from megatron_prune.masks import missing_masks, open_masks, require_masks
from megatron_prune.structured.apply import apply_plan, rewrite
from megatron_prune.training.masked import refuse_zeros_that_fill
from tests.structured.test_apply import make

ACCOUNT = "account.json"


def record(root, origin, hash_):
    """Write what names the masks of the checkpoint: as sparsify does, a cut after it, a masked or a dense run."""
    entry = {"parent": {"fingerprint": "0"}, "method": "wanda", "source": {}, "tokens": 0, "flops": 0}
    chain = {"pruned": [{**entry, "masks": hash_, "lineage": []}],
             "cut": [{"lineage": [{"kind": "pruned", "masks": hash_}]}],
             "filled": [{"lineage": [{"kind": "pruned", "masks": hash_}, {"kind": "trained", "masks": None}]}],
             "imported": []}  # fmt: skip
    if origin in chain:
        path = root / "release" / PRUNING_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chain": chain[origin]}))
    else:
        (root / ACCOUNT).write_text(json.dumps({"masks": hash_ if origin == "trained" else None}))
    return root


@pytest.fixture
def lost(sparse, tmp_path):
    """``lost(origin)``: the checkpoint without its masks, and their hash."""

    def get(origin):
        root = shutil.copytree(sparse("2:4")[0], tmp_path / origin)
        found = open_masks(root / "masks").hash
        shutil.rmtree(root / "masks")
        return record(root, origin, found), found

    return get


@pytest.mark.parametrize("origin", ["pruned", "cut", "trained", "filled", "dense", "imported"])
def test_masks_are_required_where_the_account_or_the_pruning_names_them(lost, origin):
    root, recorded = lost(origin)
    checkpoint, sparse = open_checkpoint(root), origin in ("pruned", "cut", "trained")
    assert missing_masks(checkpoint) == (recorded if sparse else None)
    assert require_masks(checkpoint, allow_missing=True) is None
    if sparse:
        with pytest.raises(MasksError, match=rf"expected the masks {recorded}.*got none.*--allow-missing-masks"):
            require_masks(checkpoint)
    else:
        assert require_masks(checkpoint) is None


def test_masks_of_another_pruning_are_refused_by_their_hash(sparse, lost):
    for origin in ("pruned", "trained", "cut"):
        root, recorded = lost(origin)
        shutil.copytree(sparse("unstructured")[0] / "masks", root / "masks")
        if origin == "cut":  # whose hash is nowhere
            assert require_masks(open_checkpoint(root)) is not None
            continue
        with pytest.raises(MasksError, match=f"expected the masks {recorded}.*of another pruning"):
            require_masks(open_checkpoint(root))


def start_dense(root, _, *, allow_missing_masks=False):
    """The check of ``pretrain --pretrained-checkpoint``."""
    flags = {"let_zeros_fill": False, "allow_missing_masks": allow_missing_masks}
    refuse_zeros_that_fill(SimpleNamespace(load=None, pretrained_checkpoint=str(root), **flags))


def cut(root, out, **flags):
    made = make(open_checkpoint(root), "shortgpt", num_layers=1)
    apply_plan(root, made, out, **flags)
    if flags:
        assert open_checkpoint(out).pruning[-1]["missing_masks"]
        assert require_masks(open_checkpoint(out)) is None  # says it once


def measure(root, out, **flags):
    benchmark(root, static=True, **flags)


@pytest.mark.parametrize("verb", [start_dense, cut, export_hf, rewrite, measure], ids=lambda verb: verb.__name__)
def test_no_verb_takes_a_sparse_model_for_a_dense_one(lost, tmp_path, verb):
    root, _ = lost("pruned")
    with pytest.raises(MasksError, match="--allow-missing-masks"):
        verb(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    verb(root, tmp_path / "out", allow_missing_masks=True)
