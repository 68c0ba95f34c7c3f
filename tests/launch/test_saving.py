"""launch/checkpointing.flags in a real run: it ends with the weights of one without them, and keeps the right saves."""

from __future__ import annotations

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import EXIT_REFUSED
from tests.launch import nodes
from tests.launch.test_files import flags

NEED_A_GPU = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")


def test_a_run_with_these_flags_ends_as_one_without(job, tiny_corpus, tmp_path) -> None:
    plain, save = tmp_path / "plain", tmp_path / "run"
    job(nodes.training(tiny_corpus, plain), nproc=2).ok()
    words = [word for word in flags() if word not in NEED_A_GPU]
    for flag, value in (("--save-interval", "10"), ("--save-retain-interval", "30")):
        words[words.index(flag) + 1] = value
    job([*nodes.training(tiny_corpus, save), *words], nproc=2).ok()
    assert read_json(save / "account.json")["complete"] and nodes.saved(save) == nodes.STEPS
    assert nodes.losses(save) == nodes.losses(plain)
    assert open_checkpoint(save).full_hash() == open_checkpoint(plain).full_hash()
    assert read_json(save / "account.json")["final"] == read_json(plain / "account.json")["final"]
    # Those of steps 10, 20, 40 and 50 were removed once the next was complete.
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000030", "iter_0000060"]


def test_asynchronous_saves_without_a_gpu_are_refused_and_do_not_hang(job, tiny_corpus, tmp_path) -> None:
    refused = job([*nodes.training(tiny_corpus, tmp_path / "run"), *flags()])
    assert refused.returncode == EXIT_REFUSED and "--async-save" in refused.output
