"""Studies with both objectives: their cells, what is shared, what the start and the teacher give, and its worth.

Losses follow laws (``simulated``), so that the answers are known; intervals are SciPy's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_prune import artifacts
from megatron_prune.errors import AccountError, UsageError
from megatron_prune.study import estimate, jobs, outlook, validate
from megatron_prune.study.analysis import effects, results
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import Subject
from megatron_prune.study.jobs import Cell
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from megatron_prune.study.schema import StudyConfig
from megatron_prune.training import objective
from tests.study import made_up, simulated

BOTH = ["lm", "distill"]
BUDGETS, TAUGHT = [2_560, 5_120, 10_240, 40_960], 5_120
CACHE = {"teacher": "cache", "top_k": 8, "alpha": [1.0, 0.5], "budgets": [TAUGHT]}
DEPTH = {"name": "shortgpt"}


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """One method, four budgets of text alone, one of them distilled from a cache, three seeds."""
    folder = tmp_path_factory.mktemp("four-arms")
    study = made_up.study(
        made_up.corpora(folder, train=60_000), name="four-arms", methods=[DEPTH], budgets=BUDGETS, seeds=[1, 2, 3],
        settings=["equal-training"], objectives=BOTH, distill=CACHE,
    )  # fmt: skip
    return made_up.run(study, folder / "runs", simulated.Launcher())


@pytest.fixture(scope="module")
def found(study_folder: Places) -> Results:
    return results.collect(study_folder)


def losses(found: Results, arm: str, what: str, budget: int = TAUGHT) -> np.ndarray:
    """Test losses by seed, from results.csv's rows."""
    rows = {
        row["seed"]: row["test_loss"]
        for row in found.rows
        if (row["arm"], row["objective"], row["tokens_train"]) == (arm, what, budget)
    }
    return np.array([rows[seed] for seed in (1, 2, 3)])


# ------------------------------------------------------------------ cells


def cells(study: StudyConfig, places: Places) -> dict[str, Cell]:
    return {cell.id: cell for cell in jobs.all_cells(study, places, outlook.look(study, places))}


def argv(cell: Cell) -> list[str]:
    return list(cell.stages[0].command.argv)


def test_every_arm_is_made_once_for_each_objective(study_folder: Places, found: Results) -> None:
    made = cells(found.study, study_folder)
    pruned = {name for name in made if name.startswith("pruned-")}
    assert pruned == {
        f"pruned-shortgpt-r50-s{seed}-t{tokens}{what}"
        for seed in (1, 2, 3)
        for tokens, what in [*((budget, "") for budget in BUDGETS), (TAUGHT, "-distill")]
    }
    assert sum(name.startswith("scratch-") for name in made) == 3 * 5
    for name, cell in made.items():
        if name.startswith(("pruned-", "scratch-")):
            distilled = {word for word in argv(cell) if word.startswith(("--objective", "--distill", "--teacher"))}
            flags = {"--objective", "--distill-alpha", "--distill-temperature", "--distill-kl", "--teacher-cache"}
            assert distilled == (flags if "distill" in name else set()), name


def test_one_cache_serves_every_run_of_a_parent(study_folder: Places, found: Results) -> None:
    """The parent has samples 0 to 160; 5,120 tokens are 320 samples of 16."""
    made = cells(found.study, study_folder)
    [taught] = [cell for cell in made.values() if cell.kind == "teaching"]
    assert taught.id == "teach-160-480" and taught.after == ("parent",)
    words = made_up.words(argv(taught)[1:])
    assert words["stream_range"] == "160:480" and words["top_k"] == "8"
    assert words["load"] == str(study_folder.checkpoint("parent"))
    for name, cell in made.items():
        assert (taught.id in cell.after) == ("distill" in name)
        if "distill" in name:
            assert made_up.words(argv(cell)[1:])["teacher_cache"] == words["output"]
    assert made_up.words(argv(made["pruned-shortgpt-r50-s1-t5120-distill"])[1:])["distill_alpha"] == "1:0.5"


def test_an_online_teacher_is_the_parent_of_the_seed(tmp_path: Path) -> None:
    study = made_up.study(
        made_up.corpora(tmp_path), methods=[DEPTH], seeds=[1, 2], parent_per_seed=True, objectives=["distill"],
        settings=["equal-training"],
    )  # fmt: skip
    made = cells(study, Places(tmp_path / "runs"))
    trained = [cell for name, cell in made.items() if name.startswith(("pruned-", "scratch-"))]
    assert len(trained) == 4 and not [cell for cell in made.values() if cell.kind == "teaching"]
    for cell in trained:
        seed = cell.about["seed"]
        assert f"parent-s{seed}" in cell.after
        assert made_up.words(argv(cell)[1:])["teacher"] == str(Places(tmp_path / "runs").checkpoint(f"parent-s{seed}"))


def test_matched_blocks_are_flags_of_every_distilled_run(tmp_path: Path) -> None:
    matched = {"hidden_states": ["1:2", "2:4"], "hidden_weight": 0.5}
    study = made_up.study(
        made_up.corpora(tmp_path), methods=[DEPTH], objectives=BOTH, settings=["equal-training"], distill=matched
    )
    for name, cell in cells(study, Places(tmp_path / "runs")).items():
        if name.startswith(("pruned-", "scratch-")):
            given = argv(cell)
            assert ("--distill-hidden-states" in given) == ("distill" in name), name
            if "distill" in name:
                first = given.index("--distill-hidden-states")
                assert given[first + 1 : first + 3] == ["1:2", "2:4"]
                assert made_up.words(given[1:])["distill_hidden_weight"] == "0.5"


@pytest.mark.parametrize(("pair", "fits"), [("2:4", True), ("3:4", False), ("2:5", False)])
def test_matched_blocks_are_those_of_every_student(tmp_path: Path, pair: str, fits: bool) -> None:
    """The parent has four blocks, and its half in depth two."""
    study = made_up.study(
        made_up.corpora(tmp_path), methods=[{"name": "minitron-width", "settings": {"divisible-by": 8}}, DEPTH],
        objectives=["distill"],
        settings=["equal-training"], distill={"hidden_states": ["1:1", pair]},
    )  # fmt: skip
    if fits:
        validate.check(study, Places(tmp_path / "runs"))
    else:
        message = (
            f"distill.hidden_states: expected blocks up to 2:4, which shortgpt-r50.* and its teacher have, got {pair}"
        )
        with pytest.raises(UsageError, match=message):
            validate.check(study, Places(tmp_path / "runs"))


def test_ranges_with_another_first_sample_have_a_cache_of_their_own(tmp_path: Path) -> None:
    """Scratch at equal total begins with sample 0; with two parents there are two of each."""
    common: dict[str, Any] = {"methods": [DEPTH], "objectives": BOTH, "budgets": [1280, 2560]}
    prefixes, places = made_up.corpora(tmp_path, train=20_000), Places(tmp_path / "runs")
    cached = {"teacher": "cache", "top_k": 8}
    made = cells(made_up.study(prefixes, distill=cached, **common), places)
    taught = {name for name, cell in made.items() if cell.kind == "teaching"}
    assert {name.rsplit("-", 1)[0] for name in taught} == {"teach-0", "teach-160"} and len(taught) == 2
    assert "teach-160-320" in taught
    two = cells(made_up.study(prefixes, distill=cached, seeds=[1, 2], parent_per_seed=True, **common), places)
    assert {name for name in two if name.startswith("teach-160")} == {"teach-160-320-s1", "teach-160-320-s2"}
    [seconds] = [argv(cell) for name, cell in two.items() if name == "teach-160-320-s2"]
    assert made_up.words(seconds[1:])["load"] == str(places.checkpoint("parent-s2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"alpha": 0.5}}, "distill: expected distill among objectives"),
        ({"objectives": BOTH, "distill": {"teacher": "cache"}}, "distill.top_k: expected a number"),
        ({"objectives": BOTH, "distill": {"teacher": "cache", "top_k": 8, "temperature": 2.0}},
         "distill.temperature: expected 1 with teacher: cache, got 2"),
        ({"objectives": BOTH, "distill": {"top_k": 8}}, "distill.top_k: expected no such key"),
        ({"objectives": BOTH, "distill": {"alpha": 1.5}}, "distill.alpha"),
        ({"objectives": BOTH, "distill": {"hidden_states": ["0:1"]}}, "distill.hidden_states.0"),
        ({"objectives": BOTH, "distill": {"hidden_states": ["1:1", "1:2"]}}, "each block of the student once"),
        ({"objectives": BOTH, "distill": {"hidden_weight": 1.0}}, "distill.hidden_weight: expected hidden_states"),
        ({"objectives": BOTH, "distill": {"teacher": "cache", "top_k": 8, "hidden_states": ["1:1"]}},
         "distill.hidden_states: expected teacher: online"),
        ({"objectives": BOTH, "distill": {"hidden_states": ["1:1"]}, "launch": {"nproc": 2, "pipeline_parallel": 2}},
         "distill.hidden_states: expected no such key with launch.pipeline_parallel"),
        ({"objectives": BOTH, "distill": {"budgets": [7]}}, "distill.budgets: expected those of budgets: 1280"),
        ({"objectives": ["distill"], "distill": {"budgets": [1280]}}, "distill.budgets: expected no such key"),
        ({"objectives": ["lm", "lm"]}, "different values"),
        ({"recipe": {"lr": 1e-3, "global_batch_size": 8, "micro_batch_size": 4, "arguments": {"teacher": "x"}}},
         "recipe.arguments.teacher"),
    ],
)  # fmt: skip
def test_what_an_objective_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    prefixes = {name: name for name in ("train", "calibration", "validation", "test")}
    with pytest.raises(UsageError, match=re.escape(message)):
        made_up.study(prefixes, **changes)


# ------------------------------------------------------------------ answers


def test_the_answers_are_sums_over_runs_with_scipys_intervals(found: Results) -> None:
    [four] = found.four_arms
    runs = {(arm, what): losses(found, arm, what) for arm in ("pruned", "scratch") for what in BOTH}
    gaps = {what: runs["scratch", what] - runs["pruned", what] for what in BOTH}
    given = {arm: runs[arm, "lm"] - runs[arm, "distill"] for arm in ("pruned", "scratch")}
    wanted = {
        "start": (gaps["lm"] + gaps["distill"]) / 2,
        "teacher": (given["pruned"] + given["scratch"]) / 2,
        "interaction": gaps["distill"] - gaps["lm"],
    }
    effects = {effect.question: effect for effect in four.effects}
    for question in ("start", "teacher"):  # nothing is shared with other comparisons
        own = stats.ttest_1samp(wanted[question], 0)
        interval = own.confidence_interval(0.95)
        effect = effects[question].gap
        assert effect.mean == pytest.approx(wanted[question].mean(), rel=1e-12)
        assert (effect.low, effect.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        assert effect.p == pytest.approx(own.pvalue)
    assert effects["interaction"].gap.mean == pytest.approx(wanted["interaction"].mean(), rel=1e-9)
    parts = effects["teacher"].simple
    assert {arm: part.mean for arm, part in parts.items()} == {
        arm: pytest.approx(values.mean()) for arm, values in given.items()
    }
    assert effects["start"].simple["distilled"].mean == pytest.approx(gaps["distill"].mean())


def test_the_answers_are_the_truth_that_was_simulated(found: Results) -> None:
    effects = {effect.question: effect for effect in found.four_arms[0].effects}
    given, gap = simulated.TAUGHT, simulated.scratch(TAUGHT) - simulated.pruned(TAUGHT, 0.5)
    between = given["pruned"] - given["scratch"]
    truth = {"start": gap + between / 2, "teacher": sum(given.values()) / 2, "interaction": between}
    assert {name: effect.gap.mean for name, effect in effects.items()} == {
        name: pytest.approx(value, abs=4 * simulated.NOISE) for name, value in truth.items()
    }
    assert {name: effect.outcome for name, effect in effects.items()} == {
        "start": "more", "teacher": "more", "interaction": "less"
    }  # fmt: skip
    assert all(effect.family == 3 for effect in effects.values())


def test_the_worth_of_a_teacher_is_where_text_alone_comes_to_the_same_loss(found: Results) -> None:
    worth = {one.arm: one for one in found.four_arms[0].worth}
    for arm, given in simulated.TAUGHT.items():
        curve = np.array([losses(found, arm, "lm", budget) for budget in BUDGETS])
        logs = [
            float(np.interp(-loss, -curve[:, seed], np.log(BUDGETS)))
            for seed, loss in enumerate(losses(found, arm, "distill"))
        ]
        own = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
        assert worth[arm].plain == pytest.approx(np.exp(np.mean(logs)))
        assert (worth[arm].low, worth[arm].high) == (pytest.approx(np.exp(own.low)), pytest.approx(np.exp(own.high)))
        law = simulated.scratch if arm == "scratch" else (lambda tokens: simulated.pruned(tokens, 0.5))
        assert law(worth[arm].plain or 0) == pytest.approx(law(TAUGHT) - given, abs=0.06)


SUBJECT = Subject(method="m", pattern=None, ratio=0.5, setting="equal-training", against="dense", sparse=False)


@pytest.mark.parametrize(
    ("loss", "status", "plain"),
    [(4.0, "inside", 10), (3.5, "inside", 31.6227766), (3.0, "inside", 100), (2.99, "beyond", None),
     (4.01, "below", None)],
)  # fmt: skip
def test_worth_is_stated_inside_the_measured_budgets_only(loss: float, status: str, plain: float | None) -> None:
    curves = np.array([[4.0, 3.0, 3.2]])  # text alone on 10, 100 and 1,000 tokens
    made = effects.worth(SUBJECT, "pruned", 10, [10, 100, 1000], curves, np.array([loss]))
    assert made.status == status and made.low is None
    assert made.plain == (None if plain is None else pytest.approx(plain))
    assert ("worth more than 1,000" in made.words) == (status == "beyond")


def test_one_seed_outside_is_enough_to_state_nothing() -> None:
    curves = np.array([[4.0, 3.0], [4.0, 3.5]])
    made = effects.worth(SUBJECT, "scratch", 10, [10, 100], curves, np.array([3.2, 3.4]))
    assert (made.status, made.plain) == ("beyond", None)
    inside = effects.worth(SUBJECT, "scratch", 10, [100, 10], curves[:, ::-1], np.array([3.5, 3.75]))
    assert inside.plain == pytest.approx(10**1.5) and list(inside.curve) == [10, 100]


def test_the_report_opens_with_the_answers(study_folder: Places, found: Results) -> None:
    text = page.write(found, study_folder).read_text()
    assert text.index("The start and the teacher, equal training tokens") < text.index("<h2>Equal training tokens</h2>")
    first, second = (text.index(f'id="figure-{name}"') for name in ("teacher", "gaps"))
    assert first < second
    written = artifacts.read_json(study_folder.root / "report" / "results.json")
    [four] = written["teacher"]
    assert [effect["question"] for effect in four["effects"]] == ["start", "teacher", "interaction"]
    assert {one["arm"] for one in four["worth"]} == {"pruned", "scratch"}
    assert {row["objective"] for row in written["rows"]} == {"lm", "distill", None}
    for effect in found.four_arms[0].effects:
        assert effect.claim in text
    assert (study_folder.root / "report" / "tables" / "worth.csv").is_file()


# ------------------------------------------------------------------ accounts


def test_rows_and_totals_count_the_teacher(study_folder: Places, found: Results) -> None:
    behind = next(row for row in found.rows if row["arm"] == "parent")["flops_total"]
    for row in found.rows:
        if row["arm"] == "parent":
            continue
        account = artifacts.read_json(study_folder.account(row["cell"]))
        assert (row["flops_teacher"] > 0) == (row["objective"] == "distill")
        assert row["flops_teacher"] == account["flops_teacher"] if row["flops_teacher"] else True
        own = account["flops_executed"] + row["flops_teacher"]
        before = behind + row["flops_pruning"] if row["arm"] == "pruned" else 0
        assert row["flops_total"] == own + before
    accounts = [artifacts.read_json(path) for path in study_folder.root.glob("cells/*/checkpoint/account.json")]
    record = found.records["teach-160-480"]
    assert objective.paid(accounts) == record["flops"]
    assert record["tokens"] == TAUGHT and record["bytes"] == TAUGHT * record["bytes_per_token"]


def test_the_plan_has_the_teachers_price(study_folder: Places, found: Results, tmp_path: Path) -> None:
    known = outlook.look(found.study, study_folder)
    planned = {one.cell: one for one in estimate.of_study(found.study, known)}
    record = found.records["teach-160-480"]
    cache = planned["teach-160-480"]
    assert (cache.flops, cache.tokens, cache.storage) == (record["flops"], record["tokens"], record["bytes"])
    assert cache.after == ("parent",)
    run = "pruned-shortgpt-r50-s1-t5120-distill"
    account = artifacts.read_json(study_folder.account(run))
    assert planned[run].flops == account["flops_executed"] and "teach-160-480" in planned[run].after
    online = made_up.study(
        made_up.corpora(tmp_path), methods=[DEPTH], objectives=["distill"], settings=["equal-training", "equal-flops"],
        budgets=[TAUGHT],
    )  # fmt: skip
    [each] = [
        one for one in estimate.of_study(online, outlook.look(online, Places(tmp_path / "runs")))
        if one.cell.startswith("pruned-")
    ]  # fmt: skip
    assert each.flops == account["flops_executed"] + account["flops_teacher"] and "parent" in each.after


def test_scratch_at_equal_flops_has_fewer_steps_with_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own pass and the teacher's are as many FLOPs as the parent's, and as the retraining's and its teacher's."""
    monkeypatch.chdir(tmp_path)
    study = made_up.study(
        made_up.corpora(tmp_path), methods=[DEPTH], objectives=BOTH, settings=["equal-flops"]
    )  # fmt: skip
    places = made_up.run(study, Path("runs"), made_up.FakeLauncher())
    made = results.collect(places)
    assert [item.status for item in made.compared] == ["finished"] * 2
    steps = {}
    for row in made.rows:
        if row["arm"] == "scratch":
            account = artifacts.read_json(places.account(row["cell"]))
            steps[row["objective"]] = account["steps"]
            pruned = next(one for one in made.rows if (one["arm"], one["objective"]) == ("pruned", row["objective"]))
            per_step = row["flops_total"] // account["steps"]
            counted = pruned["flops_pruning"]
            total = pruned["flops_total"] - counted
            total += counted if counted >= 0.001 * total else 0
            assert 0 <= row["flops_total"] - total < per_step
    assert steps["distill"] < steps["lm"]
    [four] = made.four_arms
    assert {effect.question for effect in four.effects} == {"start", "teacher", "interaction"} and not four.worth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "others"}, "learned from the weights others, parent has .* remove pruned-shortgpt-r50-s1"),
        ({"kl": "reverse"}, "objective: kl: reverse against forward"),
        ({"name": "lm"}, "expected a finished run with objective distill, got lm"),
    ],
)
def test_an_account_of_another_objective_is_refused(
    study_folder: Places, found: Results, change: dict[str, str], message: str
) -> None:
    path = study_folder.account("pruned-shortgpt-r50-s1-t5120-distill")
    before = path.read_text()
    account = json.loads(before)
    account["objective"] |= change
    path.write_text(json.dumps(account))
    try:
        with pytest.raises(AccountError, match=message):
            results.collect(study_folder)
    finally:
        path.write_text(before)
