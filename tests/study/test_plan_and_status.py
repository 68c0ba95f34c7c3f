"""`study plan`: the cost of every cell, by hand; `study status --watch`: a table that follows a runner."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.study_commands import study_main
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study import estimate, jobs, outlook, records, schema, validate
from megatron_prune.study.estimate import Estimate, Speed
from megatron_prune.study.prunings import Places
from megatron_prune.study.run import status
from tests.study import made_up
from tests.waiting import wait_for_progress

LLAMA = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, tied=False)


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def estimates(study: Any) -> dict[str, Estimate]:
    outlook = validate.check(study, Places(Path("runs/made-up")))
    return {one.cell: one for one in estimate.of_study(study, outlook)}


def test_the_plan_adds_up_to_what_the_accounts_say(prefixes) -> None:
    methods = [{"name": "shortgpt"}, {"name": "wanda", "pattern": "2:4", "compare": ["equal-training"]}]
    study = made_up.study(prefixes, methods=methods)
    planned = estimates(study)
    places = made_up.run(study, Path("runs"), made_up.FakeLauncher())
    for cell in ("parent", "pruned-shortgpt-r50-s1-t1280", "scratch-L2h32H4G2d8F64-equal-total-t3968-s1"):
        account = yaml.safe_load(places.account(cell).read_text())
        found = planned[cell]
        assert (found.steps, found.tokens) == (account["steps"], account["tokens"])
        assert (found.flops, found.parameters) == (account["flops_executed"], account["parameters"])
    shape = open_checkpoint(places.checkpoint("pruning-shortgpt-r50-s1")).shape
    for cell in ("pruning-shortgpt-r50-s1", "pruned-shortgpt-r50-s1-t1280"):  # before and after retraining
        assert planned[cell].evaluation == 2 * 16 * shape.forward_flops(16)  # two corpora of 16 windows of 16
    assert planned["calibration-s1"].flops and planned["calibration-s1"].tokens == 8 * 16
    assert planned["pruning-shortgpt-r50-s1"].after == ("parent", "calibration-s1")
    assert planned["pruned-shortgpt-r50-s1-t1280"].after == ("pruning-shortgpt-r50-s1",)
    assert planned["scratch-L2h32H4G2d8F64-equal-total-t3968-s1"].after == ()


@pytest.mark.parametrize("where", ["parent", "recipe"])
def test_scratch_waits_for_the_pruning_where_patterns_go_by_layer(prefixes, where: str) -> None:
    """Which layers stay says which of them have no RoPE."""
    content = made_up.mapping(prefixes, methods=[{"name": "shortgpt"}])
    holder = content["parent"]["pretrain"] if where == "parent" else content["recipe"]
    holder["arguments"] = {**holder["arguments"], "no-rope-freq": 4}
    study = schema.from_mapping(content)
    places = Places(Path("runs/made-up"))
    found = outlook.look(study, places)
    scratch = [cell for cell in jobs.all_cells(study, places, found) if cell.id.startswith("scratch")]
    assert len(scratch) == 2 and {cell.after for cell in scratch} == {("pruning-shortgpt-r50-s1",)}
    assert all("--shape-from" in cell.stages[0].command.argv for cell in scratch)


@pytest.mark.parametrize(
    ("retention", "saves"), [("all", 4), ("final", 1), ("none", 0)]
)  # fmt: skip
def test_storage_is_weights_and_adam_of_the_saves_that_stay(prefixes, retention: str, saves: int) -> None:
    recipe = made_up.mapping(prefixes)["recipe"] | {"save_interval": 3, "arguments": {"bf16": True}}
    found = estimates(made_up.study(prefixes, retention=retention, recipe=recipe))["pruned-shortgpt-r50-s1-t1280"]
    assert found.parameters is not None
    assert found.storage == saves * found.parameters * (2 + 3 * 4)  # bf16; fp32 master and two moments


def test_speed_is_tokens_of_the_parent_or_a_share_of_the_peak() -> None:
    one_token = LLAMA.training_flops(8192) / 8192
    assert Speed.parse("40%", 989, 8, LLAMA, 8192).flops == pytest.approx(0.4 * 989e12)
    assert Speed.parse("7500", 989, 8, LLAMA, 8192).flops == pytest.approx(7500 * one_token)
    assert Speed(2e12, 8).seconds(Estimate("x", flops=6 * 10**12, evaluation=2 * 10**12), 4) == 1
    for wrong in ("fast", "0", "140%", "1.2.3"):
        with pytest.raises(UsageError, match="--throughput: expected"):
            Speed.parse(wrong, 989, 8, LLAMA, 8192)
    with pytest.raises(UsageError, match="--throughput: expected an MFU.*, got 7500"):
        Speed.parse("7500", 989, 8, None, 8192)


def test_cells_wait_for_what_they_need() -> None:
    cells = [Estimate("a"), Estimate("b", after=("a",)), Estimate("c", after=("a",)), Estimate("d", after=("b", "c"))]
    seconds = {"a": 10.0, "b": 5.0, "c": 7.0, "d": 1.0}
    assert estimate.makespan(cells, seconds, 1) == 23
    assert estimate.makespan(cells, seconds, 2) == 18


def test_plan_prints_times_and_what_is_not_known_yet(prefixes, capsys) -> None:
    settings = {"search": ["hidden", "ffn"], "max-candidates": 4, "divisible-by": 8, "tolerance": 0.2}
    methods = [{"name": "shortgpt"}, {"name": "minitron-width", "settings": settings}]
    content = made_up.mapping(prefixes, methods=methods, settings=["equal-training", "equal-flops"])
    Path("study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    study_main(["plan", "study.yaml", "--throughput", "1000", "--gpus", "4"])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if " pruned-shortgpt-r50-s1-t1280 " in line)
    assert "160:240" in row and "26,784" in row and row.rstrip().endswith("s │")
    assert "together on 4 GPUs" in printed
    assert "shapes chosen by a search will be known after the search" in printed
    assert "scratch runs at equal FLOPs are estimates until the prunings' FLOPs are known" in printed
    assert "scratch-L2h32H4G2d8F64-equal-flops-t" in printed
    with pytest.raises(UsageError, match="--gpus: expected .*, got 0"):
        study_main(["plan", "study.yaml", "--throughput", "1000", "--gpus", "0"])
    for flags, refused in (
        (["--gpus", "8"], "--gpus: expected --throughput with it, got 8 alone"),
        (["--peak-tflops", "300"], "--peak-tflops: expected an MFU with it.*, got 300"),
        (["--peak-tflops", "300", "--throughput", "1000"], "--peak-tflops: expected an MFU with it.*, got 300"),
        (["--peak-tflops", "-1", "--throughput", "40%"], "--peak-tflops: expected a positive number, got -1"),
    ):
        with pytest.raises(UsageError, match=refused):
            study_main(["plan", "study.yaml", *flags])
    capsys.readouterr()
    for peak in ("300", "600"):
        study_main(["plan", "study.yaml", "--throughput", "40%", "--peak-tflops", peak])
    slow, fast = capsys.readouterr().out.split("study made-up:")[1:]
    assert slow != fast
    too_long = made_up.study(prefixes, settings=["equal-flops"], budgets=[9000], methods=[{"name": "shortgpt"}])
    with pytest.raises(DataError, match="is not enough for scratch-L2h32H4G2d8F64-equal-flops"):
        validate.check(too_long, Places(Path("runs/x")))


def test_watching_ends_with_the_runner(prefixes) -> None:
    made = made_up.study(prefixes, settings=["equal-training"])
    places = Places(Path("runs") / made.name)

    console = Console(file=io.StringIO(), width=150, force_terminal=True)

    def shown() -> str:
        return console.file.getvalue()  # type: ignore[attr-defined]

    class Watched(made_up.FakeLauncher):
        """Calibrates only after the test has seen its status."""

        def __call__(self, command: Any, **given: Any) -> int:
            if command.stage == "calibrate":
                wait_for_progress(lambda: "calibrate" in shown(), "a look at the calibration", lambda: len(shown()))
            return super().__call__(command, **given)

    runner = threading.Thread(target=made_up.run, args=(made, Path("runs"), Watched()))
    runner.start()
    wait_for_progress(lambda: status.at_work(places) or not runner.is_alive(), "the runner")
    status.show(made.name, places, console, watch=0.05)
    runner.join()
    text = shown()
    assert "a runner is at work" in text and "calibrate" in text
    last = text[text.rindex("study made-up:") :]
    assert last.startswith("study made-up: 8 finished; no runner is at work") and "interrupted" not in last


def test_spikes_are_counted_against_the_steps_before(tmp_path: Path) -> None:
    losses = [4.0 - 0.01 * step + (0.01 if step % 2 else -0.01) for step in range(100)]
    losses[60] += 2.0  # a spike
    losses[5] += 2.0  # too early to tell
    losses[70] = float("nan")
    path = tmp_path / "losses.csv"
    rows = (f"{step},{8 * step},{loss}\n" for step, loss in enumerate(losses, start=1))
    path.write_text("step,samples,loss\n" + "".join(rows))
    assert records.count(path) == {"not_finite": 1, "spikes": 1}
