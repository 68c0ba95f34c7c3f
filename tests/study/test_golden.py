"""The command lines of the studies in examples/ are the reviewed ones; seeds and texts are those of the cell."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_prune.errors import DataError
from megatron_prune.study import jobs, outlook, validate
from megatron_prune.study.commands import Command
from megatron_prune.study.prunings import Places
from tests.study import golden, made_up


@pytest.mark.parametrize("name", golden.STUDIES)
def test_every_command_is_the_one_that_was_reviewed(name):
    assert golden.text(name).splitlines() == golden.file(name).read_text().splitlines(), (
        "if the change is meant: python -m tests.study.golden, and read the diff"
    )


@pytest.mark.parametrize("name", ["quickstart/seeds", "llama3.1_8b/imported"])
def test_no_command_says_a_flag_twice(name):
    """Only the last one would count, silently."""
    for commands in golden.commands(name).values():
        for command in commands:
            own = command.argv[: command.argv.index("--pretrain")] if "--pretrain" in command.argv else command.argv
            times = Counter(word for word in own if word.startswith("--"))
            assert max(times.values()) == 1, (command.stage, times.most_common(1))


def test_every_study_of_the_examples_is_here():
    found = {str(path.relative_to(golden.EXAMPLES).with_suffix("")) for path in golden.EXAMPLES.glob("*/*.yaml")}
    # launch.py's tables; what studies include; a study that differs from its include in one flag (test_quickstart.py)
    others = {"llama3.1_8b/layouts", "llama3.1_8b/common", "quickstart/bf16"}
    assert found - others == set(golden.STUDIES)
    assert {path.name for path in golden.FILES.iterdir()} == {golden.file(name).name for name in golden.STUDIES}


def value(command: Command, flag: str) -> str | None:
    return command.argv[command.argv.index(flag) + 1] if flag in command.argv else None


@pytest.fixture(scope="module")
def seeded(tmp_path_factory) -> dict[str, list[Command]]:
    """Every command of a study of random methods, structured and sparse, with three seeds."""
    made = made_up.study(
        made_up.corpora(tmp_path_factory.mktemp("corpora")),
        methods=[
            {"name": "random", "settings": {"axis": "depth"}},
            {"name": "random", "pattern": "unstructured", "label": "sparse-random"},
            {"name": "shortgpt"},
            {"name": "wanda", "pattern": "2:4"},
        ],
        seeds=[1, 2, 3],
    )
    places = Places(Path("RUN"))
    return jobs.all_commands(jobs.all_cells(made, places, outlook.look(made, places)))


def of_seed(commands: dict[str, list[Command]], seed: int, *kinds: str) -> list[Command]:
    return [
        command
        for cell, many in commands.items()
        if f"s{seed}" in cell.split("-") and cell.startswith(kinds)
        for command in many
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_seed_draws_its_own(seeded, seed):
    """Random prunings, calibration windows, the order of data and the weights of a scratch run."""
    prunings = of_seed(seeded, seed, "pruning")
    drawn = [command for command in prunings if value(command, "--method") == "random" or command.stage == "sparsify"]
    assert len(drawn) == 3 and {value(command, "--seed") for command in drawn} == {str(seed)}
    assert {value(command, "--seed") for command in of_seed(seeded, seed, "calibration")} == {str(seed)}
    trained = [command for command in of_seed(seeded, seed, "pruned", "scratch") if command.stage == "pretrain"]
    assert len(trained) >= 8
    for command in trained:
        assert value(command, "--stream-permutation-seed") == value(command, "--seed") == str(seed)


def test_text_is_read_by_the_stage_that_it_is_for(seeded):
    words = {command.stage: set() for many in seeded.values() for command in many}
    for many in seeded.values():
        for command in many:
            text = ("train", "calibration", "validation", "test")
            words[command.stage] |= {
                Path(word).name for word in command.argv if Path(word).name in text and "/" in word
            }
    assert words == {
        "pretrain": {"train"}, "evaluate": {"validation", "test"}, "calibrate": {"calibration"},
        "sparsify": {"calibration"}, "plan": set(), "apply": set(),
    }  # fmt: skip


def test_a_study_may_use_its_stream_up_and_not_one_sample_more(tmp_path):
    """The parent takes 160 samples; a corpus of n tokens has (n - 1) // 16."""
    studies = {}
    for tokens, steps in ((10_500, 62), (11_900, 73)):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        studies[tokens] = made_up.study(
            made_up.corpora(folder, train=tokens), budgets=[steps * 128], settings=["equal-training"]
        )
    assert (10_500 - 1) // 16 == 160 + 62 * 8 and (11_900 - 1) // 16 == 160 + 73 * 8 - 1
    validate.check(studies[10_500], Places(tmp_path / "runs"))
    with pytest.raises(DataError, match="samples 160:744: .* an end of at most 743, "):
        validate.check(studies[11_900], Places(tmp_path / "runs"))


@pytest.mark.parametrize("name", golden.STUDIES)
def test_compared_runs_begin_with_the_same_sample(name: str) -> None:
    """A chain retrains between its links, so its scratch run begins after that, whatever else has its shape."""
    made = golden.grid(name)
    cells = {cell.id: cell for cell in made.cells}
    for one in made.comparisons:
        if one.setting == "equal-training" and one.scratch is not None:
            assert cells[one.pruned].samples.start == cells[one.scratch].samples.start, one
