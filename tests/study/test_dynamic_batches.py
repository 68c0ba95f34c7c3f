"""Studies whose runs load their batches dynamically: commands, samples, and which two runs may be compared."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.data import blend, indexed
from megatron_prune.data.schedule import FILE, Schedule, followed
from megatron_prune.errors import AccountError, DataError, UsageError
from megatron_prune.study import custody, jobs, match, outlook, validate
from megatron_prune.study.analysis import results
from megatron_prune.study.prunings import Places
from tests.study import made_up, test_end_to_end, test_match

PLACES = Places(Path("runs/made-up"))
PRUNED = "pruned-shortgpt-r50-s1-t1280"
FOLLOWER = "scratch-L2h32H4G2d8F64-follows-shortgpt-r50-t1280-equal-training-t1280-s1"
SHEARED = {
    "name": "sheared-llama", "tokens": 640,
    "settings": {"divisible-by": 8, "tolerance": 0.2, "global-batch-size": 4, "dynamic-batch-every": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, str]:
    """The corpora of a made-up study, a second one to train on, and a validation corpus for each of both."""
    folder = tmp_path_factory.mktemp("corpora")
    found = made_up.corpora(folder)
    for number, name in enumerate(("more", "steer", "steer-more")):
        (folder / name).mkdir()
        found[name] = made_up.corpora(folder / name, train=12_000 if name == "more" else 2_000, seed=number + 1)[
            "train"
        ]
    return found


def study(prefixes: dict[str, str], dynamic: dict[str, Any] | None = None, **changes: Any):
    """``dynamic``: changes of the recipe's section."""
    held = {name: prefixes[name] for name in ("calibration", "validation", "test")}
    base = made_up.mapping(held)
    section = {"every": 4, "validation": [prefixes["steer"], prefixes["steer-more"]], "references": [2.0, 2.5],
               "samples": 20} | (dynamic or {})  # fmt: skip
    base["data"]["train"] = [[2, prefixes["train"]], [1, prefixes["more"]]]
    base["recipe"]["dynamic_batch"] = section
    base["methods"] = [{"name": "shortgpt"}]
    for key, value in changes.items():
        base[key] = base[key] | value if isinstance(base.get(key), dict) else value
    return made_up.schema.from_mapping(base)


def cells_of(made) -> dict[str, jobs.Cell]:
    return {cell.id: cell for cell in jobs.all_cells(made, PLACES, outlook.look(made, PLACES))}


def words(cells: dict[str, jobs.Cell], name: str) -> list[str]:
    return cells[name].stages[0].command.words


def test_the_scratch_run_follows_the_pruned_one_at_equal_training(prefixes) -> None:
    cells = cells_of(study(prefixes))
    pruned, follower = words(cells, PRUNED), words(cells, FOLLOWER)
    at = pruned.index("--dynamic-batch-every")
    assert pruned[at : at + 9] == [
        "--dynamic-batch-every", "4", "--domain-validation", prefixes["steer"], prefixes["steer-more"],
        "--reference-losses", "2.0", "2.5", "--domain-samples",
    ]  # fmt: skip
    at = follower.index("--batch-schedule")
    assert follower[at + 1] == f"runs/made-up/cells/{PRUNED}/checkpoint/{FILE}"
    assert "--dynamic-batch-every" not in follower and cells[FOLLOWER].after == (PRUNED,)
    (total,) = [name for name in cells if "equal-total" in name]
    assert "--dynamic-batch-every" in words(cells, total)  # from the stream's first sample on: no schedule to follow
    assert "--dynamic-batch-every" not in words(cells, "parent")


def test_each_run_has_its_own_proportions_where_the_study_asks(prefixes) -> None:
    cells = cells_of(study(prefixes, {"scratch": "own"}))
    (scratch,) = [name for name in cells if "equal-training" in name]
    assert "follows" not in scratch and "--dynamic-batch-every" in words(cells, scratch)
    assert cells[scratch].after == ()


def test_masks_are_learned_before_a_retraining_that_may_read_any_corpus(prefixes) -> None:
    """The parent takes 0:160; then masks take 40 samples, after which every corpus goes on."""
    settings = SHEARED["settings"] | {
        "domain-validation": [prefixes["steer"], prefixes["steer-more"]], "reference-losses": [2.0, 2.5],
    }  # fmt: skip
    made = study(prefixes, methods=[SHEARED | {"settings": settings}])
    cells = cells_of(made)
    learn, plan = (stage.command.words for stage in cells["pruning-sheared-llama-r50-s1"].stages[:2])
    assert learn[learn.index("--stream-range") + 1] == "160:200"
    assert learn[learn.index("--dynamic-batch-every") + 1] == "3" and "--reference-losses" in learn
    assert not any(word in plan for word in ("--dynamic-batch-every", "--domain-validation", "--reference-losses"))
    (retrained,) = [name for name in cells if name.startswith("pruned-sheared-llama")]
    assert words(cells, retrained)[words(cells, retrained).index("--stream-range") + 1] == "160:240"


@pytest.mark.parametrize(
    ("changes", "dynamic", "says"),
    [
        ({}, {"validation": ["a"]}, "recipe.dynamic_batch.validation: expected 2 entries"),
        ({}, {"references": [1.0]}, "recipe.dynamic_batch.references: expected 2 entries"),
        ({}, {"references": [1.0, float("nan")]}, "references"),
        ({}, {"references": [1.0, -1.0]}, "references"),
        (
            {"data": {"epochs": 2}},
            {},
            "recipe.dynamic_batch: expected it with .* one epoch, got 2 corpora in data.train and data.epochs 2",
        ),
        ({"recipe": {"lr": [1e-3, 2e-3]}}, {}, "recipe.dynamic_batch.scratch: expected own"),
        ({"recipe": {"arguments": {"batch-schedule": "x"}}}, {}, "recipe.arguments.batch-schedule"),
    ],
)
def test_sections_that_cannot_be_meant_are_refused(prefixes, changes, dynamic, says) -> None:
    base = made_up.mapping({})["recipe"] | {"dynamic_batch": None}
    if "recipe" in changes:
        section = {"every": 4, "validation": [prefixes["steer"], prefixes["steer-more"]], "references": [2.0, 2.5]}
        changes = {"recipe": base | changes["recipe"] | {"dynamic_batch": section}}
    with pytest.raises(UsageError, match=says):
        study(prefixes, dynamic, **changes)


def test_what_a_study_cannot_run_is_refused_before_it_starts(prefixes, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    validate.check(study(prefixes), PLACES)
    for dynamic, error, says in (
        ({"every": 10}, UsageError, "recipe.dynamic_batch.every: expected less than the 10 steps of pruned-shortgpt"),
        ({"samples": 500}, UsageError, "the samples of each corpus: expected 1 to 124"),
        ({"validation": [prefixes["steer"], prefixes["more"]]}, DataError, "are in"),
        ({"validation": [prefixes["steer"], prefixes["test"]]}, DataError, "are in"),
    ):
        with pytest.raises(error, match=says):
            validate.check(study(prefixes, dynamic), PLACES)
    one = SHEARED["settings"] | {"domain-validation": [prefixes["steer"]], "reference-losses": [2.0, 2.5]}
    for settings, says in (
        (one, "settings.domain-validation: expected 2 entries, one for each"),
        (
            SHEARED["settings"] | {"dynamic-batch-every": "soon"},
            "dynamic-batch-every: expected a whole number, got soon",
        ),
    ):
        with pytest.raises(UsageError, match=says):
            validate.check(study(prefixes, methods=[SHEARED | {"settings": settings}]), PLACES)


# Which runs may be compared.

RULE = {"every": 20, "references": [1.0, 2.0], "validation": ["a", "b"], "samples": 5}


def scheduled(account: dict[str, Any], begins: tuple[int, ...] = (1000, 600), *, second: float = 0.3, **changes: Any):
    """The account of a run whose proportions changed once, and its schedule."""
    made = Schedule(
        account["stream"], account["range"][0], account["steps"], 16, 30, 1, begins, (5000, 5000), RULE
    )  # fmt: skip
    made.extend((0.6, 0.4))
    while made.next_step is not None:
        made.extend((1 - second, second), (1.0, 2.0))
    return described(account, made) | changes, made


def described(account: dict[str, Any], made: Schedule) -> dict[str, Any]:
    held = made.to_json()
    schedule = {"hash": made.hash, **{key: held[key] for key in ("every", "begins", "settings", "blocks")}}
    return account | {"batching": dict(made.settings), "schedule": schedule, "domains": made.domains}


def compared(pruned: dict[str, Any], scratch: dict[str, Any], *, follows: bool) -> dict[str, match.Line]:
    made = replace(test_match.runs(pruned, scratch, parent=test_match.PARENT | {"domains": [[0, 1000], [0, 600]]}),
                   follows=follows)  # fmt: skip
    return {line.field: line for line in match.equal_training(made)}


def test_two_runs_under_one_schedule_match() -> None:
    pruned, schedule = scheduled(test_match.PRUNED)
    lines = compared(pruned, described(test_match.EQUAL_TRAINING, followed(schedule, 50)), follows=True)
    assert lines["schedule of batches"].verdict == "equal"
    assert lines["ranges against the parent's"].verdict == "disjoint"


def test_runs_under_different_schedules_are_different_data() -> None:
    pruned, schedule = scheduled(test_match.PRUNED)
    other, _ = scheduled(test_match.EQUAL_TRAINING, second=0.5)
    for scratch, follows, says in (
        (other, True, "block of step 30"),
        (test_match.EQUAL_TRAINING, True, "run-s has fixed proportions, those of run-p changed"),
        (test_match.EQUAL_TRAINING, False, "run-s has fixed proportions, those of run-p changed"),
        (scheduled(test_match.EQUAL_TRAINING, begins=(1001, 599))[0], True, "first samples"),
        (described(test_match.EQUAL_TRAINING, followed(schedule, 50)), False, r"against \{'follows'"),
    ):
        with pytest.raises(AccountError, match=f"run-p and run-s may not be compared: schedule of batches: .*{says}"):
            compared(pruned, scratch, follows=follows)
    with pytest.raises(AccountError, match="run-p has fixed proportions, those of run-s changed"):
        compared(test_match.PRUNED, other, follows=False)


def test_runs_of_their_own_schedules_match_where_the_study_asks_for_it() -> None:
    pruned, _ = scheduled(test_match.PRUNED)
    other, _ = scheduled(test_match.EQUAL_TRAINING, second=0.5)
    line = compared(pruned, other, follows=False)["schedule of batches"]
    assert line.pruned != line.scratch and line.verdict == "may differ: each arm has its own, by the same rule"
    by_another_rule = copy.deepcopy(other)
    by_another_rule["schedule"]["settings"]["references"] = [1.0, 2.5]
    with pytest.raises(AccountError, match="schedule of batches: .*2.5"):
        compared(pruned, by_another_rule, follows=False)


def test_samples_that_the_parent_has_seen_are_found_in_each_corpus() -> None:
    pruned, schedule = scheduled(test_match.PRUNED, begins=(1000, 590))
    with pytest.raises(AccountError, match="saw 590:600 of corpus 2"):
        compared(pruned, described(test_match.EQUAL_TRAINING, followed(schedule, 50)), follows=True)


def test_an_account_and_the_schedule_next_to_it_must_agree(tmp_path: Path) -> None:
    account, schedule = scheduled(test_match.PRUNED)
    row = "{0},{1},1.0,0.1,1.0"
    rows = [row.format(step, step * 16) for step in range(1, account["steps"] + 1)]
    (tmp_path / "losses.csv").write_text("\n".join(["step,samples,loss,learning_rate,grad_norm", *rows]) + "\n")
    path = tmp_path / "account.json"
    account |= {"initial_loss": 1.0, "final_loss": 1.0}
    schedule.write(tmp_path / FILE)
    path.write_text(json.dumps(account))
    custody.check_account(path)
    for change in (
        {"domains": [[0, 1], [0, 799]]}, {"schedule": account["schedule"] | {"hash": "other"}},
        {"schedule": account["schedule"] | {"blocks": []}},
    ):  # fmt: skip
        path.write_text(json.dumps(account | change))
        with pytest.raises(AccountError, match=r"by the batch_schedule\.json next to it"):
            custody.check_account(path)


def test_a_study_begins_after_all_that_a_dynamic_parent_has_read(prefixes) -> None:
    made = study(prefixes)
    stream = outlook.stream_of(made)
    stage = {"kind": "trained", "stream": stream, "range": [0, 160], "batching": RULE, "domains": [[0, 60], [0, 100]]}
    end = outlook.end_on_stream(made, [stage])
    corpora = blend.members(blend.parse_blend(made.data.blend))
    (_, first), (_, second) = blend.ranges(corpora, 16, 0, end)
    assert first >= 60 and second == 100 and end > 160


def test_text_that_steers_was_not_read_by_the_parent(prefixes) -> None:
    stream = {"id": "another", "seed": 1, "seq_length": 16, "epochs": 1, "blend": [[None, prefixes["steer-more"]]],
              "corpora": [indexed.fingerprint(prefixes["steer-more"])]}  # fmt: skip
    stage = {"kind": "trained", "run": "older", "stream": stream, "range": [0, 10]}
    with pytest.raises(DataError, match=r"document\(s\) of domain validation .*steer-more.* which older, a training"):
        validate.check_unseen(study(prefixes), [stage])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_with_dynamic_batches_is_believed(prefixes, tmp_path: Path) -> None:
    """On the real engine: masks, retraining and the run that follows it, each with its account; both settings."""
    names = ("train", "more", "calibration", "validation", "test", "steer", "steer-more")
    held = {name: prefixes[name] for name in names}
    settings = SHEARED["settings"] | {
        "dynamic-batch-every": 3, "domain-validation": [held["steer"], held["steer-more"]],
        "reference-losses": [2.0, 2.5], "domain-samples": 20, "global-batch-size": 8,
    }  # fmt: skip
    content = made_up.mapping(
        {name: held[name] for name in ("calibration", "validation", "test")},
        parent={"pretrain": {"tokens": 5_120, "arguments": test_end_to_end.ARGUMENTS}},
        methods=[{"name": "shortgpt"}, SHEARED | {"settings": settings, "tokens": 1_280}],
        budgets=[2_560],
        launch={"threads": 1},
    )
    content["data"]["train"] = [[2, held["train"]], [1, held["more"]]]
    content["recipe"]["dynamic_batch"] = {
        "every": 6, "validation": [held["steer"], held["steer-more"]], "references": [2.0, 2.5], "samples": 20,
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    test_end_to_end.finish(tmp_path)
    with contextlib.chdir(tmp_path):
        found = results.collect(PLACES)
    assert not found.disbelieved and not found.left_out
    lines = {
        (item.comparison.pruning.method.name, item.comparison.setting): {line.field: line for line in item.match}
        for item in found.compared
    }
    assert lines["shortgpt", "equal-training"]["schedule of batches"].verdict == "equal"
    assert (
        lines["sheared-llama", "equal-training"]["schedule of batches"].verdict
        == "equal in the 20 steps that both have"
    )
    for method in ("shortgpt", "sheared-llama"):
        assert lines[method, "equal-total"]["schedule of batches"].verdict.startswith(
            "may differ: each arm has its own"
        )
