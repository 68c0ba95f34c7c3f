"""Checks that tie the files of a run to each other, file by file; whole studies are in test_forgeries.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import artifacts
from megatron_prune.errors import AccountError, MegatronPruneError
from megatron_prune.study import custody, execution
from megatron_prune.study.prunings import Places
from tests.study import made_up
from tests.study.test_match import EQUAL_TRAINING, PRUNED


def run(cell: str, account: dict[str, Any], number: float, **changes: Any) -> custody.TrainedRun:
    """A run whose weights and losses are a function of ``number``."""
    final = {"fingerprint": f"f{number}", "full_hash": f"h{number}"}
    windows = {name: {"window_losses": [3.0 + number, 2.0 + number / 2]} for name in ("validation", "test")}
    made = {"initial": None, **copy.deepcopy(account), "final": final} | changes
    return custody.TrainedRun(cell, made, {"corpora": windows}, (f"{9 - number}", f"{3 + number}"))


def test_runs_that_differ_pass() -> None:
    custody.refuse_copies([run("a", PRUNED, 0.1), run("b", EQUAL_TRAINING, 0.2), run("c", PRUNED, 0.3, seed=2)], {})


@pytest.mark.parametrize("what", ["fingerprint", "full_hash", "digit", "validation loss", "test loss"])
def test_a_copy_is_seen_by_each_of_its_files(what: str) -> None:
    one, other = run("a", PRUNED, 0.1), run("b", PRUNED, 0.2, seed=2)
    if what in custody.WEIGHTS:
        other.account["final"][what] = one.account["final"][what]
    elif what == "digit":
        other = custody.TrainedRun("b", other.account, other.scores, one.losses)
    else:
        corpus = other.scores["corpora"][what.split()[0]]
        corpus["window_losses"] = [loss + 5e-7 for loss in one.scores["corpora"]["test"]["window_losses"]]
    with pytest.raises(AccountError, match=rf"^a and b have .*{what}.*different runs .*\(seed: 1 against 2\)"):
        custody.refuse_copies([one, other], {})


def test_one_training_under_two_names_is_no_copy() -> None:
    """Two methods that keep the same layers retrain the same model; paths may differ."""
    moved = PRUNED | {"arguments": PRUNED["arguments"] | {"save": "elsewhere"}}
    custody.refuse_copies([run("a", PRUNED, 0.1), run("b", moved, 0.1)], {})
    decayed = PRUNED | {"arguments": PRUNED["arguments"] | {"weight_decay": 0.2}}
    with pytest.raises(AccountError, match=r"\(weight_decay: 0.1 against 0.2\)"):
        custody.refuse_copies([run("a", PRUNED, 0.1), run("b", decayed, 0.1)], {})
    with pytest.raises(AccountError, match=r"\(initial: v against w\)"):
        custody.refuse_copies([run("a", PRUNED | {"initial": {"fingerprint": "v"}}, 0.1), run("b", PRUNED, 0.1)], {})


def test_no_run_ends_with_the_weights_of_a_parent_or_a_pruning() -> None:
    custody.refuse_copies([run("a", EQUAL_TRAINING, 0.1)], {"parent": "f0.2"})
    with pytest.raises(AccountError, match="a ended with the same weights as parent"):
        custody.refuse_copies([run("a", EQUAL_TRAINING, 0.1)], {"parent": "f0.1"})


def account(folder: Path, **changes: Any) -> Path:
    made = EQUAL_TRAINING | {"range": [0, 48], "steps": 3, "tokens": 48 * 32}
    made["arguments"] = EQUAL_TRAINING["arguments"] | {"seed": 1}
    made_up.write_losses(folder, made, [9.0, 8.0, 7.0])
    artifacts.write_json(folder / "account.json", made | changes)
    return folder / "account.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed: expected 1, as in its arguments, got 2"),
        ({"final_loss": 6.9}, r"final_loss: expected 7.0, as in losses.csv, got 6.9"),
        ({"initial_loss": 8.0}, r"initial_loss: expected 9.0, as in losses.csv, got 8.0"),
        ({"steps": 4}, "range: expected 64 by its 4 steps of 16 x 32, got 48"),
        ({"global_batch_size": 8}, "range: expected 24 by its 3 steps of 8 x 32, got 48"),
        ({"tokens": 1600}, "tokens: expected 1,536 by its 3 steps of 16 x 32, got 1,600"),
    ],
)
def test_an_account_that_contradicts_itself(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    custody.check_account(account(tmp_path))
    with pytest.raises(AccountError, match=message):
        custody.check_account(account(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "3"}, "steps: expected a valid integer, got '3'"),
        ({"steps": True}, "steps: expected a valid integer, got True"),
        ({"range": [0, 48, 96]}, "range: expected at most 2 values, got .0, 48, 96."),
        ({"range": [0]}, "range: expected at least 2 values, got .0."),
        ({"range": [0, 48.5]}, r"range.1: expected a valid integer, got 48.5"),
        ({"range": None}, "range: expected the first and the last sample, got none"),
        ({"final_loss": "7"}, "final_loss: expected a valid number, got '7'"),
        ({"arguments": []}, r"arguments: expected a valid dictionary, got \[\]"),
        ({"final": {"fingerprint": 7}}, "final.fingerprint: expected a valid string, got 7"),
        ({"lineage": [7]}, "lineage.0: expected a valid dictionary.*, got 7"),
        ({"complete": "yes"}, "complete: expected a valid boolean, got 'yes'"),
        ({"attempts": [{"seconds": "long"}]}, "attempts.0.seconds: expected a valid number, got 'long'"),
        ({"masks": 7}, "masks: expected a valid string, got 7"),
    ],
)
def test_a_value_of_another_type_in_an_account(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = account(tmp_path, **changes)
    with pytest.raises(AccountError, match=message) as refused:
        custody.check_account(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["steps", "range", "arguments", "global_batch_size", "final_loss", "tokens"])
def test_an_account_without_a_key(tmp_path: Path, key: str) -> None:
    path = account(tmp_path)
    content = artifacts.read_json(path)
    del content[key]
    artifacts.write_json(path, content)
    with pytest.raises(AccountError, match=f"account.json is damaged: {key}: expected this key, got nothing"):
        custody.check_account(path)


def test_an_account_of_more_steps_than_fit_the_memory(tmp_path: Path) -> None:
    steps = 10**15
    path = account(tmp_path, steps=steps, range=[0, 16 * steps], tokens=16 * 32 * steps)
    with pytest.raises(AccountError, match="expected a row for each of the 1000000000000000 steps"):
        custody.check_account(path)


@pytest.mark.parametrize(
    "text", [b"", b"step,loss\n1,2\n", b"step,samples,loss\n1,16\n", b"step,samples,loss\nx,16,2\n", b"\xff\xfe\n1\n",
             b"step,samples,loss\n1,16,\0\n", b"step,samples,loss\n1,16,a loss\n"],
)  # fmt: skip
def test_losses_that_are_no_table(tmp_path: Path, text: bytes) -> None:
    path = account(tmp_path)
    (tmp_path / "losses.csv").write_bytes(text)
    with pytest.raises(AccountError, match="losses.csv") as refused:
        custody.check_account(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"corpora": {"test": {"windows": 2, "loss": "2.5"}}}, "corpora.test.loss: expected a valid number, got '2.5'"),
        ({"corpora": {"test": {"loss": 2.5}}}, "corpora.test.windows: expected this key, got nothing"),
        (
            {"corpora": {"test": {"loss": 2.5, "windows": 1, "window_losses": ["x"]}}},
            "window_losses.0: expected a valid n",
        ),
        ({"corpora": []}, "corpora: expected a valid dictionary"),
        ({"checkpoint": {"fingerprint": 7}}, "checkpoint.fingerprint: expected a valid string, got 7"),
        (
            {"tasks": {"results": {}, "questions": {"t": {"fingerprint": "f", "scores": {"acc": [None]}}}}},
            "scores.acc.0",
        ),
        ({"parameters": 1.5}, "parameters: expected a valid integer"),
        ([], "expected a valid dictionary"),
        ({}, "scores.json is damaged: corpora: expected this key, got nothing"),
    ],
)
def test_a_value_of_another_type_in_scores(tmp_path: Path, content: Any, message: str) -> None:
    artifacts.write_json(tmp_path / "scores.json", content)
    with pytest.raises(AccountError, match=message) as refused:
        custody.check_scores(tmp_path / "scores.json", ["test"])
    assert "scores.json" in str(refused.value) and "\n" not in str(refused.value)


def test_scores_without_the_text_they_are_for(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "scores.json", {"corpora": {"test": {"loss": 2.5, "windows": 1}}})
    corpus = custody.read_scores(tmp_path / "scores.json")["corpora"]["test"]
    assert corpus["loss"] == 2.5
    with pytest.raises(AccountError, match=r"scores\.json: test is damaged: fingerprint: expected this key"):
        corpus["fingerprint"]


def test_cell_files_of_other_types(tmp_path: Path) -> None:
    stage = {"stage": "evaluate", "nproc": 1, "argv": ["evaluate"], "done": {"check": "calibrated"}}
    good = {"cell": "c", "about": {}, "stages": [stage]}
    artifacts.write_json(tmp_path / "cell.json", good)
    assert execution.read_cell(tmp_path / "cell.json") == good
    for wrong, place in (
        ({"stages": []}, "stages"), ({"stages": [stage | {"argv": "evaluate"}]}, "stages.0.argv"),
        ({"stages": [stage | {"nproc": "1"}]}, "stages.0.nproc"), ({"stages": [7]}, "stages.0"),
        ({"about": 7}, "about"),
    ):  # fmt: skip
        artifacts.write_json(tmp_path / "cell.json", good | wrong)
        with pytest.raises(MegatronPruneError, match=f"cell.json is damaged: {place}: "):
            execution.read_cell(tmp_path / "cell.json")
    artifacts.write_json(tmp_path / "stages.json", {"evaluate": "long"})
    with pytest.raises(MegatronPruneError, match="stages.json is damaged: evaluate: expected a valid number"):
        execution.seconds_of(tmp_path)
    places = Places(tmp_path)
    artifacts.write_json(places.cell("c") / "state.json", {"state": "begun", "failures": [], "more": 1})
    assert execution.States(places).read("c") == execution.State("begun", failures=[])
    artifacts.write_json(places.cell("c") / "state.json", {"state": "gone"})
    with pytest.raises(MegatronPruneError, match="state.json is damaged: state: expected 'waiting', 'begun'"):
        execution.States(places).read("c")


def test_an_account_without_its_losses(tmp_path: Path) -> None:
    path = account(tmp_path)
    whole = (tmp_path / "losses.csv").read_text()
    for cut in (whole[: whole.rindex("3,48")], whole.replace("2,32", "2,33")):
        (tmp_path / "losses.csv").write_text(cut)
        with pytest.raises(AccountError, match="expected a row for each of the 3 steps of account.json, got [23] rows"):
            custody.check_account(path)
    (tmp_path / "losses.csv").unlink()
    with pytest.raises(AccountError, match="losses.csv is missing"):
        custody.check_account(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": 2.1}, "the loss of test: expected 2.5, the mean of its windows, got 2.1"),
        ({"windows": 3}, "expected the losses of 3 windows, got 2"),
        ({"window_losses": []}, "expected the losses of 2 windows, got 0"),
    ],
)
def test_scores_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    whole = {"loss": 2.5, "windows": 2, "window_losses": [2.0, 3.0]}
    for corpus, raises in ((whole, False), (whole | changes, True)):
        artifacts.write_json(tmp_path / "scores.json", {"corpora": {"test": corpus}})
        if not raises:
            custody.check_scores(tmp_path / "scores.json", ["test"])
    with pytest.raises(AccountError, match=message):
        custody.check_scores(tmp_path / "scores.json", ["test"])


def test_scores_of_other_weights(tmp_path: Path, tiny_parent: Path) -> None:
    held = {"iteration": 0, **made_up.weights_of(tiny_parent)}
    account, scores = tmp_path / "account.json", tmp_path / "scores.json"

    def check(final: dict[str, Any] | None, scored: dict[str, Any], checkpoint: Path = tmp_path / "gone") -> None:
        artifacts.write_json(account, {"final": final})
        artifacts.write_json(scores, {"checkpoint": scored})
        custody.check_weights(scores, account, checkpoint)

    check(held, held)  # retention has removed the weights
    check(held, held, tiny_parent)
    for key in custody.WEIGHTS:
        with pytest.raises(AccountError, match=f"scores.json is of weights with {key} x, .*account.json has"):
            check(held, held | {key: "x"})
    with pytest.raises(AccountError, match="expected the fingerprint of the weights that were saved, got none"):
        check(None, held)
    with pytest.raises(AccountError, match=f"scores.json is of weights with fingerprint x, {tiny_parent} has"):
        check(held | {"fingerprint": "x"}, held | {"fingerprint": "x"}, tiny_parent)


def test_tasks_that_contradict_their_questions(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"

    def write(scores: list[float], value: float, samples: int = 4) -> None:
        results = {"t": {"metrics": {"acc": {"value": value}}, "samples": samples}}
        tasks = {"results": results, "questions": {"t": {"fingerprint": "f", "scores": {"acc": scores}}}}
        artifacts.write_json(path, {"corpora": {}, "tasks": tasks})

    write([1.0, 0.0, 1.0, 1.0], 0.75)
    custody.check_scores(path, [])
    for scores, value in (([1.0, 0.0, 1.0, 1.0], 0.8), ([1.0, 0.0, 1.0], 2 / 3)):
        write(scores, value)
        with pytest.raises(AccountError, match="acc of t is .* on 4 questions, the mean of its . questions"):
            custody.check_scores(path, [])
