"""Questions between comparisons, and measures next to the loss, against sums over runs, SciPy's tests and the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_prune import artifacts
from megatron_prune.errors import UsageError
from megatron_prune.study import questions, schema, validate
from megatron_prune.study.analysis import contrasts, inference, results
from megatron_prune.study.analysis.contrasts import ContrastResult, Weighted
from megatron_prune.study.analysis.inference import Difference, Scatter
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from tests.study import made_up, simulated
from tests.study.answers_made_up import differences
from tests.study.families import Study
from tests.study.sums_made_up import QUESTIONS, answers

COMPARE: list[dict[str, Any]] = [
    {"kind": "larger", "of": {"granularities": ["sparse"]}, "than": {"granularities": ["depth"], "ratios": [0.5]}},
    {"kind": "vanishes", "of": {"methods": ["shortgpt"], "ratios": [0.5]}, "margin": 0.5},
    {"kind": "trend", "of": {"methods": ["shortgpt"]}, "along": "ratio", "label": "Depth as more is removed"},
    {"kind": "trend", "of": {"methods": ["shortgpt"]}, "along": "tokens"},
    {"kind": "larger", "of": {"granularities": ["sparse"]}, "than": {"granularities": ["depth"]}, "measure": "mine"},
    {"kind": "larger", "arm": "scratch", "of": {"granularities": ["sparse"], "ratios": [0.5]},
     "than": {"granularities": ["depth"], "ratios": [0.5]}},
]  # fmt: skip
SETTINGS = ["equal-training", "equal-total"]


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Depth at two ratios and sparse at half, two budgets, both settings, three seeds; two corpora and three tasks."""
    folder = tmp_path_factory.mktemp("compared")
    prefixes = made_up.corpora(folder, train=60_000, more=("c4", "wikitext"))
    corpora = {name: prefixes.pop(name) for name in ("c4", "wikitext")}
    evaluation = {
        "windows": 16, "corpora": corpora, "tasks": ["mine", "third"],
        "suites": {"mine": {"first": "acc_norm", "second": "acc"}},
    }  # fmt: skip
    methods = [
        {"name": "shortgpt"},
        {"name": "magnitude", "pattern": "unstructured", "compare": {name: ["dense"] for name in SETTINGS}},
    ]
    study = made_up.study(
        prefixes, name="compared", methods=methods, ratios=[0.25, 0.5], budgets=[5_120, 20_480], seeds=[1, 2, 3],
        settings=SETTINGS, evaluation=evaluation, compare=COMPARE,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "check", lambda study, places: None)  # nobody's tasks
        return made_up.run(study, folder / "runs", simulated.Launcher())


@pytest.fixture(scope="module")
def found(study_folder: Places) -> Results:
    return results.collect(study_folder)


def gaps(found: Results, setting: str, method: str, ratio: float, budget: int = 20_480) -> np.ndarray:
    """Scratch minus pruned on test, by seed, straight from the runs' records."""
    own = {
        item.comparison.seed: item.comparison
        for item in found.compared
        if (item.comparison.setting, item.comparison.budget) == (setting, budget)
        and item.comparison.pruning.subject[::2] == (method, ratio)
    }
    loss = {cell: record.get("test_loss") for cell, record in found.records.items()}
    return np.array([loss[own[seed].scratch or ""] - loss[own[seed].pruned] for seed in (1, 2, 3)])


def test_of_scratch_runs_alone_the_lower_loss_is_the_larger(found: Results) -> None:
    own = one(found, 5)
    loss = {cell: record.get("test_loss") for cell, record in found.records.items()}
    scratch = {
        (item.comparison.pruning.method.name, item.comparison.seed): loss[item.comparison.scratch or ""]
        for item in found.compared
        if item.group.items() >= {"setting": "equal-total", "tokens": 20_480, "ratio": 0.5}.items()
    }
    drawn = [scratch["shortgpt", seed] - scratch["magnitude", seed] for seed in (1, 2, 3)]
    assert own.gap.mean == pytest.approx(np.mean(drawn)) and abs(np.mean(drawn)) > 1e-3
    words = {"larger": "Scratch ends lower than for depth", "smaller": "Scratch ends higher than for depth"}
    assert words.get(own.outcome, "Scratch cannot be told from scratch for depth") in own.sentence
    assert "difference of the losses" in own.sentence
    pair = Weighted(1.0, {1: ("p", "s")}, Scatter(2.0, 5.0, 20.0, 8), "scratch")
    both = contrasts.shared([pair, Weighted(-1.0, {1: ("q", "t")}, pair.scatter, "scratch")], 1)
    assert both is not None and both.variance == pytest.approx(2.0)  # two runs, not four


def one(found: Results, number: int, setting: str = "equal-total") -> ContrastResult:
    [own] = [c for c in found.contrasts if c.asked == found.study.compare[number] and c.setting == setting]
    return own


def test_every_question_is_asked_in_every_setting(found: Results) -> None:
    assert [(c.asked.kind, c.setting) for c in found.contrasts] == [
        (asked["kind"], setting) for asked in COMPARE for setting in SETTINGS
    ]
    assert {c.family for c in found.contrasts} == {12}
    assert [c.corrected for c in found.contrasts] == pytest.approx(inference.holm([c.p or 0 for c in found.contrasts]))


@pytest.mark.parametrize("setting", SETTINGS)
def test_values_are_the_plain_sums_over_runs(found: Results, setting: str) -> None:
    sparse = np.mean([gaps(found, setting, "magnitude", ratio) for ratio in (0.25, 0.5)], axis=0)
    depth = gaps(found, setting, "shortgpt", 0.5)
    assert one(found, 0, setting).gap.mean == pytest.approx((sparse - depth).mean())
    assert one(found, 1, setting).gap.mean == pytest.approx(depth.mean())
    slope = (depth - gaps(found, setting, "shortgpt", 0.25)).mean() / (0.5 - 0.25) * 0.1
    assert one(found, 2, setting).gap.mean == pytest.approx(slope)
    by_budget = [
        np.mean([gaps(found, setting, "shortgpt", ratio, budget).mean() for ratio in (0.25, 0.5)])
        for budget in (5_120, 20_480)
    ]
    assert one(found, 3, setting).gap.mean == pytest.approx((by_budget[1] - by_budget[0]) / 2)  # two doublings


def test_the_truth_of_the_made_up_laws_is_found(found: Results) -> None:
    """By the laws the pruned loss rises by 0.04 nats per 10% removed, and more tokens help scratch more."""
    ratio, tokens = one(found, 2), one(found, 3)
    assert ratio.gap.low is not None and ratio.gap.high is not None
    assert ratio.gap.low < -0.04 < ratio.gap.high and ratio.outcome == "falls"
    assert tokens.outcome == "falls" and "The advantage of pruning shrinks" in tokens.sentence
    sparse = one(found, 0)  # half of them with a quarter removed, against half removed: 0.4 * (0.5 - 0.375)
    assert sparse.gap.low is not None and sparse.gap.high is not None
    assert sparse.gap.low < 0.05 < sparse.gap.high and sparse.outcome == "larger"
    assert (
        "Sparse against depth at 50%, against dense scratch, equal total tokens: The advantage of pruning is larger"
        in sparse.sentence
    )


@pytest.mark.parametrize("mean", [0.0, 0.03, -0.05, 0.2])
def test_equivalence_is_two_one_sided_tests_of_scipy(mean: float) -> None:
    draw = np.random.default_rng(3).normal(mean, 0.02, 5)
    gap = inference.paired(np.zeros(5), draw)
    p, inner = contrasts.equivalence(gap, 0.06)
    above = stats.ttest_1samp(draw, -0.06, alternative="greater").pvalue
    below = stats.ttest_1samp(draw, 0.06, alternative="less").pvalue
    expected = stats.ttest_1samp(draw, 0).confidence_interval(0.90)
    assert p == pytest.approx(max(above, below)) and inner == pytest.approx((expected.low, expected.high))
    assert (p < 0.05) == (-0.06 < expected.low and expected.high < 0.06)
    assert contrasts.equivalence(Difference(1, 0.0), 0.06) == (None, None)


def test_what_a_sum_shares_is_the_variance_of_its_runs() -> None:
    """Of one pair: its own. Of two with one scratch run: that run cancels."""
    scatter = Scatter(2.0, 5.0, 20.0, 8)
    pairs = [Weighted(1.0, {1: ("p", "s")}, scatter), Weighted(-1.0, {1: ("q", "s")}, scatter)]
    assert contrasts.shared(pairs[:1], 1) == scatter
    both = contrasts.shared(pairs, 1)
    assert both is not None and both.variance == pytest.approx(2.0)
    apart = contrasts.shared([pairs[0], Weighted(-1.0, {1: ("q", "t")}, scatter)], 1)
    assert apart is not None and apart.variance == pytest.approx(4.0)
    runs = np.random.default_rng(0).normal(0, 1, (100_000, 4))  # p, s, q, t: a pair has twice a run's variance
    p, s, q, t = runs.T
    assert np.var((s - p) - (s - q)) == pytest.approx(both.variance, rel=0.02)
    assert np.var((s - p) - (t - q)) == pytest.approx(apart.variance, rel=0.02)
    halves = [Weighted(0.5, {1: ("p", "s")}, scatter), Weighted(0.5, {1: ("q", "t")}, scatter)]
    assert contrasts.shared(halves, 1) is None  # a seed's effect on all runs would not cancel
    assert contrasts.shared([pairs[0], Weighted(-1.0, {1: ("q", "t")}, None)], 1) is None
    other = Weighted(-1.0, {1: ("q", "t")}, Scatter(2.0, 1.49, 20.0, 8))
    assert contrasts.shared([pairs[0], other], 1) is None  # comparisons scatter too differently


def test_sums_of_gaps_keep_their_size_and_cover_the_truth() -> None:
    """The figures of tests/benchmarks/contrasts.py, in small."""
    generator = np.random.default_rng(0)
    for study in (Study(), Study(dense=True), Study(seed=2.0), Study(spread=1.0)):
        drawn = [answers(study, generator, gap) for gap in (0.0, 5.0) for _ in range(150)]
        for question in QUESTIONS:
            held = [one.low <= truth <= one.high for one, truth in (found[question] for found in drawn)]
            assert 0.91 <= np.mean(held) <= 1.0, (study, question)


def test_measures_are_paired_by_question(found: Results, study_folder: Places) -> None:
    titles = list(dict.fromkeys(own.measure.title for own in found.measured))
    assert titles == [
        "mine, accuracy of 2 tasks",
        "first, acc_norm",
        "second, acc",
        "third, acc_norm",
        "c4, loss",
        "wikitext, loss",
    ]
    [own] = [
        own
        for own in found.measured
        if (own.measure.name, own.setting, own.budget, own.method, own.ratio)
        == ("mine", "equal-total", 20_480, "shortgpt", 0.5)
    ]
    tables = []
    for task, metric in (("first", "acc_norm"), ("second", "acc")):
        scores = [
            [artifacts.read_json(study_folder.scores(cell))["tasks"]["questions"][task]["scores"][metric]
             for cell in (item.comparison.pruned, item.comparison.scratch)]
            for item in found.compared if item.group.items() >= {"setting": "equal-total", "tokens": 20_480,
                                                                  "method": "shortgpt", "ratio": 0.5}.items()
        ]  # fmt: skip
        tables.append(np.array([np.subtract(*pair) for pair in scores]))
    assert [table.shape for table in tables] == [(3, 80)] * 2
    assert own.gap == inference.over_questions(tables)
    assert own.gap.mean == pytest.approx(own.pruned - own.scratch) and own.questions == 160
    suites = [o for o in found.measured if o.measure.kind == "suite"]
    assert {o.family for o in suites} == {16} and {o.family for o in found.measured if o.measure.kind == "task"} == {48}
    assert [o.corrected for o in suites] == pytest.approx(inference.holm([o.gap.p or 0 for o in suites]))


def test_the_report_and_its_json_have_the_answers_first(found: Results, study_folder: Places) -> None:
    page.write(found, study_folder)
    written = artifacts.read_json(study_folder.root / "report" / "results.json")
    assert [one["words"] for one in written["compare"]] == [contrast.sentence for contrast in found.contrasts]
    assert {one["measure"]["name"] for one in written["measures"]} == {
        "mine",
        "first",
        "second",
        "third",
        "c4",
        "wikitext",
    }
    html = (study_folder.root / "report" / "index.html").read_text()
    first = html.index('class="claims between"')
    assert first < html.index("<figure") < html.index('<table id="compare"') < html.index('<table id="measures"')
    assert "Depth as more is removed" in html
    for name in ("compare", "measures", "tasks", "scores"):
        assert (study_folder.root / "report" / "tables" / f"{name}.csv").is_file()
    scores = (study_folder.root / "report" / "tables" / "scores.csv").read_text().splitlines()
    assert len(scores) == 1 + len([r for r in found.records.values() if "tasks" in r])
    json.dumps(written, allow_nan=False)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "larger", "of": {}}, r"compare\.than: expected it with kind larger"),
        ({"kind": "trend", "of": {}, "along": "ratio", "margin": 1}, r"compare\.margin: .*got it with kind trend"),
        (
            {"kind": "trend", "of": {}, "along": "ratio", "arm": "scratch"},
            r"compare\.arm: expected it with kind larger",
        ),
        (
            {"kind": "larger", "of": {}, "than": {}, "arm": "scratch", "measure": "c4"},
            r"compare\.0\.measure: expected test",
        ),
        ({"kind": "vanishes", "of": {"methods": ["x"]}, "margin": 1}, r"compare\.0\.of\.methods: .*got x"),
        ({"kind": "vanishes", "of": {}, "margin": 1, "measure": "c5"}, r"compare\.0\.measure: expected test"),
        ({"kind": "vanishes", "of": {"granularities": ["deep"]}, "margin": 1}, r"granularities"),
    ],
)
def test_questions_that_cannot_be_asked(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        schema.from_mapping(made_up.mapping(made_up.corpora(tmp_path), compare=[entry]))


def test_a_side_without_comparisons_is_refused_before_anything_runs(tmp_path: Path) -> None:
    prefixes = made_up.corpora(tmp_path)
    for side, selection in (
        ("of", {"granularities": ["sparse"]}),
        ("than", {"methods": ["shortgpt"], "patterns": ["2:4"]}),
    ):
        entry = {"kind": "larger", "of": {}, "than": {}, side: selection}
        methods = [{"name": "shortgpt"}, {"name": "magnitude", "pattern": "2:4"}]
        if side == "of":
            methods.pop()
        with pytest.raises(UsageError, match=rf"compare\.0\.{side}: expected comparisons that the study has"):
            validate.check(made_up.study(prefixes, methods=methods, compare=[entry]), Places(tmp_path / "runs"))


def test_intervals_of_accuracies_cover_the_truth() -> None:
    """The figures of tests/benchmarks/task_intervals.py, in small."""
    for seeds, tasks, deviation in ((1, [60], 0.0), (3, [60], 0.1), (3, [40, 90], 0.1), (3, [60], 0.0)):
        drawn, truth = differences(np.random.default_rng(seeds), 400, seeds, tasks, seed=deviation)
        made = [inference.over_questions([table[study] for table in drawn]) for study in range(400)]
        covered = np.mean([m.low <= truth <= m.high for m in made if m.low is not None and m.high is not None])
        assert 0.92 <= covered <= 0.99, (seeds, tasks, deviation)
        assert all((m.p < 0.05) == (m.winner != "neither") for m in made if m.p is not None)


def test_one_seed_and_one_task_is_the_paired_t_over_questions() -> None:
    table = np.random.default_rng(0).integers(-1, 2, (1, 200)).astype(float) + 0.1
    own = inference.over_questions([table])
    expected = stats.ttest_1samp(table[0], 0)
    interval = expected.confidence_interval(0.95)
    assert (own.low, own.high, own.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert inference.over_questions([table[:, :29]]) == Difference(1, float(table[0, :29].mean()))


def test_many_questions_leave_the_t_interval_over_seeds() -> None:
    """Where questions contribute nothing, seeds alone do."""
    seeds = np.array([0.1, -0.05, 0.2, 0.02])
    table = np.tile(seeds[:, None], (1, 500))
    own = inference.over_questions([table])
    interval = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    assert (own.low, own.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    assert own.freedom == pytest.approx(3, rel=1e-3)
