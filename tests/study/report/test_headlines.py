"""The conclusion: a sentence for each setting and granularity, its interval, and claims that it must not make."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_prune.study import prunings, schema
from megatron_prune.study.analysis import headlines, results
from megatron_prune.study.analysis.headlines import Headline
from megatron_prune.study.analysis.inference import Difference, OverDocuments
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.verdicts import Verdict, corrected, judge
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import page
from tests.study import made_up


def verdict(
    pruned: list[float], scratch: list[float], documents: OverDocuments | None = None, **changes: Any
) -> Verdict:
    subject = {"method": "shortgpt", "pattern": None, "ratio": 0.5, "setting": "equal-total", "against": "dense"}
    sides = [[{"validation_loss": loss, "test_loss": loss} for loss in side] for side in (pruned, scratch)]
    return judge(tokens=1280, budget=1280, pruned=sides[0], scratch=sides[1], documents=documents,
                 **(subject | {"sparse": False} | changes))  # fmt: skip


def headline(*verdicts: Verdict, test: Difference | None = None, documents: OverDocuments | None = None) -> Headline:
    return Headline("depth", "equal-total", False, False, test or verdicts[0].test, documents or verdicts[0].documents,
                    verdicts, verdicts)  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "winner"), [(0.01, 0.05, "pruned"), (-0.01, 0.05, "neither"), (-0.05, -0.01, "scratch")]
)
def test_of_one_seed_the_documents_decide(low: float, high: float, winner: str) -> None:
    """A difference whose interval over documents contains zero does not count, whatever the sign of its mean."""
    mean = (low + high) / 2
    found = verdict([2.0], [2.0 + mean], OverDocuments(85, low, high))
    assert (found.test.winner != "neither") and (found.winner, found.shown_winner) == (winner, winner)
    assert ("ends lower" in found.words) == (winner != "neither")
    said = headline(found)
    assert said.winner == winner and ("ends lower" in said.sentence) == (winner != "neither")
    assert f"{min(abs(low), abs(high)):.3f}" in said.sentence and "over 85 documents" in said.sentence


def test_an_interval_over_documents_that_holds_zero_undoes_one_over_seeds() -> None:
    found = verdict([2.0, 2.0, 2.0], [2.1, 2.11, 2.09], OverDocuments(40, -0.01, 0.2))
    assert found.test.low is not None and found.test.low > 0
    assert found.winner == headline(found).winner == "neither" and "cannot be told apart" in found.words


def test_no_interval_no_claim() -> None:
    said = headline(found := verdict([2.0], [2.5]))
    assert found.shown_winner == said.winner == "neither" and said.interval is None
    assert said.claim == "No interval, so no verdict" and "ends lower" not in said.sentence


def test_a_mean_claims_no_more_than_its_verdicts() -> None:
    ahead, behind = verdict([2.0, 2.0], [2.5, 2.51]), verdict([2.0, 2.0], [1.9, 1.901])
    mean = Difference(2, 0.2, 0.1, 0.3)
    assert headline(ahead, ahead, test=mean).winner == "pruned"
    mixed = headline(ahead, behind, test=mean)
    assert mixed.winner == "neither" and "pruned ahead in 1, scratch ahead in 1 of 2" in mixed.sentence
    undecided = verdict([2.0, 2.0], [1.5, 2.6])
    assert headline(undecided, undecided, test=mean).winner == "neither"
    weak = corrected([verdict([2.0, 2.0, 2.0], [2.1, 2.2, 2.15])], lambda _: True, planned=30)[0]
    assert weak.test.low is not None and weak.test.low > 0  # its interval alone would suffice
    said = headline(weak)
    assert said.winner == "neither" and "after Holm's correction over 30 comparisons" in said.sentence


def test_the_mean_of_several_is_a_paired_t_over_seeds(simulated_study: Places) -> None:
    """Against scipy, from the scores of the runs themselves."""
    found = results.collect(simulated_study)
    assert [(one.granularity, one.setting) for one in found.headlines] == [
        ("depth", "equal-training"), ("depth", "equal-total"),
    ]  # fmt: skip
    for one in found.headlines:
        items = [i for i in found.compared if i.comparison.setting == one.setting and i.tokens == 40_960]
        gaps = np.zeros((3, 2))
        for item in items:
            made = item.comparison
            losses = [json.loads(simulated_study.scores(cell).read_text())["corpora"]["test"]["loss"]
                      for cell in (made.pruned, made.scratch)]  # fmt: skip
            gaps[made.seed - 1, [0.25, 0.5].index(made.pruning.ratio or 0)] = losses[1] - losses[0]
        truth = stats.ttest_1samp(gaps.mean(axis=1), 0).confidence_interval(0.95)
        assert one.interval == pytest.approx((truth.low, truth.high))
        assert len(one.verdicts) == 2 and len(one.every) == 10 and "Over all 5 budgets" in one.sentence


METHODS = [
    ({"name": "shortgpt"}, "depth"),
    ({"name": "minitron-width"}, "width"),
    ({"name": "random", "settings": {"axis": "width"}}, "width"),
    ({"name": "random", "label": "by-target", "target": {"num-layers": 2}}, "depth"),
    ({"name": "random", "label": "both", "target": {"num-layers": 2, "ffn-hidden-size": 32}}, "depth and width"),
    ({"name": "wanda", "pattern": "2:4"}, "sparse"),
    ({"chain": [{"name": "shortgpt", "ratio": 0.5}, {"name": "wanda", "pattern": "2:4"}]}, "depth and sparse"),
]


@pytest.mark.parametrize(("method", "kind"), METHODS)
def test_granularities(method: dict[str, Any], kind: str) -> None:
    prefixes = dict.fromkeys(("train", "calibration", "validation", "test"), "nowhere")
    prefixes = {name: f"{name}-{prefix}" for name, prefix in prefixes.items()}
    study = schema.from_mapping(made_up.mapping(prefixes, methods=[method]))
    assert {headlines.granularity(pruning) for pruning in prunings.prunings(study)} == {kind}


@pytest.fixture(scope="module")
def found(quickstart_like: Places) -> Results:
    return results.collect(quickstart_like)


def test_the_page_opens_with_the_conclusion_and_the_figure_that_shows_it(
    quickstart_like: Places, found: Results
) -> None:
    text = (quickstart_like.root / "report" / "index.html").read_text()
    body = text[text.index("<main>") + len("<main>") :].lstrip()
    assert body.startswith('<section id="conclusion"')
    opening, rest = body.split("</section>", 1)
    assert [(one.setting, one.granularity, one.dense) for one in found.headlines] == [
        ("equal-training", "depth", False), ("equal-training", "width", False), ("equal-training", "sparse", True),
        ("equal-training", "sparse", False), ("equal-total", "depth", False), ("equal-total", "width", False),
        ("equal-total", "sparse", False),
    ]  # fmt: skip
    assert opening.count("<dd") == len(found.headlines) == 7
    for one in found.headlines:
        assert f"<dt>{one.subject}</dt>" in opening and page.minus(one.words) in opening
    assert rest.lstrip().startswith('<figure id="figure-gaps">')
    data = json.loads((quickstart_like.root / "report" / "results.json").read_text())
    assert [one["words"] for one in data["conclusions"]] == [one.sentence for one in found.headlines]


def test_verdicts_are_never_folded(quickstart_like: Places, found: Results) -> None:
    text = (quickstart_like.root / "report" / "index.html").read_text()
    shown = re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
    assert len(found.verdicts) == 13
    for one in found.verdicts:
        assert page.minus(one.words) in shown


def test_an_interval_that_holds_zero_has_the_neutral_class_and_words(found: Results) -> None:
    """On the page, in the table and in the sentence: neither an arm's colour nor "ends lower"."""
    for low, high, winner in ((-0.02, 0.06, "neither"), (0.01, 0.06, "pruned"), (-0.06, -0.01, "scratch")):
        documents = OverDocuments(85, low, high)
        test = Difference(1, (low + high) / 2)
        one = replace(found.verdicts[0], documents=documents, test=test)
        said = replace(found.headlines[0], verdicts=(one,), every=(one,), test=test, documents=documents)
        text = page.render(replace(found, verdicts=(one,), headlines=(said,), trends=()), [])
        assert re.findall(r'<dd class="(\w+)"', text) == [winner]
        assert set(re.findall(r'class="(?:text )?gap (\w+)"', text)) == {winner}
        assert ("ends lower</b>" in text) == ("ends lower</td>" in text) == (winner != "neither")


def test_one_budget_makes_one_panel(quickstart_like: Places, simulated_study: Places) -> None:
    """Losses of one budget are in one panel, the arms side by side; nothing is drawn over budgets."""

    one, several = (
        {path.stem for path in (places.root / "report" / "figures").glob("*.svg")}
        for places in (quickstart_like, simulated_study)
    )
    assert several - one == {"loss-by-budget", "gap-by-budget", "gap-by-ratio"} and not one - several
    svg = (quickstart_like.root / "report" / "figures" / "final-loss.svg").read_text()
    assert re.findall(r'<g id="(axes_\d+)">', svg) == ["axes_1", "axes_2"]  # the second is the perplexity's scale


def test_a_page_without_a_comparison_says_so(tmp_path: Path) -> None:
    study = made_up.study(made_up.corpora(tmp_path), methods=[{"name": "shortgpt"}])
    with pytest.raises(made_up.Killed):
        made_up.run(study, tmp_path / "runs", made_up.FakeLauncher(kill_at=2))
    text = page.render(results.collect(Places(tmp_path / "runs" / "made-up")), [])
    assert "nothing to conclude" in text
