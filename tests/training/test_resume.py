"""``--save`` decides whether a run continues, begins, or is refused."""

import json
import os
import shutil

import pytest

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.training.account import show_difference
from tests.training.small import MODEL, recipe

RANGE = "16:64"


def _without_load(words):
    at = words.index("--load")
    return [*words[:at], *words[at + 2 :]]


def _run(corpus, save, *more, samples=RANGE):
    return ["pretrain", *MODEL, *_without_load(recipe(corpus, samples, save)), "--save-interval", "2", *map(str, more)]


@pytest.fixture(scope="module")
def whole(tiny_corpus, tmp_path_factory, job):
    """A run that was never interrupted, with saves at steps 2, 4 and 6."""
    save = tmp_path_factory.mktemp("whole") / "run"
    job(_run(tiny_corpus, save)).ok()
    return save


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run, killed in step 5."""
    save = tmp_path / "run"
    shutil.copytree(whole, save)
    shutil.rmtree(save / "iter_0000006")
    (save / "latest_checkpointed_iteration.txt").write_text("4")
    lines = (save / "losses.csv").read_text().splitlines(keepends=True)
    (save / "losses.csv").write_text("".join(lines[:6]))
    account = read_json(save / "account.json")
    account.update(complete=False, final=None)
    del account["attempts"][-1]["seconds"]
    (save / "account.json").write_text(json.dumps(account))
    return save


def test_a_run_that_is_started_again_continues_from_its_save(whole, stopped, tiny_corpus, job):
    job(_run(tiny_corpus, stopped)).ok()
    assert (stopped / "losses.csv").read_text() == (whole / "losses.csv").read_text()
    account = read_json(stopped / "account.json")
    assert account["complete"] and [attempt["from_step"] for attempt in account["attempts"]] == [1, 5]


def test_another_run_in_save_is_refused(whole, tiny_corpus, tiny_parent, tmp_path, job):
    before = (whole / "account.json").read_bytes()
    plain = tmp_path / "plain"  # a checkpoint that no run of ours wrote
    shutil.copytree(whole, plain)
    (plain / "account.json").unlink()
    for save, more, says in (
        (whole, ["--seed", 8], "a run with seed 7"),
        (whole, ["--stream-range", "16:72"], "a run with range [16, 64]"),
        (whole, ["--ffn-hidden-size", 64], "--ffn-hidden-size: expected 96"),
        (whole, ["--pretrained-checkpoint", tiny_parent], "that run began with random weights"),
        (whole, ["--finetune"], "a run that began without it"),
        (whole, ["--no-load-optim"], "a run that began without it"),
        *(
            (whole, flags.split(), f"{flags.split()[0]}: expected")
            for flags in (
                "--adam-beta2 0.9",
                "--clip-grad 0",
                "--lr 2e-2",
                "--lr-decay-style linear",
                "--weight-decay 0",
                "--optimizer sgd",
                "--bf16",
                "--lr-warmup-fraction 0.2",
                "--hidden-dropout 0.1",
            )
        ),
        (plain, [], "no account.json"),
        (plain, ["--finetune", "--load", plain], "write over the checkpoint that it begins with"),
        (whole, ["--start-over", tiny_parent / "release"], "a path that does not exist yet"),
        (whole, ["--start-over", whole / "old"], "a path outside"),
        (tmp_path / "none", ["--start-over", tmp_path / "old"], "holds no run to move"),
    ):
        refused = job(_run(tiny_corpus, save, *more))
        assert refused.returncode == 2 and says in refused.output, (more, refused.output[-2000:])
        assert "Traceback" not in refused.output
    assert before == (whole / "account.json").read_bytes()


def test_moved_data_and_a_moved_run_continue_and_changes_are_kept(whole, stopped, tiny_corpus, tmp_path, job):
    moved, data = tmp_path / "moved", tmp_path / "data"
    os.rename(stopped, moved)
    data.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tiny_corpus}{suffix}", data / f"text{suffix}")
    job(_run(data / "text", moved, "--micro-batch-size", 1)).ok()
    losses = [[float(line.split(",")[2]) for line in (run / "losses.csv").read_text().splitlines()[1:]]
              for run in (whole, moved)]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    account = read_json(moved / "account.json")
    changed = account["attempts"][1]["changed"]
    assert changed == {
        "micro_batch_size": 1, "eval_micro_batch_size": 1, "train_data_path": [str(data / "text")], "save": str(moved),
    }  # fmt: skip
    assert account["arguments"] == read_json(whole / "account.json")["arguments"]


def test_a_difference_is_shown_where_it_is():
    one, other = ({"id": "a", "path": "/very/long" * 20 + end} for end in ("/x", "/y"))
    found = show_difference(one, other)
    assert found[0].endswith("/x'}") and found[1].endswith("/y'}") and len(found[0]) < 70


def test_start_over_moves_the_old_run_once(whole, stopped, tiny_corpus, tmp_path, job):
    again = _run(tiny_corpus, stopped, "--seed", 8, "--start-over", tmp_path / "old")
    job(again, nproc=2).ok()
    assert find_iteration(tmp_path / "old").iteration == 4
    account = read_json(stopped / "account.json")
    assert account["complete"] and account["seed"] == 8 and account["attempts"][0]["from_step"] == 1
    assert "nothing to do" in job(again).ok().output  # a requeue does not begin a third time


@pytest.mark.parametrize("start", ["--finetune", "--pretrained-checkpoint"])
def test_a_start_happens_once(start, whole, tiny_corpus, tmp_path, job):
    """``--finetune --load P`` begins with P's weights at step 0; started again, it goes on from its own save."""
    save = tmp_path / "run"
    flags = ["--finetune", "--load", whole] if start == "--finetune" else [start, whole]
    argv = _run(tiny_corpus, save, *flags, samples="64:96")
    job([*argv, "--exit-interval", 2]).ok()
    assert find_iteration(save).iteration == 2
    job(argv).ok()
    account = read_json(save / "account.json")
    assert account["complete"] and account["replayed"] == [] and account["start"] == "continued"
    assert [attempt["from_step"] for attempt in account["attempts"]] == [1, 3]
    assert account["initial"]["path"] == str(whole)


def test_no_run_writes_into_its_start(whole, tiny_corpus, tiny_parent, tmp_path, job):
    """Also through a link, and where a folder of one save is named."""
    parent, link = tmp_path / "parent", tmp_path / "link"
    shutil.copytree(tiny_parent, parent)
    os.symlink(parent, link)
    for flags, save in (
        (["--pretrained-checkpoint", parent], parent),
        (["--pretrained-checkpoint", parent / "release"], link),
        (["--load", link], parent),
        (["--pretrained-checkpoint", parent], parent / "release"),
    ):
        words = _without_load(recipe(tiny_corpus, RANGE, save))
        refused = job(["pretrain", *flags, *words])
        assert refused.returncode == 2 and "--save: expected" in refused.output, (flags, refused.output[-2000:])
        assert find_iteration(parent).release
