"""SIGKILL at random moments of import, apply, sparsify and save: nothing half-written is taken for whole, and reruns
end bit-identical to an undisturbed run.

``KILLS=30 pytest tests/test_killed.py`` sets the number of kills in each, as ``tests/run.sh --all`` does; by default
quickly forked processes are killed four times, whole jobs of Megatron twice. Moments are drawn over the length of an
undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration, is_complete
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.engine.launch import start
from megatron_prune.errors import MegatronPruneError
from megatron_prune.masks import open_masks, verify
from megatron_prune.structured.apply import apply_plan
from tests.sparse import small as sparsifying
from tests.structured.test_apply import make
from tests.training.small import MODEL, kill_ranks, recipe
from tests.waiting import GENEROUS

FORKED = int(os.environ.get("KILLS", 4))
JOBS = int(os.environ.get("KILLS", 2))


def files_of(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {str(path.relative_to(folder)): artifacts.sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def forked(work: Callable[[], Any]) -> int:
    """``work`` in a fork of this process (importing torch again would take most of the time); its process id."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return child


@pytest.mark.parametrize("verb", ["import", "apply"])
def test_import_and_apply(tiny_hf: Callable[..., Path], tmp_path: Path, verb: str) -> None:
    hf = tiny_hf("llama-gqa", layers=8, hidden_size=192, intermediate_size=1536)
    save, parent = tmp_path / "made", tmp_path / "parent"
    import_hf(hf, parent)
    if verb == "import":
        work: Callable[[], Any] = lambda: import_hf(hf, save)  # noqa: E731
    else:
        made = make(open_checkpoint(parent), "random", num_layers=7, ffn_hidden_size=1000)
        work = lambda: apply_plan(parent, made, save)  # noqa: E731
    before = files_of(parent) | files_of(hf)
    began = time.perf_counter()
    os.waitpid(forked(work), 0)
    whole = time.perf_counter() - began
    expected = files_of(save.rename(tmp_path / "expected"))

    draws, killed = random.Random(0), 0
    for _ in range(4 * FORKED):
        if killed == FORKED:
            break
        child = forked(work)
        time.sleep(draws.uniform(0.0, whole))
        os.kill(child, signal.SIGKILL)
        died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        killed += died
        whole *= 1 if died else 0.9  # the machine is less busy than it was
        if save.exists():  # it was faster: then all of it must be there
            open_checkpoint(save).verify(hashes=True)
            assert files_of(save) == expected
            shutil.rmtree(save)
        else:
            with pytest.raises(MegatronPruneError):
                open_checkpoint(save)
    assert killed == FORKED
    work()
    assert files_of(save) == expected and files_of(parent) | files_of(hf) == before
    assert not list(tmp_path.glob(".made*")), "left-overs of killed runs are removed by the next"


class Jobs:
    """Runs of one command line, killed at moments that are drawn over the time that a whole run takes."""

    def __init__(self, argv: list[Any], folder: Path) -> None:
        self.argv, self.log = [str(word) for word in argv], folder / "log.txt"
        self.draws, self.whole, self.killed, self.tries = random.Random(1), 0.0, 0, 0
        with start([self.argv[0], "--help"], nproc=1, log=self.log) as running:  # jobs are forked from then on
            running.wait(GENEROUS)

    def run(self, *more: Any) -> None:
        """To the end."""
        began = time.perf_counter()
        with start([*self.argv, *map(str, more)], nproc=1, log=self.log) as running:
            assert running.wait(GENEROUS) == 0, self.log.read_text()[-3000:]
        self.whole = self.whole or time.perf_counter() - began

    def kill(self) -> bool:
        """Run and kill; False where it had ended before."""
        with start(self.argv, nproc=1, log=self.log) as running:
            with contextlib.suppress(TimeoutError):
                running.wait(self.draws.uniform(0.1 * self.whole, self.whole))
            kill_ranks(running)
            code = running.wait(GENEROUS)
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        self.killed += code != 0
        self.whole *= 1 if code else 0.9  # the machine is less busy than it was, or there was less left to do
        self.tries += 1
        assert self.tries <= 4 * JOBS, "it is too quick to be killed so often"
        return code != 0


def test_sparsify(tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    save, whole = tmp_path / "made", tmp_path / "whole"
    before = files_of(tiny_parent)
    argv = sparsifying.flags(tiny_parent, save, "wanda", "--pattern", "2:4", corpus=tiny_corpus)
    jobs = Jobs(argv, tmp_path)
    jobs.run("--save", whole)
    expected = (open_checkpoint(whole).full_hash(), open_masks(whole / "masks").hash)

    def check() -> None:
        checkpoint, masks = open_checkpoint(save), open_masks(save / "masks")
        checkpoint.verify(hashes=True)
        verify(masks, checkpoint)
        assert (checkpoint.full_hash(), masks.hash) == expected

    while jobs.killed < JOBS:
        jobs.kill()
        if save.exists():
            check()
            shutil.rmtree(save)
            shutil.rmtree(sparsifying_scratch(save), ignore_errors=True)
        else:
            with pytest.raises(MegatronPruneError):
                open_checkpoint(save)
    jobs.run()
    check()
    assert files_of(tiny_parent) == before and not sparsifying_scratch(save).exists()


def sparsifying_scratch(save: Path) -> Path:
    return save.with_name(f".{save.name}.sparsify")


def test_save(tiny_corpus: Path, tmp_path: Path) -> None:
    """A training run that saves at every step; started again, it continues from its newest whole save."""
    save, whole, steps = tmp_path / "made", tmp_path / "whole", 8
    argv = ["pretrain", *MODEL, *recipe(tiny_corpus, f"0:{8 * steps}", save), "--save-interval", 1]
    jobs = Jobs(argv, tmp_path)
    jobs.run("--save", whole, "--load", whole)
    expected = {i: open_checkpoint(whole / f"iter_{i:07d}").full_hash() for i in range(1, steps + 1)}

    while jobs.killed < JOBS:
        if not jobs.kill() or (save / f"iter_{steps:07d}" / "metadata.json").exists():
            shutil.rmtree(save)
            continue
        for folder in save.glob("iter_*"):
            if is_complete(folder):
                assert open_checkpoint(folder).full_hash() == expected[int(folder.name[5:])], folder
        found = find_iteration(save) if save.exists() else None
        assert found is None or found.iteration in expected
    jobs.run()
    assert open_checkpoint(save).iteration == steps
    assert {int(f.name[5:]): open_checkpoint(f).full_hash() for f in save.glob("iter_*") if is_complete(f)} == expected
    assert artifacts.read_json(save / "account.json")["complete"]
