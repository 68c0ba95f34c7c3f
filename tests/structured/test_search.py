"""A search by successive halving: its rounds, who survives them, what is run when, and what the plan keeps of it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.cli.pruning_tables import show_plan
from megatron_prune.errors import PlanError
from megatron_prune.methods import halving, options
from megatron_prune.structured import plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidate import with_scores
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Retrained, Statistics, StatisticsError, tensor_shapes

SOURCE = ModelShape(5, 24, 12, 3, 3, 40, 16, tied=False)
WINDOWS = 24
SETTINGS = options.MinitronWidthOptions(search=("ffn",))
NUMBER = 30


def statistics(windows: int = WINDOWS) -> Statistics:
    draw = torch.Generator().manual_seed(0)
    sums = {name: torch.rand(size, generator=draw).double() for name, size in tensor_shapes(SOURCE).items()}
    run = {"prefix": "p", "corpus": "c", "sampling": "sequential", "seed": None, "windows": list(range(windows))}
    return Statistics(sums, SOURCE, "parent", 7, windows, 30.0, (run,))


def question(number: int = NUMBER, settings: options.MinitronWidthOptions = SETTINGS) -> Question:
    shapes = tuple(replace(SOURCE, ffn_hidden_size=39 - i) for i in range(number))
    return Question("minitron-width", settings, SOURCE, shapes, "parent")


def search(asked: Question, loss: Callable[[str, int], float], found: Statistics) -> tuple[Statistics, list[int]]:
    """Run what is asked for, where a candidate's loss on window w is ``loss(label, w)``; and the runs."""
    spent = []
    while (run := asked.next_run(found)) is not None:
        losses = [sum(loss(c.label, w) for w in range(run.windows)) / run.windows for c in run.candidates]
        found = with_scores(found, run.candidates, losses, run.windows)
        spent.append((len(run.candidates), run.windows))
    return found, spent


@given(number=st.integers(1, 400), windows=st.integers(1, 300), last=st.integers(4, 20))
def test_rounds_are_thirds_of_the_candidates_on_thrice_the_text(number: int, windows: int, last: int) -> None:
    rounds = halving.schedule(number, windows, last)
    assert rounds[0].candidates == number and rounds[-1].windows == windows
    assert rounds[0].windows >= min(windows, halving.FEWEST) and rounds[-1].candidates >= min(number, last)
    for one, following in zip(rounds, rounds[1:], strict=False):
        assert following.candidates == max(last, math.ceil(one.candidates / 3)) < one.candidates
        assert one.windows == math.ceil(following.windows / 3) < following.windows
    # It ends where text or candidates do.
    assert rounds[0].windows < 12 or rounds[-1].candidates <= last


def test_the_rounds_of_a_usual_search() -> None:
    found = [(one.candidates, one.windows) for one in halving.schedule(218, 128)]
    assert found == [(218, 5), (73, 15), (25, 43), (9, 128)]
    assert halving.schedule(218, 5) == (halving.Round(5, 218),)
    assert halving.schedule(3, 128) == (halving.Round(128, 3),)


def noisy(label: str, window: int) -> float:
    """The best is FFN 25; a window's difficulty is the same for all, and a little noise is not."""
    ffn = int(label.rsplit(" ", 1)[1])
    return abs(ffn - 25.3) / 10 + math.sin(window) + 0.02 * math.sin(97 * ffn * (window + 1))


@pytest.mark.parametrize("windows", [3, 12, 24, 100])
def test_the_winner_is_that_of_scoring_everything(windows: int) -> None:
    asked, empty = question(), statistics(windows)
    found, spent = search(asked, noisy, empty)
    every = [sum(noisy(c.label, w) for w in range(windows)) / windows for c in asked.candidates(found)]
    made = plan.make(asked, ratio=0.5, ratio_of="linears", statistics=found)
    assert made.chosen == every.index(min(every))
    assert spent == [(one.candidates, one.windows) for one in halving.schedule(NUMBER, windows)]
    # Every row has its loss in every round that it was in, and the survivors of a round are its best.
    for before, after in zip(spent, spent[1:], strict=False):
        losses = {
            i: dict(row.rounds or ())[before[1]] for i, row in enumerate(made.candidates) if row.windows >= before[1]
        }
        assert len(losses) == before[0]
        survivors = {i for i, row in enumerate(made.candidates) if row.windows >= after[1]}
        assert survivors == set(sorted(losses, key=lambda i: losses[i])[: after[0]])
    row = made.candidates[made.chosen]
    assert row.loss == pytest.approx(min(every)) and [each for each, _ in row.rounds or ()] == [n for _, n in spent]
    # The cost: what was run, where a round's text includes that of the one before it.
    run = sum(row.windows * asked.candidates(found)[i].scoring_flops(7) for i, row in enumerate(made.candidates))
    assert made.calibration is not None and made.calibration["scoring"] == {"candidates": NUMBER, "flops": run}


def test_a_plan_keeps_and_shows_every_round(tmp_path: Path) -> None:
    asked = question()
    found, _ = search(asked, noisy, statistics())
    found.write(tmp_path / "s.safetensors")
    assert statistics_file.read(tmp_path / "s.safetensors").scores == found.scores
    made = plan.make(asked, ratio=0.5, ratio_of="linears", statistics=found)
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made
    rows = json.loads((tmp_path / "plan.json").read_text())["candidates"]
    assert sorted(len(row["rounds"]) for row in rows) == [1] * 20 + [2] * 10
    shown = io.StringIO()
    show_plan(made, Console(file=shown, width=110))
    lines = [line for line in shown.getvalue().splitlines() if "FFN" in line]
    assert "chosen" in lines[0] and "FFN 25" in lines[0] and lines[0].split("│")[-2].strip() == "0.00000"
    assert [line.split("│")[4].strip() for line in lines] == ["24"] * 10 + ["8"] * 10
    assert "… and 10 more, all in the plan" in shown.getvalue()
    # Losses on 8 windows are compared with the best's on these.
    eleventh = min(row.loss for row in made.candidates if row.windows == 8)
    best = dict(made.candidates[made.chosen or 0].rounds or ())[8]
    assert float(lines[10].split("│")[-2]) == pytest.approx(eleventh - best, abs=1e-5)


def test_a_search_goes_on_where_it_was_stopped() -> None:
    asked, whole = question(), search(question(), noisy, statistics())[0]
    found = statistics()
    stopped = 0
    while (run := asked.next_run(found)) is not None:
        some = run.candidates[: max(1, len(run.candidates) // 2)]  # then it is stopped
        losses = [sum(noisy(c.label, w) for w in range(run.windows)) / run.windows for c in some]
        found = with_scores(found, some, losses, run.windows)
        stopped += 1
    assert stopped > 4 and found.scores == whole.scores


def test_losses_that_are_not_finite_survive_no_round() -> None:
    def broken(label: str, window: int) -> float:
        return math.nan if window == 5 and label.endswith("5") else noisy(label, window)

    asked = question()
    found, _ = search(asked, broken, statistics())
    made = plan.make(asked, ratio=0.5, ratio_of="linears", statistics=found)
    gone = [row for row in made.candidates if row.candidate.endswith("5")]
    assert len(gone) == 3 and all((row.windows, row.loss) == (8, math.inf) for row in gone)
    assert made.candidates[made.chosen or 0].candidate.endswith(("24", "26"))
    nothing, spent = search(asked, lambda label, window: math.inf, statistics())
    assert spent == [(NUMBER, 8)]
    with pytest.raises(PlanError, match="minitron-width: no candidate has a finite loss"):
        plan.make(asked, ratio=0.5, ratio_of="linears", statistics=nothing)


def test_the_last_round_has_as_many_as_are_retrained() -> None:
    asked = question(settings=replace(SETTINGS, retrain_candidates=13, retrain_tokens=50))
    found, spent = search(asked, noisy, statistics())
    assert spent == [(30, 8), (13, 24)] and len(asked.finalists(found)) == 13
    scores = dict(found.scores)
    for place, candidate in enumerate(asked.finalists(found)):
        scores[candidate.key] = replace(scores[candidate.key], retrained=Retrained(9.0 - place, 50, 1, "r"))
    made = plan.make(asked, ratio=0.5, ratio_of="linears", statistics=replace(found, scores=scores))
    assert made.candidates[made.chosen or 0].retrained_loss == 9.0 - 12


def test_a_near_tie_for_surviving_is_listed() -> None:
    def close(label: str, window: int) -> float:
        """FFN 39 is best, and so on; 29 and 30, the last of ten and the first that goes, are within rounding."""
        ffn = int(label.rsplit(" ", 1)[1])
        return 3 + (30 - 1e-7 if ffn == 29 else ffn) * -0.01

    asked = question()
    found, _ = search(asked, close, statistics())
    made = plan.make(asked, ratio=0.5, ratio_of="linears", statistics=found)
    (tie,) = (one for one in made.near_ties if one.unit == "survivor")
    assert (tie.kept, tie.removed) == (9, 10)


def test_searches_are_not_merged_but_whole_scores_are() -> None:
    asked = question()
    found, _ = search(asked, noisy, statistics())
    more = replace(found, calibrations=({**found.calibrations[0], "windows": list(range(100, 124))},))
    both = statistics_file.merge([found, more])
    assert len(both.scores) == 10 and all(score.windows is None and not score.rounds for score in both.scores.values())
    assert statistics_file.merge([found]) == found
    with pytest.raises(StatisticsError, match="expected scores for all 30 candidates"):
        plan.make(asked, ratio=0.5, ratio_of="linears", statistics=both)


# -- depth and width ------------------------------------------------------------------------------------


def both(*sizes: tuple[int, int]) -> Question:
    shapes = tuple(replace(SOURCE, num_layers=layers, ffn_hidden_size=ffn) for layers, ffn in sizes)
    return Question("minitron-width", replace(SETTINGS, search=("depth", "ffn")), SOURCE, shapes, "parent")


def test_layers_are_chosen_before_widths() -> None:
    """Layer 1 is needed least, then the pair 2, 3; a smaller FFN costs in proportion."""
    costs = {"1": 0.1, "2-3": 0.3}
    sizes = [(layers, ffn) for layers in (5, 4, 3) for ffn in (38, 30, 20, 12) if (layers, ffn) != (5, 40)]
    asked, asked_for = both((4, 40), *sizes), []

    def loss(label: str, window: int) -> float:
        asked_for.append(label)
        if label.startswith("without layers "):
            return 1 + costs.get(label.removeprefix("without layers "), 2) + math.sin(window)
        layers = int(label.split(" layers, ")[0]) if " layers, " in label else 5
        return 1 + {5: 0, 4: 0.1, 3: 0.3}[layers] + (40 - int(label.rsplit(" ", 1)[1])) / 15 + math.sin(window)

    found = statistics()
    with pytest.raises(StatisticsError, match="expected a loss without each run of layers"):
        asked.candidates(found)
    first = asked.next_run(found)
    assert first is not None and first.windows == 8
    assert [c.label for c in first.candidates] == [f"without layers {w}" for w in "0-1 1-2 2-3 3-4 0 1 2 3 4".split()]
    found, spent = search(asked, loss, found)
    offered = asked.candidates(found)
    assert {c.target.num_layers: c.selection.layers for c in offered} == {
        5: (0, 1, 2, 3, 4), 4: (0, 2, 3, 4), 3: (0, 1, 4)
    }  # fmt: skip
    # The run without layer 1 alone is a candidate too, and not run again on its eight windows.
    assert spent == [(9, 8), (12, 8), (5, 24)] and offered[0].label == "without layers 1"
    made = plan.make(asked, ratio=0.5, ratio_of="linears", statistics=found)
    assert (made.kept_layers, made.kept_ffn) == ((0, 2, 3, 4), None) and made.target.num_layers == 4
    short = next(c for c in offered if (c.target.num_layers, c.target.ffn_hidden_size) == (3, 20))
    assert short.label == "3 layers, hidden 24, 12 heads in 3 groups, FFN 20"
    # Channels are ranked in the layers that stay.
    sums = found.tensors["mlp.sum_abs_mean_sq"]
    expected = [tuple(sorted(sums[layer].argsort(descending=True)[:20].tolist())) for layer in (0, 1, 4)]
    assert short.selection.ffn == tuple(expected)
    flops = sum(8 * c.scoring_flops(7) for c in first.candidates)
    flops += sum(row.windows * c.scoring_flops(7) for row, c in zip(made.candidates, offered, strict=True))
    assert made.calibration is not None
    assert made.calibration["scoring"]["flops"] == flops - 8 * offered[0].scoring_flops(7)  # it was counted twice
