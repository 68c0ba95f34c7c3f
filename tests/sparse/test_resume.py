"""``sparsify`` killed with SIGKILL at any point and started again: equal to an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.engine.launch import start_function
from megatron_prune.masks import open_masks
from tests.distributed_work import FunctionCall
from tests.sparse import ranks, small


def kill(folder: Path, argv: list[Any], nproc: int, where: str) -> str:
    """Run until some rank kills itself, or refuses; the output."""
    import pickle

    folder.mkdir(exist_ok=True)
    words = [str(word) for word in argv]
    call = FunctionCall(ranks.__file__, ranks.__name__, "killed", pickle.dumps(((words, where), {})), str(folder))
    log = folder / "log.txt"
    with start_function(call, nproc=nproc, log=log) as running:
        assert running.wait(200) == (2 if where == "full" else -9), log.read_text()[-3000:]
    return log.read_text()


def same(one: Path, other: Path) -> bool:
    a, b = open_checkpoint(one), open_checkpoint(other)
    return (
        open_masks(one / "masks").hash == open_masks(other / "masks").hash
        and all(torch.equal(a.read(name), b.read(name)) for name in a.names)
        and (one / "pruning" / "sparsity.json").read_bytes() == (other / "pruning" / "sparsity.json").read_bytes()
    )


def scratch_of(save: Path) -> Path:
    return save.with_name(f".{save.name}.sparsify")


def finished(save: Path) -> list[str]:
    return sorted(p.parent.name for p in scratch_of(save).glob("*/done.json"))


@pytest.mark.parametrize(("layout", "method"), [("tp1", "sparsegpt"), ("tp2pp2", "wanda"), ("tp1", "magnitude")])
def test_killed_in_a_block(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, layout: str, method: str
) -> None:
    nproc, save = small.LAYOUTS[layout][0], tmp_path / "killed"
    corpus = None if method == "magnitude" else tiny_corpus
    argv = small.flags(tiny_parent, save, method, "--ratio", 0.5, *small.layout(layout), corpus=corpus)
    kill(tmp_path / "kill", argv, nproc, "block 2")
    assert not save.exists()
    assert finished(save) == ["block-0000", "block-0001"]

    assert job(argv, nproc=nproc).ok().output.count("kept from before") == 2
    assert not scratch_of(save).exists()
    whole = tmp_path / "whole"
    job([*argv, "--save", whole], nproc=nproc).ok()
    assert same(save, whole)
    small.result(save)


def test_ranks_that_share_the_blocks_out_are_killed(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    """The first has blocks 0 and 2, the second 1 and 3: what is kept need not be the first blocks."""
    save, whole = tmp_path / "killed", tmp_path / "whole"
    argv = small.flags(tiny_parent, save, "random", "--ratio", 0.5)
    kill(tmp_path / "kill", argv, 2, "block 2")
    kept = finished(save)
    assert not save.exists() and "block-0000" in kept and "block-0002" not in kept
    assert job(argv, nproc=3).ok().output.count("kept from before") == len(kept)
    job([*argv, "--save", whole]).ok()
    assert same(save, whole) and not scratch_of(save).exists()


def test_killed_in_the_writing_of_the_result(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Nothing is calibrated again; an existing result is recognised; other arguments are refused."""
    save = tmp_path / "killed"
    argv = small.flags(tiny_parent, save, "wanda", "--ratio", 0.5, corpus=tiny_corpus)
    kill(tmp_path / "kill", argv, 1, "result")
    assert not save.exists()
    refused = job([*argv, "--ratio", 0.6])
    assert refused.returncode == 2 and "unfinished pruning has another request" in refused.output
    assert str(scratch_of(save)) in refused.output
    kill(tmp_path / "kill", argv, 1, "after")
    assert save.exists() and scratch_of(save).exists()
    finished = job(argv).ok()
    assert "nothing to do" in finished.output and not scratch_of(save).exists()
    refused = job([*argv, "--ratio", 0.6])
    assert refused.returncode == 2 and "--save: expected" in refused.output
    job([*argv, "--save", tmp_path / "whole"]).ok()
    assert same(save, tmp_path / "whole")


def test_goes_on_at_another_layout(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    save, whole = tmp_path / "killed", tmp_path / "whole"
    argv = small.flags(tiny_parent, save, "wanda", "--pattern", "2:4", corpus=tiny_corpus)
    kill(tmp_path / "kill", [*argv, *small.layout("tp2pp2")], 4, "block 2")
    finished = job([*argv, *small.layout("tp3")], nproc=3).ok()
    assert finished.output.count("kept from before") == 2
    job([*argv, "--save", whole]).ok()
    one, other = small.result(save), small.result(whole)
    assert small.agreement(one, other) >= 0.995
    assert all(torch.equal(one[0, matrix][1], other[0, matrix][1]) for matrix in "qkv")


def test_a_disk_that_fills_up_costs_one_block(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    save = tmp_path / "killed"
    argv = small.flags(tiny_parent, save, "random", "--ratio", 0.5)
    printed = kill(tmp_path / "kill", argv, 1, "full")
    assert "no space left while writing" in printed and "block-0002" in printed
    assert "the blocks before it are kept" in printed
    assert job(argv).ok().output.count("kept from before") == 2


def test_a_damaged_part_is_named(job: Callable[..., Any], tiny_parent: Path, tmp_path: Path) -> None:
    save = tmp_path / "killed"
    argv = small.flags(tiny_parent, save, "magnitude", "--ratio", 0.5)
    kill(tmp_path / "kill", argv, 1, "block 2")
    (file,) = (scratch_of(save) / "block-0001" / "weights-0").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    finished = job(argv)
    assert finished.returncode == 2 and f"{file} is missing or truncated: delete" in finished.output
    assert not save.exists()
