"""Runs with their checkpoints in a store end with the numbers, accounts and masks of the same runs on a disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.engine.launch import start
from megatron_prune.masks import open_masks
from megatron_prune.structured.apply import apply_plan
from megatron_prune.training import learned_file
from tests.training.small import MODEL, any_plan, kill_ranks, layout, recipe, train_and_record
from tests.training.small_masked import ADAM, assert_zero_in_checkpoint, losses, run_function, start_from

STEPS = 6
RANGE = "16:64"
SHORT = "64:88"  # three steps
KILLED = 5  # its loss is known when step 6 is killed, and no save has it
TRACKER = "latest_checkpointed_iteration.txt"
# Fields that differ between two equal runs, and those that name their directory.
OF_THE_ATTEMPT = ("wall_seconds", "attempts", "replayed", "tokens_computed", "flops_replayed", "arguments", "initial")


def account(folder: Path) -> dict:
    said = {key: value for key, value in read_json(folder / "account.json").items() if key not in OF_THE_ATTEMPT}
    for stage in said["lineage"]:
        del stage["run"]  # where it was
    return said


@pytest.fixture(scope="module")
def reference(tiny_corpus, tmp_path_factory, job):
    """The run on a disk, never interrupted, that saves every other step."""
    save = tmp_path_factory.mktemp("reference") / "run"
    job(["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, save), "--save-interval", "2"]).ok()
    return save


def kill(argv: list, folder: Path, nproc: int) -> None:
    """Run ``argv`` until it kills itself in step 6."""
    words = [str(word) for word in argv]
    code, output = run_function(train_and_record, folder, nproc, words, str(folder), STEPS)
    assert code != 0 and "Traceback" not in output, output[-4000:]


@pytest.mark.parametrize("store", ["disk", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_killed_and_resumed_it_is_the_run_on_a_disk(reference, tiny_corpus, store, tmp_path, job):
    argv = [*MODEL, *recipe(tiny_corpus, RANGE, store("run"), "--save-interval", "2"), "--enable-msc"]
    kill(argv, tmp_path / "records", 1)
    run = store.path("run")
    assert not read_json(run / "account.json")["complete"] and (run / TRACKER).read_text() == "4"
    # Trackers can be lost, and a save that was killed half-way must not count.
    (run / TRACKER).write_bytes(b"")
    store.put(store.fetch("run/iter_0000004", tmp_path / "half"), "run/iter_0000005")
    next(file for file in (run / "iter_0000005").iterdir() if file.name.endswith(".distcp")).write_bytes(b"half")
    job(["pretrain", *argv]).ok()

    found = store.fetch("run", tmp_path / "found")
    assert (found / "losses.csv").read_bytes() == (reference / "losses.csv").read_bytes()
    assert account(found) == account(reference) and account(found)["complete"]
    resumed = read_json(found / "account.json")
    assert len(resumed["attempts"]) == 2
    assert resumed["replayed"] in ([], [[KILLED, KILLED]])  # the table is written as often as the store is fast
    assert open_checkpoint(run).full_hash() == open_checkpoint(reference).full_hash()
    # The files are those that Megatron writes on a disk, where it can continue from them.
    assert open_checkpoint(found).full_hash() == open_checkpoint(reference).full_hash()
    again = job(["pretrain", *argv]).ok()
    assert "the run is complete at step 6" in again.output
    assert not (Path.cwd() / "msc:").exists()


@pytest.mark.parametrize("shown", [".metadata", pytest.param("metadata.json", marks=pytest.mark.slow)])
def test_killed_during_a_save_nothing_half_written_is_taken(reference, tiny_corpus, disk, tmp_path, job, shown):
    """SIGKILL once part of the second save appears; two ranks, so that one can be ahead of the other."""
    argv = ["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, disk("run"), "--save-interval", "2"), "--enable-msc"]
    with start(argv, nproc=2, log=tmp_path / "log.txt") as running:
        while not (disk.path("run/iter_0000004") / shown).exists():
            assert running.returncode is None
        kill_ranks(running)
        assert running.wait(60) != 0
    assert not read_json(disk.path("run/account.json"))["complete"]
    job(argv, nproc=2).ok()
    found = disk.fetch("run", tmp_path / "found")
    np.testing.assert_allclose(losses(found), losses(reference), rtol=2e-5)
    assert account(found)["complete"] and len(losses(found)) == STEPS


def test_ranks_share_a_store_and_another_layout_goes_on(reference, tiny_corpus, s3, tmp_path, job):
    argv = [*MODEL, *recipe(tiny_corpus, RANGE, s3("run"), "--save-interval", "2"), "--enable-msc"]
    # `reshard-optimizer` reads disks only.
    argv += ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", "--verify-integrity"]
    kill([*argv, *layout()], tmp_path / "records", 2)
    job(["pretrain", *argv, *layout(2)], nproc=2).ok()
    found = s3.fetch("run", tmp_path / "found")
    np.testing.assert_allclose(losses(found), losses(reference), rtol=2e-5)
    assert account(found)["complete"]
    open_checkpoint(s3("run")).verify(hashes=True)


@pytest.mark.slow
def test_a_pruned_start_from_a_store(tiny_parent, tiny_corpus, s3, tmp_path, job):
    """``--pretrained-checkpoint`` there and ``--save`` here, the other way round, and both there."""
    local = tmp_path / "pruned"
    apply_plan(tiny_parent, any_plan(open_checkpoint(tiny_parent)), local)
    there = s3.put(local, "pruned")

    def run(start: object, save: object, *more: str) -> None:
        words = ["--pretrained-checkpoint", start, *recipe(tiny_corpus, SHORT, save, *more)]
        job(["pretrain", *words]).ok()

    run(local, tmp_path / "reference")
    run(there, tmp_path / "here", "--enable-msc")
    run(local, s3("there"), "--enable-msc")
    run(there, s3("both"), "--enable-msc")
    expected = tmp_path / "reference"
    for found in (tmp_path / "here", s3.fetch("there", tmp_path / "there"), s3.fetch("both", tmp_path / "both")):
        assert (found / "losses.csv").read_bytes() == (expected / "losses.csv").read_bytes(), found
        assert account(found) == account(expected) and account(found)["start"] == "pruned"
        initial = read_json(found / "account.json")["initial"]
        assert initial["fingerprint"] == open_checkpoint(local).fingerprint() and initial["pruning"]
        assert open_checkpoint(found).full_hash() == open_checkpoint(expected).full_hash()
        names = {file.name for file in (local / "huggingface").iterdir()}
        assert names == {file.name for file in (found / "huggingface").iterdir()} and names
    seen = job(["pretrain", "--pretrained-checkpoint", s3("both"), "--enable-msc",
                *recipe(tiny_corpus, SHORT, tmp_path / "x")])  # fmt: skip
    assert seen.returncode == 2 and "both would see 64:88" in seen.output


def test_masks_go_along_and_are_found_again(tiny_pruned, tiny_corpus, disk, tmp_path, job):
    pruned = tiny_pruned("2:4")
    there = disk.put(pruned.path, "pruned")
    words = recipe(tiny_corpus, "64:112", tmp_path / "reference", "--save-interval", "3")
    job(["pretrain", *start_from(pruned, *words)]).ok()

    words = recipe(tiny_corpus, "64:112", disk("run"), "--save-interval", "3")
    argv = ["pretrain", "--pretrained-checkpoint", there, *words, "--enable-msc"]
    # After a kill during the upload of masks the run has not begun, and they are uploaded again.
    first = next(file for file in pruned.masks.iterdir() if file.name.endswith(".distcp"))
    (disk.path("run/masks") / first.name).write_bytes(b"half")
    job([*argv, "--masks", f"{there}/masks", "--exit-interval", "3"]).ok()
    assert open_masks(disk("run/masks")).hash == open_masks(pruned.masks).hash
    job(argv).ok()  # it finds its masks
    found = disk.fetch("run", tmp_path / "found")
    assert account(found) == account(tmp_path / "reference") and account(found)["masks"]
    assert (found / "losses.csv").read_bytes() == (tmp_path / "reference" / "losses.csv").read_bytes()
    assert_zero_in_checkpoint(found / "iter_0000006", pruned.kept, moments=ADAM)

    (disk.path("run/masks") / "masks.json").unlink()
    refused = job(argv)
    assert refused.returncode == 2 and "masks.json" in refused.output and "Traceback" not in refused.output


@pytest.mark.slow
def test_random_masks_are_written_by_all_ranks(tiny_pruned, tiny_corpus, s3, tmp_path, job):
    pruned = tiny_pruned("unstructured")
    hashes = []
    for save, more in ((tmp_path / "here", []), (s3("there"), ["--enable-msc"])):
        job(["pretrain", "--shape-from", pruned.path, "--masks", pruned.masks, "--random-masks", "5", *layout(2),
             *recipe(tiny_corpus, SHORT, save, *more)], nproc=2).ok()  # fmt: skip
        hashes.append(open_masks(f"{save}/masks").hash)
    assert hashes[0] == hashes[1] != open_masks(pruned.masks).hash


@pytest.mark.slow
def test_masks_are_learned_in_a_store(tiny_parent, tiny_corpus, s3, tmp_path, job):
    """Stopped and resumed from the shards there, on two ranks: the masks of the run on a disk."""
    words = ["--use-checkpoint-args", "--pretrained-checkpoint", tiny_parent, "--target-hidden-size", 64,
             "--target-ffn-hidden-size", 96, "--divisible-by", 4, "--save-interval", 3, *layout(2)]  # fmt: skip
    here = tmp_path / "here"
    job(["learn-masks", *recipe(tiny_corpus, RANGE, here), *words], nproc=2).ok()
    argv = ["learn-masks", *recipe(tiny_corpus, RANGE, s3("run")), *words, "--enable-msc"]
    job([*argv, "--exit-interval", "3"], nproc=2).ok()
    job(argv, nproc=2).ok()
    learned, found = (learned_file.read(run / learned_file.FILE) for run in (here, s3.path("run")))
    for kind, values in learned.state.log_alpha.items():
        assert torch.equal(found.state.log_alpha[kind], values) and len(values.unique()) > 10
    assert not (Path.cwd() / "msc:").exists()


def test_hostile_checkpoints_there_start_nothing(reference, tiny_corpus, disk, tmp_path, job):
    broken = tmp_path / "broken"
    shutil.copytree(reference, broken)
    shard = max(broken.glob("iter_*6/*.distcp"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    (broken / TRACKER).write_text("../../etc")
    for old in ("iter_0000002", "iter_0000004"):
        shutil.rmtree(broken / old)
    argv = ["pretrain", "--pretrained-checkpoint", disk.put(broken, "broken"), "--enable-msc",
            *recipe(tiny_corpus, RANGE, tmp_path / "x")]  # fmt: skip
    refused = job(argv)
    assert refused.returncode == 2 and "Traceback" not in refused.output, refused.output[-3000:]
    assert "msc://disk" in refused.output and not (tmp_path / "x").exists()


def test_a_store_that_does_not_answer_starts_nothing(configured, tiny_corpus, job):
    refused = job(["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, "msc://silent/run"), "--enable-msc"])
    assert refused.returncode == 5 and "Traceback" not in refused.output, refused.output[-3000:]
    assert "msc://silent/run" in refused.output
