"""Full disks, as a small tmpfs. A clear error, nothing left behind, the source untouched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.artifacts import refuse_unwritable
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.structured.apply import apply_plan, rewrite
from tests.sparse import small as sparsifying
from tests.structured.test_apply import make
from tests.test_killed import files_of, sparsifying_scratch
from tests.training.small import MODEL, recipe


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk(size)`` mounts a file system of so many bytes; called again, it changes the size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        pages = max(1, size // 4096) * 4096
        again = "remount," if folder.is_mount() else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{again}size={pages}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def works(parent: Path, hf: Path) -> dict[str, Callable[[Path], Any]]:
    """What writes something large to a path."""
    made = make(open_checkpoint(parent), "random", num_layers=3, ffn_hidden_size=100)
    return {
        "import": lambda save: import_hf(hf, save),
        "apply": lambda save: apply_plan(parent, made, save),
        "rewrite": lambda save: rewrite(parent, save, workers=2),
        "export": lambda save: export_hf(parent, save),
    }


def test_a_read_only_disk_is_found_before_the_work(tmp_path: Path, disk: Callable[[int], Path]) -> None:
    folder = disk(1 << 20)
    (folder / "there.json").touch()
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for name in ("there.json", "new.json", "new/new.json"):
        with pytest.raises(UsageError, match="^--output: expected a file .*Read-only .*choose another place"):
            refuse_unwritable("--output", folder / name)
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    for name in ("there.json", "new.json", "new/new.json"):
        refuse_unwritable("--output", folder / name, appended=True)
    assert os.listdir(folder) == ["there.json"]


@pytest.mark.parametrize("verb", ["import", "apply", "rewrite", "export"])
@pytest.mark.parametrize("room", [0.5, 0.99], ids=["half", "nearly"])
def test_it_says_so_and_leaves_nothing(
    tiny_hf: Callable[..., Path], tiny_parent: Path, tmp_path: Path, disk: Callable[[int], Path], verb: str, room: float
) -> None:
    """With half of the room it is refused before the work; with nearly enough the disk fills up at the very end."""
    hf = tiny_hf("llama-gqa", layers=4)
    work = works(tiny_parent, hf)[verb]
    before = files_of(tiny_parent) | files_of(hf)
    work(tmp_path / "whole")
    folder = disk(int(size_of(tmp_path / "whole") * room))
    expected = (
        "GB free, which made needs, got"
        if room == 0.5
        else "GB free, which made needs, got|no space left while writing .*made"
    )
    with pytest.raises(CheckpointError, match=expected):
        work(folder / "made")
    assert os.listdir(folder) == [] and files_of(tiny_parent) | files_of(hf) == before


def test_it_fills_up_in_the_middle(
    tiny_parent: Path, tmp_path: Path, disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the space after it was checked: in this process, and in one of several."""
    from megatron_prune.checkpoint import writer

    monkeypatch.setattr(writer, "check_space", lambda *_: None)
    before = files_of(tiny_parent)
    folder = disk(size_of(tiny_parent) // 2)
    for workers in (1, 2):
        with pytest.raises(CheckpointError, match="no space left while writing .*made.*: nothing was kept"):
            rewrite(tiny_parent, folder / "made", workers=workers)
        assert os.listdir(folder) == []
    assert files_of(tiny_parent) == before
    disk(4 * size_of(tiny_parent))
    assert rewrite(tiny_parent, folder / "made").full_hash() == open_checkpoint(tiny_parent).full_hash()


def test_sparsify_keeps_its_blocks(
    job: Callable[..., Any], tiny_parent: Path, tmp_path: Path, disk: Callable[[int], Path]
) -> None:
    before = files_of(tiny_parent)
    folder = disk(size_of(tiny_parent) // 2)
    argv = sparsifying.flags(tiny_parent, folder / "made", "magnitude", "--ratio", 0.5)
    refused = job(argv)
    assert refused.returncode == 2 and "Traceback" not in refused.output
    assert "GB free, which made needs, got" in refused.output
    assert not (folder / "made").exists() and files_of(tiny_parent) == before
    kept = len(list(sparsifying_scratch(folder / "made").glob("*/done.json")))
    disk(8 * size_of(tiny_parent))
    assert job(argv).ok().output.count("kept from before") == kept
    sparsifying.result(folder / "made")


def test_a_training_run_goes_on_where_its_last_whole_save_is(
    job: Callable[..., Any], tiny_corpus: Path, tmp_path: Path, disk: Callable[[int], Path]
) -> None:
    steps = 4
    whole = tmp_path / "whole"
    argv = ["pretrain", *MODEL, "--save-interval", 1]
    job([*argv, *recipe(tiny_corpus, f"0:{8 * steps}", whole)]).ok()
    folder = disk(int(size_of(whole) * 0.6))
    flags = recipe(tiny_corpus, f"0:{8 * steps}", folder / "made")
    refused = job([*argv, *flags])
    assert refused.returncode == 2 and "no space left while saving to" in refused.output
    saved = open_checkpoint(folder / "made")
    assert 1 <= (saved.iteration or 0) < steps
    assert saved.full_hash() == open_checkpoint(whole / saved.directory.name).full_hash()
    disk(4 * size_of(whole))
    job([*argv, *flags]).ok()
    assert open_checkpoint(folder / "made").full_hash() == open_checkpoint(whole).full_hash()
    shutil.rmtree(folder / "made")


# Limits of the shell: (limit, verb, the one line).
LIMITS = [
    ("ulimit -f 100", "apply", "the limit on the size of files was reached while writing"),
    ("ulimit -f 100", "import", "the limit on the size of files was reached while writing"),
    ("ulimit -f 100", "export", "the limit on the size of files was reached while writing"),
    ("ulimit -f 100", "sparsify", "the limit on the size of files was reached while writing"),
    ("ulimit -f 1000", "pretrain", "the limit on the size of files was reached while saving to"),
    ("ulimit -n 16", "pretrain", "Too many open files; raise the limit of open files"),
    ("ulimit -v 150000", "apply", "Cannot allocate memory; free some memory"),
    ("exec >&-", "apply", "standard output is closed"),
]


@pytest.mark.parametrize(("limit", "verb", "said"), LIMITS, ids=[f"{verb} {limit}" for limit, verb, _ in LIMITS])
def test_a_limit_of_the_shell_is_one_line(
    tiny_hf: Callable[..., Path], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, limit: str, verb: str, said: str
) -> None:
    made, plan = tmp_path / "made", tmp_path / "plan.json"
    make(open_checkpoint(tiny_parent), "random", num_layers=3, ffn_hidden_size=100).write(plan)
    argv = {
        "apply": ["apply", "--load", tiny_parent, "--plan", plan, "--save", made],
        "import": ["convert", "import", "--hf", tiny_hf("llama-gqa", layers=4), "--save", made],
        "export": ["convert", "export", "--load", tiny_parent, "--hf", made],
        "sparsify": sparsifying.flags(tiny_parent, made, "magnitude", "--ratio", 0.5),
        "pretrain": ["pretrain", *MODEL, *recipe(tiny_corpus, "0:8", made)],
    }[verb]
    command = ["bash", "-c", f'{limit}; exec "$@"', "bash", sys.executable, "-m", "megatron_prune", *map(str, argv)]
    environment = {**os.environ, "MEGATRON_PRUNE_VERBOSE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == (0 if ">" in limit else 2) and said in lines[-1], (done.returncode, lines[-20:])
    assert not any("Traceback" in line or "ignored" in line for line in lines) and len(done.stderr.splitlines()) == 1
    assert verb == "pretrain" or made.exists() == (">" in limit)
