"""Checks that tie the files of a run to each other, file by file; whole studies are in test_forgeries.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import artifacts
from megatron_prune.errors import AccountError
from megatron_prune.study import custody
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
