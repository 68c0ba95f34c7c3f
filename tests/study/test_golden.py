"""The command lines of the studies in examples/ are those that were reviewed."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.study import golden


@pytest.mark.parametrize("name", golden.STUDIES)
def test_every_command_is_the_one_that_was_reviewed(name):
    assert golden.text(name).splitlines() == golden.file(name).read_text().splitlines(), (
        "if the change is meant: python -m tests.study.golden, and read the diff"
    )


@pytest.mark.parametrize("name", ["quickstart/seeds", "llama3.1_8b/imported"])
def test_no_command_says_a_flag_twice(name):
    """The last one would count, and nobody would see which."""
    for commands in golden.commands(name).values():
        for command in commands:
            own = command.argv[: command.argv.index("--pretrain")] if "--pretrain" in command.argv else command.argv
            times = Counter(word for word in own if word.startswith("--"))
            assert max(times.values()) == 1, (command.stage, times.most_common(1))


def test_every_study_of_the_examples_is_here():
    found = {str(path.relative_to(golden.EXAMPLES).with_suffix("")) for path in golden.EXAMPLES.glob("*/*.yaml")}
    assert found - {"llama3.1_8b/layouts"} == set(golden.STUDIES)  # layouts.yaml is launch.py's tables
    assert {path.name for path in golden.FILES.iterdir()} == {golden.file(name).name for name in golden.STUDIES}
