"""examples/llama3.1_8b/launch.py: every layout will run, as LAYOUTS.md says; runs read the right samples."""

from __future__ import annotations

import pytest

from megatron_prune.errors import UsageError
from tests.llama31.example import EXAMPLE, TABLE, launch
from tests.preflight import commands


@pytest.fixture(scope="module")
def answers(distributed, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("models")
    asked = {
        which: launch.preflight_line(*which, folder / f"{number}.flags")
        for number, which in enumerate(launch.everything())
    }
    [found] = distributed(commands.answers, 1, list(asked.values()))
    return dict(zip(asked, found, strict=True))


def test_every_layout_will_run(answers) -> None:
    for which, answer in answers.items():
        assert answer["verdict"] == "yes", f"{which}: {commands.reasons(answer, 'no')}"
        assert not commands.reasons(answer, "look"), which
    assert {gpus for _, _, gpus in answers} == {"8", "64", "64 pp", "1024"}


def test_the_table_is_what_preflight_says(answers) -> None:
    """`python examples/llama3.1_8b/launch.py --preflight` writes it again."""
    assert (EXAMPLE / "LAYOUTS.md").read_text() == launch.table(answers)


def test_arms_read_the_samples_that_make_them_comparable() -> None:
    def samples(name: str) -> tuple[int, int]:
        words = launch.run("width-50", name)
        start, end = words[words.index("--stream-range") + 1].split(":")
        return int(start), int(end)

    parent = launch.run("parent", "P200")
    assert parent[parent.index("--stream-range") + 1] == "0:25600000"
    assert samples("R50") == samples("S50") == (25_600_000, 32_000_000)
    assert samples("S200+50") == (0, 32_000_000)
    assert samples("R500")[1] * 8192 < 750e9
    assert "--shape-from" in launch.run("width-50", "S50") and "--pretrained-checkpoint" in launch.run(
        "width-50", "R50"
    )
    warmup = launch.run("width-50", "R500")
    assert warmup[warmup.index("--lr-warmup-iters") + 1] == "6250"  # 5% of 125,000


def test_all_targets_have_one_precision() -> None:
    """A trend over ratios would otherwise be one of FP8 against bf16 too."""
    lines = [launch.command(*which) for which in launch.everything()]
    assert all("--bf16" in line and not any("fp8" in word for word in line) for line in lines)


@pytest.mark.parametrize(
    ("target", "name"), [("parent", "R50"), ("width-50", "P200"), ("width-50", "R50+5"), ("sparse", "x")]
)
def test_runs_that_there_are_not(target, name) -> None:
    with pytest.raises(UsageError, match="RUN"):
        launch.run(target, name)


def test_a_line_is_for_the_shell(capsys) -> None:
    assert launch.main(["depth-62.5", "R50", "--gpus", "64 pp"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("sbatch --nodes 8 ") and "'Ettttttt|tttttL'" in line
    assert f"--data-path $(cat {launch.BLEND})" in line and "launch/checkpointing.flags" in line
    assert launch.main(["parent", "P200", "--gpus", "8", "--plain"]) == 0
    assert capsys.readouterr().out.startswith("pretrain --num-layers 32 ")
    with pytest.raises(UsageError, match="8, 64, 1024"):
        launch.main(["sparse", "R50", "--gpus", "64 pp"])


def test_targets_have_a_layout() -> None:
    assert set(TABLE["chosen"]) == set(TABLE["targets"])
