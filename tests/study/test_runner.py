"""The runner: killed anywhere and run again, it ends with the same ledger; it ignores exit codes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from megatron_prune.engine import launch
from megatron_prune.errors import DataError, RunError, UsageError
from megatron_prune.structured import plan
from megatron_prune.study import jobs, outlook
from megatron_prune.study.analysis import results
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.prunings import Places
from megatron_prune.study.run import local, status
from megatron_prune.study.run.status import CellProgress
from tests.study import made_up


def ledger(places: Places) -> dict[str, dict]:
    """Records without the fields that a rerun does not reproduce."""
    records = Ledger(places.root / "ledger.jsonl").read()
    return {
        cell: {k: v for k, v in record.items() if k not in ("seconds", "artifacts")} for cell, record in records.items()
    }


def test_killed_before_any_command_ends_with_the_same_ledger(tmp_path: Path, prefixes, monkeypatch) -> None:
    study = made_up.study(prefixes)
    monkeypatch.chdir(tmp_path)
    whole = made_up.FakeLauncher()
    expected = ledger(made_up.run(study, Path("whole"), whole))
    assert {record["kind"] for record in expected.values()} == {
        "parent", "calibration", "pruning", "pruned", "scratch"
    }  # fmt: skip
    runs, kills, spent = Path("killed"), 0, []
    while True:
        launcher = made_up.FakeLauncher(kill_at=2)
        try:
            places = made_up.run(study, runs, launcher)
        except made_up.Killed:
            kills += 1
            spent += launcher.commands
            continue
        spent += launcher.commands
        break
    assert kills >= 7
    # Every command ran once (its paths give the folder), and nothing was repeated.
    assert [c.stage for c in spent] == [c.stage for c in whole.commands]
    assert sorted(ledger(places)) == sorted(expected)
    for cell, record in ledger(places).items():
        assert record == expected[cell], cell
    again = made_up.FakeLauncher()
    made_up.run(study, runs, again)
    assert not again.commands


@pytest.mark.parametrize("name", ["", "cells", "report", "ledger.jsonl"])
def test_a_place_that_cannot_be_written_is_found_before_any_command(
    tmp_path: Path, prefixes, monkeypatch, name: str
) -> None:
    """A file in place of a folder, or the reverse: what another user's permissions do, to root too."""
    monkeypatch.chdir(tmp_path)
    study, launcher = made_up.study(prefixes), made_up.FakeLauncher()
    place = Path("runs") / study.name / name
    place.parent.mkdir(parents=True)
    place.mkdir() if name.endswith("jsonl") else place.touch()
    with pytest.raises(UsageError, match="^--runs-dir: expected .* that can be written, got "):
        made_up.run(study, Path("runs"), launcher)
    assert not launcher.commands and not (Path("runs") / study.name / "study.json").exists()


def test_seconds_of_a_training_are_those_of_all_its_attempts(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = made_up.run(made_up.study(prefixes), Path("runs"), made_up.FakeLauncher())
    records = Ledger(places.ledger).read()
    trained = {cell for cell, record in records.items() if record["kind"] in ("parent", "pruned", "scratch")}
    for cell in trained:
        assert records[cell]["seconds"]["pretrain"] == json.loads(places.account(cell).read_text())["wall_seconds"] > 10
    rows = [row for row in results.collect(places).rows if row["cell"] in trained]
    assert rows and all(row["seconds"] == records[row["cell"]]["seconds"]["pretrain"] for row in rows)


def test_a_kill_after_the_last_stage_only_costs_the_line(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes)
    places = made_up.run(study, Path("runs"), made_up.FakeLauncher())
    path = places.root / "ledger.jsonl"
    expected = ledger(places)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    launcher = made_up.FakeLauncher()
    made_up.run(study, Path("runs"), launcher)
    assert not launcher.commands
    assert ledger(places) == expected


def test_shared_work_is_done_once(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    methods = [{"name": "shortgpt"}, {"name": "random", "settings": {"axis": "depth"}}]
    launcher = made_up.FakeLauncher()
    made_up.run(made_up.study(prefixes, methods=methods), Path("runs"), launcher)
    stages = [command.stage for command in launcher.commands]
    assert stages.count("calibrate") == 1
    # Parent; two pruned; one scratch at equal training for both; two at equal total, since only
    # shortgpt has read calibration tokens (5% of the total here).
    assert stages.count("pretrain") == 6


def test_candidates_are_scored_in_a_study_and_depth_methods_share_scratch(
    tmp_path: Path, prefixes, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    methods = [{"name": "shortgpt"}, {"name": "minitron-depth"}]
    launcher = made_up.FakeLauncher()
    places = made_up.run(made_up.study(prefixes, methods=methods), Path("runs"), launcher)
    stages = [command.stage for command in launcher.commands]
    assert [stages.count(stage) for stage in ("calibrate", "candidates", "score", "plan", "apply")] == [1, 1, 1, 2, 2]
    assert stages.count("pretrain") == 5  # parent, two pruned, one scratch per setting
    score = next(command for command in launcher.commands if command.stage == "score")
    assert score.words[3] == "calibrate" and "--calibration-data-path" not in score.words
    record = ledger(places)["pruning-minitron-depth-r50-s1"]
    made = plan.read(places.cell("pruning-minitron-depth-r50-s1") / "plan.json")
    assert len(made.candidates) == 3 and made.calibration is not None
    assert record["flops"] == made.calibration["scoring"]["flops"] > 0
    rows = [row for row in results.collect(places).rows if row["arm"] == "pruned"]
    by_method = {row["method"]: row["flops_total"] for row in rows if row["setting"] == "equal-training"}
    assert by_method["minitron-depth"] == by_method["shortgpt"] + record["flops"]


def test_a_search_gives_its_shape_to_scratch_and_survives_kills(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"search": ["hidden", "ffn"], "max-candidates": 4, "divisible-by": 8, "tolerance": 0.2}
    study = made_up.study(prefixes, methods=[{"name": "minitron-width", "settings": settings}])
    expected = ledger(made_up.run(study, Path("whole"), made_up.FakeLauncher()))
    places = made_up.run_killed(study, Path("killed"))
    assert ledger(places) == expected
    pruning = expected["pruning-minitron-width-r50-s1"]
    assert f"scratch-{pruning['shape']}-equal-training-t1280-s1" in expected
    table = plan.read(places.cell("pruning-minitron-width-r50-s1") / "plan.json").candidates
    assert len(table) == 4 and len({row.candidate for row in table}) == 4


def test_given_shapes_compete_without_a_ratio(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"shapes": ["16/4/48", "24/2/32", "24/4/24"]}
    method = {"name": "minitron-width", "target": given, "settings": {"divisible-by": 8}}
    study = made_up.study(prefixes, methods=[method])
    places = made_up.run(study, tmp_path, made_up.FakeLauncher())
    made = plan.read(places.cell("pruning-minitron-width-target-s1") / "plan.json")
    assert len(made.candidates) == 3 and made.settings["target_shapes"] == given["shapes"]


def test_retrained_candidates_decide_and_count_as_what_pruning_trained_on(
    tmp_path: Path, prefixes, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"search": ["hidden", "ffn"], "max-candidates": 4, "divisible-by": 8, "tolerance": 0.2}
    settings |= {"retrain-candidates": 3, "retrain-tokens": 256}
    study = made_up.study(prefixes, methods=[{"name": "minitron-width", "settings": settings}])
    expected = ledger(made_up.run(study, Path("whole"), first := made_up.FakeLauncher()))
    stages = [command.stage for command in first.commands if "pruning-" in " ".join(command.argv)]
    assert stages[:5] == ["candidates", "score", "retrain-candidates", "plan", "apply"]
    places = made_up.run_killed(study, Path("killed"))
    assert ledger(places) == expected
    name = "minitron-width-r50-s1"
    made = plan.read(places.cell(f"pruning-{name}") / "plan.json")
    after = {row.retrained_loss: i for i, row in enumerate(made.candidates) if row.retrained_loss is not None}
    assert len(after) == 3 and made.chosen == after[3.0] and made.calibration is not None
    scoring, retraining = made.calibration["scoring"], made.calibration["retraining"]
    assert retraining["tokens"] == 3 * 256 and retraining["flops"] == 3 * 10**9
    assert expected[f"pruning-{name}"]["flops"] == scoring["flops"] + retraining["flops"]
    # 2560 tokens of the parent, 1280 of retraining, 8 windows of 16, three candidates of 256: whole batches of 128.
    total = 2560 + 1280 + 8 * 16 + 3 * 256
    shape = expected[f"pruning-{name}"]["shape"]
    assert expected[f"scratch-{shape}-equal-total-t{total}-s1"]["tokens"] == total
    (row,) = (row for row in results.collect(places).rows if row["arm"] == "pruned" and row["setting"] == "equal-total")
    assert row["tokens_pruning"] == 8 * 16 + 3 * 256 and row["tokens_total"] == total

    # If a search has fewer candidates than it can retrain, their actual tokens are matched.
    asked = {"name": "minitron-width", "settings": settings | {"max-candidates": 20, "retrain-candidates": 20}}
    fewer = made_up.run(made_up.study(prefixes, methods=[asked], name="fewer"), Path("fewer"), made_up.FakeLauncher())
    made = plan.read(fewer.cell(f"pruning-{name}") / "plan.json")
    assert made.calibration is not None and 1 < len(made.candidates) < 20
    retrained = made.calibration["retraining"]["tokens"]
    assert retrained == len(made.candidates) * 256
    (row,) = (row for row in results.collect(fewer).rows if row["arm"] == "scratch" and row["setting"] == "equal-total")
    assert row["tokens_total"] == 2560 + 1280 + 8 * 16 + retrained

    method = {"name": "minitron-width", "settings": settings | {"retrain-tokens": 200}}
    with pytest.raises(UsageError, match="retrain-tokens: expected a multiple of 128, .*, got 200"):
        made_up.run(made_up.study(prefixes, methods=[method]), Path("odd"), made_up.FakeLauncher())
    method = {"name": "minitron-width", "settings": settings | {"retrain-tokens": 128 * 10**5}}
    with pytest.raises(DataError, match="is not enough for methods.minitron-width's candidates"):
        training = made_up.study(prefixes, methods=[method], settings=["equal-training"])
        made_up.run(training, Path("long"), made_up.FakeLauncher())
    method, launching = {"name": "minitron-width", "settings": settings}, {"launcher": "slurm", "nproc": 4}
    with pytest.raises(UsageError, match=r"retrain-candidates: expected at most 2 proc.*, got launch.nproc 4"):
        cluster = made_up.study(prefixes, methods=[method], launch=launching | {"slurm": {"ranks_per_node": 2}},
                                recipe={"lr": 1e-3, "global_batch_size": 8, "micro_batch_size": 2})  # fmt: skip
        made_up.run(cluster, Path("nodes"), made_up.FakeLauncher())
    method = {"name": "minitron-depth", "settings": {"score-by": "task", "task-data": "nowhere.jsonl"}}
    with pytest.raises(DataError, match="cannot read the task nowhere.jsonl"):
        made_up.run(made_up.study(prefixes, methods=[method]), Path("task"), made_up.FakeLauncher())


def test_a_failed_cell_is_named_and_the_others_go_on(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes)
    cell = "pruned-shortgpt-r50-s1-t1280"
    with pytest.raises(RunError, match=rf"{cell}: evaluate ended \(exit code 0\) without") as caught:
        made_up.run(study, Path("runs"), made_up.FakeLauncher(broken=((cell, "evaluate"),)))
    assert "evaluate was here" in str(caught.value)  # the end of the log
    done = ledger(Places(Path("runs") / "made-up"))
    assert cell not in done and sum(record["kind"] in ("pruned", "scratch") for record in done.values()) == 5
    made_up.run(study, Path("runs"), retry := made_up.FakeLauncher())
    assert [command.stage for command in retry.commands] == ["evaluate"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"complete": False}, "parent: pretrain ended"),
        ({"range": [0, 80]}, r"account.json: expected a finished run with range \[0, 160\], got \[0, 80\]"),
        ({"steps": 3}, "account.json: expected a finished run with steps 20, got 3"),
    ],
)
def test_a_run_counts_by_its_account_alone(tmp_path: Path, prefixes, monkeypatch, content: dict, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes, launch={"retries": 0})

    class Lying(made_up.FakeLauncher):
        def _pretrain(self, argv: list[str]) -> None:
            super()._pretrain(argv)
            path = Path(made_up.words(argv)["save"]) / "account.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | content))

    with pytest.raises(RunError, match=says):
        made_up.run(study, Path("runs"), Lying())


@pytest.mark.parametrize(
    ("content", "says"), [({"seed": 5}, "seed 1, got 5"), ({"arguments": {"lr": 0.5}}, "lr 0.001, got 0.5")]
)
def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(
    tmp_path: Path, prefixes, monkeypatch, content: dict, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes, settings=["equal-training"])
    places = made_up.run(study, Path("runs"), made_up.FakeLauncher())
    cell = "pruned-shortgpt-r50-s1-t1280"
    places.account(cell).write_text(json.dumps(json.loads(places.account(cell).read_text()) | content))
    lines = places.ledger.read_text().splitlines(keepends=True)
    places.ledger.write_text("".join(line for line in lines if f'"cell":"{cell}"' not in line.replace(" ", "")))
    with pytest.raises(RunError, match=f"expected a finished run with {says}"):
        made_up.run(study, Path("runs"), launcher := made_up.FakeLauncher())
    assert not launcher.commands


def test_only_one_runner_at_a_time(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes)
    root = tmp_path / "runs" / study.name
    root.mkdir(parents=True)
    with open(root / "study.lock", "w") as handle:
        handle.write("4711")
        handle.flush()
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="expected no other runner, got process 4711"):
            made_up.run(study, Path("runs"), made_up.FakeLauncher())
    made_up.run(study, Path("runs"), made_up.FakeLauncher())


def test_a_file_system_without_locks_is_refused(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    study = made_up.study(prefixes)
    with pytest.raises(RunError, match=r"study.lock cannot be locked .*: its file system has no locks"):
        made_up.run(study, Path("runs"), made_up.FakeLauncher())
    assert not status.at_work(Places(Path("runs", study.name)))


def test_a_changed_recipe_is_refused_and_a_larger_grid_is_not(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made_up.run(made_up.study(prefixes), Path("runs"), made_up.FakeLauncher())
    recipe = made_up.mapping(prefixes)["recipe"] | {"lr": 2e-3}
    with pytest.raises(UsageError, match="parent with --lr 0.002 in place of 0.001") as caught:
        made_up.run(made_up.study(prefixes, recipe=recipe), Path("runs"), made_up.FakeLauncher())
    # Cells that depend on it: all except the dense scratch runs, which take only a shape.
    resting = str(caught.value).split("what rests on it (")[1].split(")")[0].split(", ")
    records = ledger(Places(Path("runs/made-up")))
    assert set(resting) == {cell for cell, record in records.items() if record["kind"] not in ("parent", "scratch")}
    launcher = made_up.FakeLauncher()
    made_up.run(made_up.study(prefixes, budgets=[1280, 2560]), Path("runs"), launcher)
    assert [command.stage for command in launcher.commands] == ["pretrain", "evaluate"] * 6


def test_what_accounts_may_differ_in_may_change_while_cells_are_not_finished(
    tmp_path: Path, prefixes, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places, settings = Places(Path("runs/made-up")), {"settings": ["equal-training"]}
    with pytest.raises(made_up.Killed):
        made_up.run(made_up.study(prefixes, **settings), Path("runs"), made_up.FakeLauncher(kill_at=10))
    before = {cell: (places.cell(cell) / "cell.json").read_text() for cell in ledger(places)}
    (begun,) = (path.parent.name for path in places.root.glob("cells/*/pretrain.log") if path.parent.name not in before)
    recipe = made_up.mapping(prefixes)["recipe"] | {"micro_batch_size": 2, "save_interval": 5}
    free = {"recipe": recipe, "launch": {"nproc": 2}, "tracking": {"tensorboard": True}, **settings}
    made_up.run(made_up.study(prefixes, **free), Path("runs"), launcher := made_up.FakeLauncher())
    trained = [made_up.words(list(command.argv[1:])) for command in launcher.commands if command.stage == "pretrain"]
    assert len(trained) == 3 and all(command.nproc == 2 for command in launcher.commands)
    assert {(words["micro_batch_size"], words["save_interval"]) for words in trained} == {("2", "5")}
    assert {cell: (places.cell(cell) / "cell.json").read_text() for cell in before} == before
    assert "--save-interval" in (places.cell(begun) / "cell.json").read_text()
    matched = {line.field: line for item in results.collect(places).compared for line in item.match}
    assert matched["arguments.micro_batch_size"].verdict == "may differ: how a batch is shared out"
    with pytest.raises(UsageError, match="parent with --lr 0.002 in place of 0.001"):
        other = made_up.study(prefixes, **(free | {"recipe": recipe | {"lr": 2e-3}}))
        made_up.run(other, Path("runs"), made_up.FakeLauncher())


def test_parallel_cells_give_the_same_ledger(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    alone = ledger(made_up.run(made_up.study(prefixes), Path("alone"), made_up.FakeLauncher()))
    study = made_up.study(prefixes, launch={"parallel_cells": 3})
    assert ledger(made_up.run(study, Path("beside"), made_up.FakeLauncher())) == alone


class Barrier(made_up.FakeLauncher):
    """The first command of each of these cells waits for the others."""

    def __init__(self, *cells: str):
        super().__init__()
        self.meeting, self.cells, self.env = threading.Barrier(len(cells)), cells, dict[str, dict[str, str]]()

    def __call__(self, command, *, log: Path, env: dict[str, str]) -> int:
        if command.stage == "pretrain" and log.parent.name in self.cells:
            self.env[log.parent.name] = env
            self.meeting.wait(timeout=600)
        return super().__call__(command, log=log, env=env)


def test_scratch_of_a_known_shape_is_trained_next_to_the_parent(tmp_path: Path, prefixes, monkeypatch) -> None:
    """Each has a share of the cores; a parent that everything waits for has them all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    both = {"launch": {"parallel_cells": 2}}
    longest = "scratch-L2h32H4G2d8F64-equal-total-t3968-s1"  # not that of most FLOPs per token
    meeting = Barrier("parent", longest)
    made_up.run(made_up.study(prefixes, methods=[{"name": "shortgpt"}], **both), Path("runs"), meeting)
    assert {cell: env["OMP_NUM_THREADS"] for cell, env in meeting.env.items()} == {"parent": "2", longest: "2"}
    layers = [
        command.argv[command.argv.index("--num-layers") + 1]
        for command in meeting.commands
        if "--num-layers" in command.argv
    ]
    assert sorted(layers) == ["2", "2", "4"]
    sparse = [{"name": "magnitude", "pattern": "2:4", "compare": {"equal-training": ["masked"]}}]
    alone = made_up.study(prefixes, name="alone", methods=sparse, settings=["equal-training"], **both)
    made_up.run(alone, Path("runs"), alone_first := Barrier("parent"))
    assert alone_first.env["parent"]["OMP_NUM_THREADS"] == "4"


class Failing(made_up.FakeLauncher):
    """Ends a stage of a cell with a code and without output, a given number of times."""

    def __init__(self, cell: str, stage: str, times: int, code: int = 1):
        super().__init__()
        self.cell, self.stage, self.times, self.code = cell, stage, times, code

    def __call__(self, command, *, log: Path, env: dict[str, str]) -> int:
        if (log.parent.name, command.stage) == (self.cell, self.stage) and self.times:
            self.times -= 1
            self.commands.append(command)
            log.write_text("failing\n")
            return self.code
        return super().__call__(command, log=log, env=env)


@pytest.mark.parametrize(("retries", "times", "code", "attempts"), [(2, 2, 1, 3), (1, 9, 1, 2), (3, 9, 2, 1)])
def test_retries_are_bounded_and_a_refusal_is_not_retried(
    tmp_path: Path, prefixes, monkeypatch, retries: int, times: int, code: int, attempts: int
) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes, launch={"retries": retries}, settings=["equal-training"])
    cell = "pruned-shortgpt-r50-s1-t1280"
    launcher = Failing(cell, "pretrain", times, code)
    if times < attempts:
        places = made_up.run(study, Path("runs"), launcher)
    else:
        with pytest.raises(RunError, match=rf"{cell}: pretrain ended \(exit code {code}\)"):
            made_up.run(study, Path("runs"), launcher)
        places = Places(Path("runs/made-up"))
    trained = [c for c in launcher.commands if c.stage == "pretrain" and f"{cell}/" in " ".join(c.argv)]
    assert len(trained) == attempts
    state = json.loads((places.cell(cell) / "state.json").read_text())
    assert state["state"] == ("finished" if times < attempts else "failed")
    assert len(state["failures"]) == min(times, attempts)
    assert len(ledger(places)) == 8 - (times >= attempts)


def test_an_attempt_that_got_further_is_no_failure(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell, saves = "pruned-shortgpt-r50-s1-t1280", [3, 6, 9]

    class Stopped(made_up.FakeLauncher):
        """A training that is stopped after a save, three times."""

        def _pretrain(self, argv: list[str]) -> None:
            save = Path(made_up.words(argv)["save"])
            if save.parent.name != cell or not saves:
                super()._pretrain(argv)
                return
            save.mkdir(exist_ok=True)
            (save / "latest_checkpointed_iteration.txt").write_text(f"{saves.pop(0)}\n")

    study = made_up.study(prefixes, launch={"retries": 0}, settings=["equal-training"])
    places = made_up.run(study, Path("runs"), Stopped())
    state = json.loads((places.cell(cell) / "state.json").read_text())
    assert (state["state"], state["failures"], saves) == ("finished", [], [])


@pytest.fixture
def loaded(prefixes, tmp_path, monkeypatch) -> dict:
    """Changes that make the parent a checkpoint of a study that has run in ``runs/other``."""
    monkeypatch.chdir(tmp_path)
    other = made_up.study(prefixes, name="other", settings=["equal-training"])
    places = made_up.run(other, Path("runs"), made_up.FakeLauncher())
    return {"parent": {"load": str(places.checkpoint("parent"))}}


def test_what_needs_a_failed_cell_is_blocked_and_a_shared_scratch_run_takes_its_shape_elsewhere(
    prefixes, loaded
) -> None:
    methods = [{"name": "shortgpt"}, {"name": "random", "settings": {"axis": "depth"}}]
    study = made_up.study(prefixes, methods=methods, settings=["equal-training"], **loaded)
    failing = Failing("pruning-shortgpt-r50-s1", "apply", 9)
    with pytest.raises(RunError, match="pruning-shortgpt-r50-s1: apply ended"):
        made_up.run(study, Path("runs"), failing)
    places = Places(Path("runs/made-up"))
    scratch = "scratch-L2h32H4G2d8F64-equal-training-t1280-s1"
    assert {scratch, "pruned-random-r50-s1-t1280"} < set(ledger(places))
    state = json.loads((places.cell("pruned-shortgpt-r50-s1-t1280") / "state.json").read_text())
    assert state["state"] == "blocked"
    found = results.collect(places)
    assert [item.status for item in found.compared] == ["pending", "finished"]
    # The next run gives the failed one another chance; the scratch run keeps the source that it has.
    made_up.run(study, Path("runs"), again := made_up.FakeLauncher())
    assert [command.stage for command in again.commands] == ["apply", "evaluate", "pretrain", "evaluate"]
    assert [item.status for item in results.collect(places).compared] == ["finished"] * 2


def test_what_an_earlier_runner_left_running_is_waited_for_and_not_begun_twice(
    tmp_path: Path, prefixes, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes, settings=["equal-training"])
    places, log = Places(Path("runs/made-up")), Path("runs/made-up/cells/parent/pretrain.log")
    with pytest.raises(made_up.Killed):
        made_up.run(study, Path("runs"), made_up.FakeLauncher(kill_at=0))
    with launch._open_log(log) as (out, _):
        left = subprocess.Popen(["sleep", "120"], stdout=out)
    command = jobs.parents(study, places, outlook.look(study, places))[0].stages[0].command

    def finishes(progress: CellProgress, cell: str, stage: str) -> None:
        assert (cell, stage) == ("parent", "pretrain") and left.poll() is None
        made_up.FakeLauncher()(command, log=tmp_path / "log", env={})
        left.kill()

    monkeypatch.setattr(CellProgress, "left", finishes)
    made_up.run(study, Path("runs"), launcher := made_up.FakeLauncher())
    assert left.wait() == -signal.SIGKILL
    assert [command.stage for command in launcher.commands][:2] == ["evaluate", "calibrate"]


def test_cells_side_by_side_have_gpus_of_their_own(prefixes, monkeypatch) -> None:
    study = made_up.study(prefixes, launch={"parallel_cells": 2, "nproc": 2})
    slots = local._devices(study, ["4", "5", "6", "7"])
    assert [slots.get(), slots.get()] == ["4,5", "6,7"]
    slots = local._devices(study, [])
    assert [slots.get(), slots.get()] == [None, None]
    with pytest.raises(UsageError, match=r"launch\.parallel_cells: expected at most 3 processes.*, got 2 cells of 2"):
        local._devices(study, ["0", "1", "2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-3f")
    assert local._visible() == ["2", "GPU-3f"]


@pytest.mark.parametrize(("cores", "nproc", "cells"), [(8, 2, 3), (4, 2, 2), (1, 2, 1)])
def test_no_more_cells_begin_than_there_are_cores_for(tmp_path, prefixes, monkeypatch, cores, nproc, cells) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    study = made_up.study(prefixes, launch={"parallel_cells": 3, "nproc": nproc})
    launcher = local.Local(study, Places(tmp_path), CellProgress(), made_up.FakeLauncher())
    assert launcher.cells == cells


def test_an_account_that_cannot_be_read_fails_its_cell_alone(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = made_up.study(prefixes, settings=["equal-training"])
    cell = "pruned-shortgpt-r50-s1-t1280"

    class Damaging(made_up.FakeLauncher):
        def _pretrain(self, argv: list[str]) -> None:
            super()._pretrain(argv)
            if f"{cell}/" in " ".join(argv):
                (Path(made_up.words(argv)["save"]) / "account.json").write_text("{")

    with pytest.raises(RunError, match=rf"{cell}/checkpoint/account.json is not valid JSON"):
        made_up.run(study, Path("runs"), Damaging())
    assert len(ledger(Places(Path("runs/made-up")))) == 7


def test_runs_report_to_megatrons_writers_grouped_by_study(tmp_path: Path, prefixes, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracking = {"tensorboard": True, "wandb_project": "pruning", "wandb_entity": "us"}
    seen: list[dict[str, str]] = []

    class Watching(made_up.FakeLauncher):
        def __call__(self, command, *, log: Path, env: dict[str, str]) -> int:
            seen.append(env)
            return super().__call__(command, log=log, env=env)

    launcher = Watching()
    places = made_up.run(made_up.study(prefixes, tracking=tracking), Path("runs"), launcher)
    for command in launcher.commands:
        given = made_up.words(list(command.argv[1:]))
        wanted = {
            "tensorboard_dir": f"runs/made-up/tensorboard/{Path(given.get('save', '')).parent.name}",
            "wandb_project": "pruning",
            "wandb_entity": "us",
            "wandb_exp_name": Path(given.get("save", "")).parent.name,
            "wandb_save_dir": "runs/made-up",
        }
        own = {key: value for key, value in given.items() if key.startswith(("wandb", "tensorboard"))}
        assert own == (wanted if command.stage == "pretrain" else {})
    assert all(env["WANDB_RUN_GROUP"] == "made-up" for env in seen)
    lines = {line.field for item in results.collect(places).compared for line in item.match}
    assert {"arguments.tensorboard_dir", "arguments.wandb_exp_name"} <= lines


@pytest.mark.parametrize(("retention", "kept"), [("all", 3), ("final", 1), ("none", 0)])
def test_retention_removes_saves_only_of_runs_in_the_ledger(
    tmp_path: Path, prefixes, monkeypatch, retention: str, kept: int
) -> None:
    monkeypatch.chdir(tmp_path)

    class Saving(made_up.FakeLauncher):
        """Writes three saves per run, and lists them when they are evaluated."""

        def _pretrain(self, argv: list[str]) -> None:
            super()._pretrain(argv)
            save = Path(made_up.words(argv)["save"])
            if save.parent.name == "parent":
                return
            (last,) = save.glob("iter_*")
            for step in (10, 20, 30):
                if last.name != f"iter_{step:07d}":
                    shutil.copytree(last, save / f"iter_{step:07d}")
            (save / "latest_checkpointed_iteration.txt").write_text("30")

        def _evaluate(self, argv: list[str]) -> None:
            load = Path(made_up.words(argv)["load"])
            if load.parent.name.startswith(("pruned", "scratch")):
                assert len(list(load.glob("iter_*"))) == 3
            super()._evaluate(argv)

    study = made_up.study(prefixes, retention=retention, settings=["equal-training"])
    places = made_up.run(study, Path("runs"), Saving())
    for cell, record in ledger(places).items():
        saves = sorted(path.name for path in places.checkpoint(cell).glob("iter_*"))
        if record["kind"] in ("pruned", "scratch"):
            assert saves == ["iter_0000010", "iter_0000020", "iter_0000030"][3 - kept :]
            assert (places.checkpoint(cell) / "latest_checkpointed_iteration.txt").exists() == bool(kept)
            assert places.account(cell).is_file() and places.losses(cell).is_file()
        elif record["kind"] == "pruning":
            assert places.checkpoint(cell).is_dir()  # a study that grows starts from it
    # The next run finishes an interrupted removal.
    cut = places.checkpoint("pruned-shortgpt-r50-s1-t1280") / "iter_0000001"
    cut.mkdir()
    made_up.run(study, Path("runs"), again := Saving())
    assert not again.commands and cut.exists() == (retention == "all")
    grown = made_up.study(prefixes, retention=retention, settings=["equal-training"], budgets=[1280, 2560])
    made_up.run(grown, Path("runs"), Saving())
