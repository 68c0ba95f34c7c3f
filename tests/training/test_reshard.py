"""Optimizer states in flat buckets, split off-line, equal the tensors of Megatron's own gathered form.

tests/training/test_pretrain.py resumes from them at other layouts.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.record import RecordFiles
from megatron_prune.checkpoint.reshard import BUCKETS, WHOLE, reshard
from megatron_prune.errors import CheckpointError
from tests.conftest import ROOT
from tests.training.small import MODEL, layout, recipe
from tests.training.small_masked import stored

GATHERED = "--dist-ckpt-optim-fully-reshardable"
TIED = [word for word in MODEL if word != "--untie-embeddings-and-output-weights"]


def trained(job, corpus: Path, save: Path, nproc: int, model: list[str], *more: str) -> Path:
    """The save after two steps."""
    words = recipe(corpus, "0:48", save, "--use-distributed-optimizer", "--exit-interval", 2, *more)
    job(["pretrain", *model, *words], nproc=nproc).ok()
    return save / "iter_0000002"


@pytest.fixture(scope="module")
def two(job, tiny_corpus, tmp_path_factory) -> tuple[Path, Path]:
    """The same steps at TP2 DP2, saved in buckets and gathered."""
    folder = tmp_path_factory.mktemp("tp2dp2")
    flags = [*layout(2), "--bf16"]
    return (
        trained(job, tiny_corpus, folder / "buckets", 4, MODEL, *flags),
        trained(job, tiny_corpus, folder / "gathered", 4, MODEL, *flags, GATHERED),
    )


def same(one: Path, other: Path) -> bool:
    a, b = stored(one), stored(other)
    assert a.keys() == b.keys() and sum(key.startswith("optimizer.state.") for key in a) >= 20
    return all(torch.equal(a[key], b[key]) for key in a)


def copied(save: Path, folder: Path) -> Path:
    return Path(shutil.copytree(save.parent, folder / "run")) / save.name


def test_every_number_is_that_of_megatrons_own_form(two, tmp_path) -> None:
    save, gathered = copied(two[0], tmp_path), two[1]
    assert open_checkpoint(save).optimizer_form == BUCKETS
    done = subprocess.run(
        [sys.executable, "-m", "megatron_prune", "reshard-optimizer", save.parent],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{save.parent} loads at every layout now (iter_0000002)\n"
    assert open_checkpoint(save).optimizer_form == WHOLE
    assert same(save, gathered)
    assert reshard(save.parent) is None


def test_tied_embeddings_of_two_stages(job, tiny_corpus, tmp_path) -> None:
    """The last stage's copy has its own state, which is not saved."""
    save = trained(job, tiny_corpus, tmp_path / "buckets", 2, TIED, *layout(1, 2))
    gathered = trained(job, tiny_corpus, tmp_path / "gathered", 2, TIED, *layout(1, 2), GATHERED)
    reshard(save)
    assert same(save, gathered)


def test_killed_it_leaves_the_save_as_it_was(two, tmp_path) -> None:
    save = copied(two[0], tmp_path)
    before = {path.name: path.read_bytes() for path in save.iterdir()}
    dying = (
        "import os, signal, sys\n"
        "from megatron_prune.checkpoint import record, reshard\n"
        "append, seen = record.RecordFiles.append, []\n"
        "def die(self, *rest):\n"
        "    seen.append(0)\n"
        "    if len(seen) == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return append(self, *rest)\n"
        "record.RecordFiles.append = die\n"
        "reshard.reshard(sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", dying, save], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in save.iterdir()} - before.keys()
    assert left == {"__resharded_0.distcp"}
    assert all((save / name).read_bytes() == payload for name, payload in before.items())
    reshard(save)
    assert same(save, two[1])


def test_a_full_disk_leaves_the_save_as_it_was(two, tmp_path, monkeypatch) -> None:
    import errno

    save = copied(two[0], tmp_path)
    index = (save / ".metadata").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(RecordFiles, "close", full)
        with pytest.raises(CheckpointError, match="no space left.*the save is as it was"):
            reshard(save)
    assert (save / ".metadata").read_bytes() == index and open_checkpoint(save).optimizer_form == BUCKETS


def test_records_are_of_bounded_size(two, tmp_path, monkeypatch) -> None:
    from megatron_prune.checkpoint import reshard as module

    save = copied(two[0], tmp_path)
    monkeypatch.setattr(module, "RECORD_BYTES", 1024)
    reshard(save)
    pieces = [p for key, t in open_checkpoint(save).stored.items() if key.startswith("optimizer.") for p in t.pieces]
    assert max(torch.Size(piece.sizes).numel() * 4 for piece in pieces) <= 1024
    assert same(save, two[1])


def test_another_layout_is_refused_before_the_model_is_built(two, job, tiny_corpus, tmp_path) -> None:
    save = copied(two[0], tmp_path).parent
    words = recipe(tiny_corpus, "0:48", save, "--use-distributed-optimizer", "--bf16")
    refused = job(["pretrain", *MODEL, *words])
    assert refused.returncode == 2 and "Traceback" not in refused.output
    (line,) = [line for line in refused.output.splitlines() if "--tensor-model-parallel-size" in line]
    assert f"megatron-prune reshard-optimizer {save}" in line and "expected 2, 1" in line and "got 1, 1" in line


def test_what_holds_no_buckets_is_refused(tiny_parent) -> None:
    with pytest.raises(CheckpointError, match="expected an optimizer state in the form dp_reshardable, got another"):
        reshard(tiny_parent)
