"""Which iteration counts: correct, empty, broken and wrong tracker files."""

from __future__ import annotations

import os
import shutil

import pytest

from megatron_prune.artifacts import refuse_unwritable
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import TRACKER_FILE, find_iteration, is_complete, repair_tracker
from megatron_prune.errors import CheckpointError, UsageError
from tests.checkpoint import small


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("whole") / "checkpoint") / "release"


@pytest.fixture
def root(tmp_path, whole):
    """Iterations 10 and 20 are whole, 30 lacks the end of a file, 40 was never finished."""
    for iteration in (10, 20, 30, 40):
        shutil.copytree(whole, tmp_path / f"iter_{iteration:07d}")
    os.truncate(tmp_path / "iter_0000030" / "__0_0.distcp", 1000)
    (tmp_path / "iter_0000040" / "metadata.json").unlink()
    return tmp_path


def tracker(root, text=None):
    if text is not None:
        (root / TRACKER_FILE).write_text(text)
    return (root / TRACKER_FILE).read_text() if (root / TRACKER_FILE).exists() else None


def test_complete_means_whole_and_finished(root):
    assert [is_complete(root / f"iter_{i:07d}") for i in (10, 20, 30, 40, 50)] == [True, True, False, False, False]


@pytest.mark.parametrize("text", ["20", "10", "20\n"])
def test_a_sound_tracker_is_kept(root, text):
    tracker(root, text)
    assert repair_tracker(root) == root / f"iter_{int(text):07d}"
    assert tracker(root) == text
    assert open_checkpoint(root).iteration == int(text)


@pytest.mark.parametrize("text", [None, "", "garbage", "30", "40", "50", "-1", "٣"])
def test_a_broken_tracker_is_pointed_to_the_newest_whole_iteration(root, text):
    tracker(root, text)
    assert repair_tracker(root) == root / "iter_0000020"
    assert tracker(root) == "20"


@pytest.mark.parametrize("text", [None, "", "garbage"])
def test_readers_find_it_without_writing(root, text):
    tracker(root, text)
    assert find_iteration(root).directory == root / "iter_0000020"
    assert open_checkpoint(root).iteration == 20
    assert tracker(root) == text


def test_a_tracker_that_names_what_is_not_there_is_refused_by_readers(root):
    tracker(root, "50")
    with pytest.raises(CheckpointError, match="iter_0000050, which does not exist"):
        find_iteration(root)


def test_a_release_is_found_when_it_is_all_there_is(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "release")
    assert repair_tracker(tmp_path) == tmp_path / "release"
    assert tracker(tmp_path) == "release"
    assert open_checkpoint(tmp_path).release


def test_an_empty_tracker_of_a_run_that_saved_nothing_goes(tmp_path):
    tracker(tmp_path, "")
    assert repair_tracker(tmp_path) is None
    assert tracker(tmp_path) is None
    assert repair_tracker(tmp_path / "never made") is None


@pytest.mark.parametrize("text", ["30", "50"])
def test_losing_the_only_checkpoint_is_an_error_not_a_new_start(tmp_path, whole, text):
    shutil.copytree(whole, tmp_path / "iter_0000030")
    os.truncate(tmp_path / "iter_0000030" / "__0_0.distcp", 1000)
    tracker(tmp_path, text)
    with pytest.raises(CheckpointError, match="no other complete checkpoint"):
        repair_tracker(tmp_path)
    assert tracker(tmp_path) == text


def test_an_iteration_can_be_named(root):
    tracker(root, "20")
    assert open_checkpoint(root / "iter_0000010").iteration == 10


@pytest.mark.parametrize("name", ["iter_0000050", "release", "iter_0000010/new"])
def test_no_output_is_a_save_of_another_checkpoint(root, tmp_path_factory, name):
    """Also through a link. A folder with a name of its own is no save."""
    link = tmp_path_factory.mktemp("link") / "link"
    link.symlink_to(root)
    before = sorted(root.rglob("*"))
    for where in (root, link):
        with pytest.raises(UsageError, match="--save: expected a new directory outside checkpoints"):
            small.write(where / name)
    assert sorted(root.rglob("*")) == before
    small.write(root / "pruned")


def test_no_output_is_a_file_of_a_checkpoint(root):
    tracker(root, "20")
    for name in (TRACKER_FILE, "iter_0000010/metadata.json"):
        with pytest.raises(UsageError, match="--output: expected a new file.*part of a checkpoint"):
            refuse_unwritable("--output", root / name)
    refuse_unwritable("--output", root / "scores.json")
