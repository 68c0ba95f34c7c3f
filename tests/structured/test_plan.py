"""The plan and its verb: round trips, self-validation, provenance, and refusals before any work."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_prune import verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.pruning_commands import plan_main
from megatron_prune.cli.pruning_tables import show_plan
from megatron_prune.errors import EXIT_NEEDS_SCORES, CommandLineError, PlanError, UsageError
from megatron_prune.methods import options
from megatron_prune.methods.ranking import Accuracy
from megatron_prune.structured import candidates, plan
from megatron_prune.structured import choice as choices
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidate import with_accuracies, with_scores
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Retrained, Statistics, StatisticsError, TaskScore, tensor_shapes

SOURCE = ModelShape(4, 24, 12, 3, 3, 20, 16, tied=False)
TARGET = replace(SOURCE, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=8)
SETTINGS = options.MinitronWidthOptions()
DEPTH = options.MinitronDepthOptions()


def statistics(shape: ModelShape = SOURCE, parent: str = "parent", seed: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in tensor_shapes(shape).items()
    }
    run = {"prefix": "p", "corpus": "c", "sampling": "sequential", "seed": None, "windows": [0, 1, 2]}
    return Statistics(tensors, shape, parent, 5, 3, 30.0, (run,))


def make(target: ModelShape = TARGET, name: str = "minitron-width", **changes: Any) -> plan.PruningPlan:
    asked: dict[str, Any] = {"settings": SETTINGS, "seed": None}
    asked |= {key: changes.pop(key) for key in asked.keys() & changes}
    question = Question(name, asked["settings"], SOURCE, (target,), "parent", asked["seed"])
    return plan.make(question, **{"ratio": 0.5, "ratio_of": "linears", "statistics": statistics(), **changes})


def test_round_trip(tmp_path: Path) -> None:
    made = make()
    made.write(tmp_path / "plan.json")
    found = plan.read(tmp_path / "plan.json")
    assert found == made and found.hash == made.hash
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["removed_linears"] == pytest.approx(1 - TARGET.linear_parameters() / SOURCE.linear_parameters())
    assert content["removed_all"] == pytest.approx(1 - TARGET.parameters() / SOURCE.parameters())
    assert content["statistics"] == statistics().hash
    assert content["calibration"]["tokens"] == 15
    assert content["calibration"]["calibrations"][0]["windows"] == [0, 1, 2]


def test_hash_depends_on_what_is_kept() -> None:
    assert make().hash != make(statistics=statistics(seed=1)).hash
    assert make().hash == make().hash


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make().write(path)
    content = json.loads(path.read_text())
    content["parent"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="changed after it was written"):
        plan.read(path)
    del content["kept_layers"]
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="damaged: kept_layers: expected this key, got nothing"):
        plan.read(path)
    path.write_text("{}")
    with pytest.raises(PlanError, match="expected a pruning plan of version 1"):
        plan.read(path)


HEADS = ((0, 1, 4, 5),) * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_layers": (0, 1, 2)}, "kept_layers: expected the target's 4 indices, got 3"),
        ({"kept_layers": (0, 1, 2, 4)}, r"kept_layers: expected indices in 0…3"),
        ({"kept_layers": (0, 2, 1, 3)}, "kept_layers: expected ascending"),
        ({"kept_layers": (0, 1, 1, 3)}, "kept_layers: expected ascending indices without repetitions"),
        ({"kept_layers": (0, 1, 2, 3.0)}, "kept_layers: expected integers"),
        ({"kept_hidden": tuple(range(15))}, "kept_hidden: expected the target's 16 indices, got 15"),
        ({"kept_hidden": (-1, *range(15))}, "kept_hidden: expected indices in"),
        ({"kept_hidden": None}, "expected kept indices that give"),
        (
            {"kept_ffn": ((0, 1, 2, 3, 4, 5, 6, 7),) * 3},
            "kept_ffn: expected one entry for each of 4 kept layers, got 3",
        ),
        ({"kept_heads": (*HEADS[:3], (0, 1, 2, 4))}, r"layer 3: expected 2 query groups.*got 2 groups"),
        ({"kept_heads": (*HEADS[:3], (0, 1, 2, 3))}, "got 1 groups"),
        ({"target": replace(TARGET, ffn_hidden_size=9)}, "expected the target's 9"),
        ({"target": replace(TARGET, kv_channels=4)}, "expected kept indices that give"),
        (
            {"target": SOURCE, "kept_hidden": None, "kept_heads": None, "kept_ffn": None},
            "got one that removes nothing",
        ),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    good = replace(make(), kept_heads=HEADS)
    with pytest.raises(PlanError, match=message):
        replace(good, **changes)


def test_statistics_must_be_there_and_of_this_parent() -> None:
    with pytest.raises(StatisticsError, match="which minitron-width reads"):
        make(statistics=None)
    with pytest.raises(StatisticsError, match="of another parent: expected the fingerprint parent, got other"):
        make(statistics=statistics(parent="other"))


def test_a_method_without_statistics_records_none() -> None:
    made = make(name="random", settings=options.RandomOptions(axis="width"), seed=3)
    assert (made.statistics, made.calibration, made.seed) == (None, None, 3)


def test_table_says_what_changes_and_lists_near_ties() -> None:
    same = statistics()
    same.tensors["mlp.sum_abs_mean_sq"][2] = 1.0
    shown = io.StringIO()
    show_plan(make(statistics=same), Console(file=shown, width=110))
    text = shown.getvalue()
    assert f"{SOURCE.parameters():,}" in text and f"{TARGET.parameters():,}" in text
    assert f"{SOURCE.forward_flops(2048):,}" in text and f"{TARGET.forward_flops(2048):,}" in text
    assert f"{1 - TARGET.linear_parameters() / SOURCE.linear_parameters():.2%} of linears" in text
    assert f"{1 - TARGET.parameters() / SOURCE.parameters():.2%} of all (asked for: 50.00% of linears)" in text
    assert "near-ties: 1 cuts" in text
    row = next(line for line in text.splitlines() if "│  ffn" in line or "│ ffn │" in line.replace("  ", " "))
    assert row.split("│")[2:6] and [cell.strip() for cell in row.split("│")[2:6]] == ["2", "–", "7", "8"]


# -- candidates -----------------------------------------------------------------------------------


def depth(*losses: float) -> plan.PruningPlan:
    """minitron-depth's plan for two of four layers, where its three candidates lose that much."""
    question = Question("minitron-depth", DEPTH, SOURCE, (replace(SOURCE, num_layers=2),), "parent")
    found = statistics()
    scored = with_scores(found, question.candidates(found), losses)
    return plan.make(question, ratio=0.5, ratio_of="linears", statistics=scored)


def test_the_lowest_loss_is_chosen_and_the_table_kept(tmp_path: Path) -> None:
    made = depth(3.0, 2.5, 4.0)
    assert (made.kept_layers, made.chosen, made.near_ties) == ((0, 3), 1, ())
    assert [(row.candidate, row.loss) for row in made.candidates] == [
        ("without layers 0-1", 3.0), ("without layers 1-2", 2.5), ("without layers 2-3", 4.0)
    ]  # fmt: skip
    assert made.candidates[0].parameters == replace(SOURCE, num_layers=2).parameters()
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made
    shown = io.StringIO()
    show_plan(made, Console(file=shown, width=110))
    assert "removed layers: 1, 2" in shown.getvalue()
    (row,) = (line for line in shown.getvalue().splitlines() if "without layers 2-3" in line)
    assert "4.00000" in row and "1.50000" in row


def test_between_equal_losses_the_lower_start_is_chosen_and_near_ones_are_listed() -> None:
    made = depth(3.0, 2.5, 2.5)
    assert made.chosen == 1
    (tie,) = made.near_ties
    assert (tie.unit, tie.kept, tie.removed, tie.kept_score, tie.removed_score) == ("candidate", 1, 2, 2.5, 2.5)
    assert depth(2.5 * (1 + 5e-6), 2.5, 3.0).near_ties and not depth(2.5 * (1 + 2e-5), 2.5, 3.0).near_ties


def test_a_loss_that_is_not_finite_comes_last(tmp_path: Path) -> None:
    made = depth(math.nan, 2.5, math.inf)
    assert (made.chosen, made.near_ties) == (1, ())
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made
    assert json.loads((tmp_path / "plan.json").read_text())["candidates"][0]["loss"] is None
    shown = io.StringIO()
    show_plan(made, Console(file=shown, width=110))
    rows = [line for line in shown.getvalue().splitlines() if "without layers" in line]
    assert ["without layers 1-2" in row for row in rows] == [True, False, False]
    assert ["not finite" in row for row in rows] == [False, True, True] and "0.00000" in rows[0]
    with pytest.raises(PlanError, match="minitron-depth: no candidate has a finite loss"):
        depth(math.nan, math.inf, -math.inf)


def test_scores_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    question = Question("minitron-depth", DEPTH, SOURCE, (replace(SOURCE, num_layers=2),), "parent")
    found = statistics()
    asked = question.candidates(found)
    scored = with_scores(found, asked, [math.nan, 2.5, 3.0])
    keys = [c.selection.key for c in asked]
    gone = replace(scored.scores[keys[2]], retrained=Retrained(math.inf, 7, 9, "recipe"))
    scored = replace(scored, scores={**scored.scores, keys[2]: gone})
    scored.write(tmp_path / "s.safetensors")
    again = statistics_file.read(tmp_path / "s.safetensors")
    assert again.scores == scored.scores and not question.unscored(again)
    content = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert [content[key]["loss"] for key in keys] == [None, 2.5, 3.0]
    assert content[keys[2]]["retrained"]["loss"] is None and content[keys[1]]["retrained"] is None
    more = replace(found, calibrations=({**found.calibrations[0], "windows": [7, 8, 9]},))
    merged = statistics_file.merge([scored, with_scores(more, asked, [1.0, 3.5, 3.0])])
    assert [merged.scores[key].loss for key in keys] == [math.inf, 3.0, 3.0]
    with pytest.raises(StatisticsError, match="loss on the calibration text is not finite"):
        replace(found, loss_sum=math.nan)


def retrained(losses: list[float], after: dict[int, float], best: int = 2) -> plan.PruningPlan:
    """minitron-width's plan where the ``best`` of these FFN sizes were retrained, to the losses ``after``."""
    settings = replace(SETTINGS, search=("ffn",), retrain_candidates=best, retrain_tokens=7)
    shapes = tuple(replace(SOURCE, ffn_hidden_size=19 - i) for i in range(len(losses)))
    question = Question("minitron-width", settings, SOURCE, shapes, "parent")
    found = statistics()
    asked = question.candidates(found)
    found = with_scores(found, asked, losses)
    scores = dict(found.scores)
    for i, loss in after.items():
        key = asked[i].selection.key
        scores[key] = replace(scores[key], retrained=Retrained(loss, 7, 9, "recipe"))
    return plan.make(question, ratio=0.5, ratio_of="linears", statistics=replace(found, scores=scores))


def test_a_retraining_that_diverged_comes_last(tmp_path: Path) -> None:
    made = retrained([math.nan, 3.0, 2.0, 4.0], {1: 2.5, 2: math.inf})
    assert (made.chosen, made.near_ties) == (1, ())
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made
    shown = io.StringIO()
    show_plan(made, Console(file=shown, width=110))
    rows = [line for line in shown.getvalue().splitlines() if "in 3 groups" in line]
    assert [row.split("FFN ")[1].split()[0] for row in rows] == ["18", "17", "16", "19"]
    assert "not finite" in rows[1] and "2.00000" in rows[1] and "not finite" in rows[3]
    with pytest.raises(PlanError, match="no candidate that was retrained has a finite loss"):
        retrained([1.0, 3.0, 2.0], {0: math.inf, 2: math.inf})
    # With one finite loss there is one to retrain, not two.
    assert retrained([math.nan, 3.0, math.nan], {1: 2.5}).chosen == 1


def test_a_near_tie_for_the_last_place_among_the_retrained_is_listed() -> None:
    close = 3.0 * (1 + 5e-6)
    (tie,) = retrained([math.nan, 3.0, 2.0, close], {1: 2.5, 2: 2.6}).near_ties
    assert (tie.unit, tie.kept, tie.removed, tie.kept_score, tie.removed_score) == ("finalist", 1, 3, 3.0, close)
    first, cut = retrained([close, 3.0, 2.0, close, 3.0], {1: 2.5, 2: 2.5}).near_ties
    assert (first.unit, first.kept, first.removed, first.others) == ("candidate", 1, 2, ())
    assert (cut.unit, cut.kept, cut.removed, cut.others) == ("finalist", 1, 4, (0, 3))
    assert not retrained([4.0, 3.0, 2.0, 3.0 * (1 + 2e-5)], {1: 2.5, 2: 2.6}).near_ties
    assert not retrained([3.0, 2.0, math.nan], {0: 2.5, 1: 2.6}).near_ties


def test_scoring_counts_in_the_plan() -> None:
    found = statistics()
    calibration = depth(3.0, 2.5, 4.0).calibration
    assert calibration is not None and calibration["flops"] == 3 * SOURCE.forward_flops(5)
    half = replace(SOURCE, num_layers=2)
    assert calibration["scoring"] == {"candidates": 3, "flops": 3 * found.sequences * half.forward_flops(5)}


def test_a_plan_without_scores_is_refused() -> None:
    question = Question("minitron-depth", DEPTH, SOURCE, (replace(SOURCE, num_layers=2),), "parent")
    with pytest.raises(StatisticsError, match="minitron-depth: expected scores for all 3 candidates, got none for 3"):
        plan.make(question, ratio=0.5, ratio_of="linears", statistics=statistics())
    with pytest.raises(StatisticsError, match="which minitron-depth reads"):
        plan.make(question, ratio=0.5, ratio_of="linears")
    with pytest.raises(PlanError, match="chosen: expected a number below 3, got 3"):
        replace(depth(3.0, 2.5, 4.0), chosen=3)
    with pytest.raises(PlanError, match="chosen: expected a number below 3, got None"):
        replace(depth(3.0, 2.5, 4.0), chosen=None)


def test_a_table_as_long_as_it_may_be_says_so() -> None:
    settings = replace(SETTINGS, search=("ffn",), max_candidates=2)
    shapes = tuple(replace(SOURCE, ffn_hidden_size=size) for size in (12, 8))
    question = Question("minitron-width", settings, SOURCE, shapes, "parent")
    found = statistics()
    scored = with_scores(found, question.candidates(found), [3.0, 2.0])
    made = plan.make(question, ratio=0.5, ratio_of="linears", statistics=scored)
    assert made.target == shapes[1] and made.chosen == 1
    shown = io.StringIO()
    show_plan(made, Console(file=shown, width=110))
    assert "candidates: 2 (as many as --max-candidates allows)" in shown.getvalue()
    assert "hidden 24, 12 heads in 3 groups, FFN 8" in shown.getvalue()


def test_the_papers_candidates_for_llama_compete() -> None:
    """62.5%: hidden, heads and FFN as they were given; the one that loses least is cut."""
    llama = ModelShape(4, 4096, 32, 8, 128, 14336, 128256, tied=False)  # four of its layers
    words = ["2176/32/7168", "2304/32/6656", "2432/32/6144", "2560/32/6400", "2688/32/5888"]
    given = options.read(verbs.TargetSettings, "minitron-width", {"target-shapes": words})
    choice = choices.choose("minitron-width", *given)
    question = Question("minitron-width", choice.settings, llama, choice.shapes(llama), "parent")
    found = statistics(llama)
    scored = with_scores(found, question.candidates(found), [3.2, 3.1, 2.9, 3.0, 3.3])
    made = choice.make(question, scored)
    chosen = made.target
    assert (chosen.hidden_size, chosen.num_attention_heads, chosen.ffn_hidden_size) == (2432, 32, 6144)
    assert (made.chosen, made.ratio) == (2, None)
    assert [row.candidate for row in made.candidates] == [
        "hidden {}, {} heads in 8 groups, FFN {}".format(*word.split("/")) for word in words
    ]
    shown = io.StringIO()
    show_plan(made, Console(file=shown, width=110))
    assert "candidates: 5, by the loss" in shown.getvalue() and "asked for" not in shown.getvalue()


def by_task(*right: tuple[int, int, int], losses: tuple[float, ...] = (3.0, 2.5, 4.0)) -> plan.PruningPlan:
    """The same by a task of ten examples: (correct, low, high) of the three candidates; the parent has 9."""
    settings = options.MinitronDepthOptions(score_by="task", task_data="t.jsonl")
    question = Question("minitron-depth", settings, SOURCE, (replace(SOURCE, num_layers=2),), "parent", task="bees")
    found = statistics()
    asked = question.candidates(found)
    assert [c.label for c in question.unscored(found)] == ["dense", *(c.label for c in asked)]
    scored = with_scores(found, [question.dense, *asked], [2.0, *losses])
    assert len(question.unscored(scored)) == 4
    scores = [
        TaskScore({"acc": Accuracy(10, *one), "acc_norm": Accuracy(10, 0, 0, 0)}, 7) for one in ((9, 9, 9), *right)
    ]
    scored = with_accuracies(scored, [question.dense, *asked], "bees", scores)
    return plan.make(question, ratio=0.5, ratio_of="linears", statistics=scored)


@pytest.mark.parametrize(
    ("right", "losses", "chosen", "rivals"),
    [
        ([(5, 5, 5), (6, 6, 6), (7, 7, 7)], (3.0, 2.5, 4.0), 2, []),  # the highest, whatever the loss
        ([(5, 5, 5), (5, 5, 5), (4, 4, 4)], (3.0, 2.5, 2.0), 1, []),  # between equal accuracies the lower loss
        ([(5, 5, 5), (5, 5, 5), (5, 5, 5)], (2.5, 2.5, 4.0), 0, [1]),  # then the first; the losses are near
        ([(5, 5, 5), (6, 5, 6), (4, 4, 4)], (3.0, 2.5, 2.0), 1, []),  # at worst equal, and then of lower loss
        ([(5, 5, 5), (6, 5, 6), (4, 4, 4)], (2.0, 2.5, 2.0), 1, [0]),
        ([(5, 5, 7), (6, 6, 6), (5, 4, 7)], (3.0, 2.5, 2.0), 1, [2, 0]),
    ],
)
def test_a_task_decides_before_the_loss(
    right: list[tuple[int, int, int]], losses: tuple[float, ...], chosen: int, rivals: list[int]
) -> None:
    made = by_task(*right, losses=losses)
    assert made.chosen == chosen
    assert [row.accuracy for row in made.candidates] == [correct / 10 for correct, _, _ in right]
    assert [i for tie in made.near_ties for i in (tie.removed, *tie.others)] == rivals
    assert all(tie.kept == chosen and tie.kept_score == right[chosen][0] / 10 for tie in made.near_ties)


def test_a_task_cannot_choose_what_has_no_finite_loss() -> None:
    made = by_task((9, 9, 9), (6, 6, 6), (7, 7, 7), losses=(math.nan, 2.5, 4.0))
    assert (made.chosen, made.near_ties) == (2, ())


def test_a_task_is_in_the_table_and_in_the_account(tmp_path: Path) -> None:
    made = by_task((5, 5, 5), (6, 6, 6), (7, 7, 7))
    shown = io.StringIO()
    show_plan(made, Console(file=shown, width=110))
    lines = shown.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if "without layers 2-3" in line)
    assert "chosen" in lines[first] and "0.7000" in lines[first] and "0.6000" in lines[first + 1]
    assert "candidates: 3, by acc on t.jsonl (10 examples; dense 0.9000)" in shown.getvalue()
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made
    assert made.calibration is not None
    half, windows = replace(SOURCE, num_layers=2).forward_flops(5), statistics().sequences
    assert made.calibration["scoring"]["flops"] == windows * (3 * half + SOURCE.forward_flops(5)) + 4 * 7


def test_a_question_survives_its_file(tmp_path: Path) -> None:
    question = Question("minitron-depth", DEPTH, SOURCE, (replace(SOURCE, num_layers=2),), "parent")
    found = statistics()
    question.write(tmp_path / "c.json", found)
    assert candidates.read(tmp_path / "c.json") == (question, found.hash)
    content = json.loads((tmp_path / "c.json").read_text())
    assert [row["key"] for row in content["candidates"]] == [c.selection.key for c in question.unscored(found)]
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(PlanError, match="expected candidates of version 1"):
        candidates.read(tmp_path / "c.json")


# -- the verb ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent_statistics(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up statistics for the tiny parent."""
    parent = open_checkpoint(tiny_parent)
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    statistics(parent.shape, parent.fingerprint()).write(path)
    return path


@pytest.fixture
def verb(tiny_parent: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run ``plan`` with the given flags; the path of its output."""

    def run(*flags: object) -> Path:
        output = tmp_path / "plan.json"
        assert plan_main(["--load", str(tiny_parent), "--output", str(output), *map(str, flags)]) == 0
        return output

    return run


def test_verb_writes_a_plan_for_this_parent(
    verb: Callable[..., Path], parent_statistics: Path, tiny_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan.read(verb("--statistics", parent_statistics, "--method", "shortgpt", "--ratio", "0.5"))
    assert found.parent == open_checkpoint(tiny_parent).fingerprint()
    assert (len(found.kept_layers), found.ratio, found.ratio_of, found.seed) == (2, 0.5, "linears", None)
    shown = capsys.readouterr().out
    assert "removed layers" in shown and "near-ties: none" in shown


def test_verb_merges_statistics(
    verb: Callable[..., Path], parent_statistics: Path, tiny_parent: Path, tmp_path: Path
) -> None:
    parent = open_checkpoint(tiny_parent)
    other = statistics(parent.shape, parent.fingerprint(), seed=1)
    other = replace(other, calibrations=({**other.calibrations[0], "windows": [7, 8, 9]},))
    other.write(tmp_path / "o.safetensors")
    flags = ("--method", "shortgpt", "--target-num-layers", "2")
    found = plan.read(verb("--statistics", parent_statistics, tmp_path / "o.safetensors", *flags))
    assert found.calibration is not None and found.calibration["sequences"] == 6


def test_verb_asks_for_scores_and_leaves_no_plan(
    verb: Callable[..., Path], parent_statistics: Path, tiny_parent: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--load", str(tiny_parent), "--output", str(tmp_path / "plan.json"), "--method", "minitron-depth"]
    flags += ["--ratio", "0.5", "--statistics", str(parent_statistics)]
    assert plan_main(flags) == EXIT_NEEDS_SCORES
    assert f"calibrate --load {tiny_parent} --score" in capsys.readouterr().out
    assert not (tmp_path / "plan.json").exists()
    parent = open_checkpoint(tiny_parent)
    other = statistics(parent.shape, parent.fingerprint(), seed=1)
    other = replace(other, calibrations=({**other.calibrations[0], "windows": [7, 8, 9]},))
    other.write(tmp_path / "o.safetensors")
    with pytest.raises(UsageError, match="--statistics: expected one file until its candidates are scored, got"):
        plan_main([*flags, str(tmp_path / "o.safetensors")])
    # Scores of the same candidates in both files: their mean decides.
    question, _ = candidates.read(tmp_path / "candidates.json")
    for path, losses in ((parent_statistics, (3.0, 2.0, 2.9)), (tmp_path / "o.safetensors", (3.0, 4.0, 2.9))):
        found = statistics_file.read(path)
        scored = with_scores(found, question.candidates(found), losses)
        scored.write(tmp_path / f"scored-{path.name}")
        assert statistics_file.read(tmp_path / f"scored-{path.name}").scores == scored.scores
    two = [str(tmp_path / f"scored-{name}") for name in (parent_statistics.name, "o.safetensors")]
    assert plan_main([*flags[:-1], *two]) == 0
    made = plan.read(tmp_path / "plan.json")
    assert [row.loss for row in made.candidates] == pytest.approx([3.0, 3.0, 2.9]) and made.chosen == 2


def test_verb_draws_by_its_seed(verb: Callable[..., Path]) -> None:
    flags = ("--method", "random", "--target-ffn-hidden-size", "64", "--seed")
    one, again, other = (plan.read(verb(*flags, seed)) for seed in (1, 1, 2))
    assert one.kept_ffn == again.kept_ffn != other.kept_ffn
    assert one.seed == 1


S = "STATISTICS"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--method NAME is required"),
        (["--method", "magic"], "--method: expected .*, got magic"),
        (["--method", "shortgpt", "--ratio", "0.5"], "--statistics: expected .*, got nothing"),
        (
            ["--method", "random", "--target-num-layers", "2", "--statistics", S],
            "--statistics: expected .*needs no statistics, got",
        ),
        (
            ["--method", "random", "--axis", "depth", "--ratio", "0.5", "--seed", "-1"],
            "--seed: expected 0 or more, got -1",
        ),
        (
            ["--method", "shortgpt", "--ratio", "0.5", "--statistics", S, "--seed", "1"],
            "--seed: expected .* which draws no random numbers, got 1",
        ),
        (
            ["--method", "shortgpt", "--ratio", "0.5", "--statistics", S, "--max-candidates", "3"],
            "--max-candidates: expected --method minitron-width with it, got --method shortgpt",
        ),
        (
            ["--method", "shortgpt", "--ratio", "0.5", "--statistics", S, "--nonsense"],
            "--nonsense is not a flag of plan;",
        ),
        (["--method", "shortgpt", "--ratio", "2", "--statistics", S], "--ratio: expected .*, got 2.0"),
        (
            ["--method", "minitron-width", "--statistics", S, "--target-ffn-hidden-size", "128"]
            + ["--tensor-model-parallel-size", "3"],
            "--target-ffn-hidden-size: expected .*--tensor-model-parallel-size 3, got 128",
        ),
    ],
)
def test_verb_refuses(verb: Callable[..., Path], parent_statistics: Path, flags: list[str], message: str) -> None:
    with pytest.raises((UsageError, CommandLineError), match=message):
        verb(*(parent_statistics if flag == S else flag for flag in flags))


def test_verb_needs_no_megatron(tiny_parent: Path, tmp_path: Path) -> None:
    """Planning and applying import no Megatron."""
    script = (
        "import sys\nfrom megatron_prune.__main__ import main\n"
        f"main(['plan', '--load', {str(tiny_parent)!r}, '--method', 'random', '--target-num-layers', '2', "
        f"'--output', {str(tmp_path / 'p.json')!r}])\n"
        f"main(['apply', '--load', {str(tiny_parent)!r}, '--plan', {str(tmp_path / 'p.json')!r}, "
        f"'--save', {str(tmp_path / 'pruned')!r}])\n"
        "found = [m for m in sys.modules if m.split('.')[0] == 'megatron']\nassert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert open_checkpoint(tmp_path / "pruned").shape.num_layers == 2
