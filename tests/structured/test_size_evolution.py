"""``--allocation search`` of methods that rank units: what is run when, that it may stop anywhere, and the plan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods import halving, options
from megatron_prune.methods.base import Budget
from megatron_prune.structured import choice as choices
from megatron_prune.structured import plan
from megatron_prune.structured.candidate import Candidate, with_scores
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.judge import spent
from megatron_prune.structured.statistics import Statistics, StatisticsError, tensor_shapes

SOURCE = ModelShape(4, 48, 12, 6, 4, 96, 100, tied=False)
WINDOWS, LENGTH = 13, 7
OPTIONS: dict[str, Callable[..., Any]] = {
    "flap": options.FlapOptions,
    "wanda-sp": options.WandaSpOptions,
    "llm-pruner": options.LLMPrunerOptions,
}


def statistics() -> Statistics:
    draw = torch.Generator().manual_seed(0)
    sizes = tensor_shapes(SOURCE, gradients=True)
    sums = {name: torch.rand(size, generator=draw, dtype=torch.float64) + 1 for name, size in sizes.items()}
    run = {"prefix": "p", "corpus": "c", "sampling": "sequential", "seed": None, "windows": list(range(WINDOWS))}
    return Statistics(sums, SOURCE, "parent", LENGTH, WINDOWS, 30.0, (run,))


def asked(method: str = "wanda-sp", *, seed: int = 3, target: dict[str, Any] | None = None, **own: Any) -> Question:
    found = verbs.TargetSettings.read(target or {"ratio": 0.5, "divisible_by": 4})
    settings = OPTIONS[method](**({"allocation": "search", "search_generations": 6} | own))
    choice = choices.choose(method, found, settings, seed=seed)
    shapes = choice.shapes(SOURCE)
    budget = choice.target.budget(SOURCE, shapes[0])
    return Question(method, settings, SOURCE, shapes, "parent", choice.seed, None, budget)


def loss(candidate: Candidate, window: int) -> float:
    """Early layers matter more, and the FFN more than attention; windows differ."""
    return math.sin(window) + sum(
        (4 - number) / layer.num_query_groups + (40 + 30 * number) / layer.ffn_hidden_size
        for number, layer in enumerate(candidate.target.by_layer())
    )


def run_all(question: Question, found: Statistics) -> tuple[Statistics, list[tuple[int, int]]]:
    ran = []
    while (run := question.next_run(found)) is not None:
        losses = [sum(loss(c, w) for w in range(run.windows)) / run.windows for c in run.candidates]
        found = with_scores(found, run.candidates, losses, run.windows)
        ran.append((len(run.candidates), run.windows))
        assert len(ran) < 200
    return found, ran


@pytest.mark.parametrize("method", OPTIONS)
def test_the_winner_has_the_lowest_loss_and_is_on_the_budget(method: str, tmp_path: Path) -> None:
    question = asked(method)
    with pytest.raises(StatisticsError, match="expected scores for all"):
        plan.make(question, ratio=0.5, ratio_of="linears", statistics=statistics())
    found, ran = run_all(question, statistics())
    assert ran[0] == (2, WINDOWS)  # all layers alike, and one ranking
    assert {windows for _, windows in ran} <= {one.windows for one in halving.schedule(16, WINDOWS, last=1)}
    made = plan.make(question, ratio=0.5, ratio_of="linears", statistics=found)
    offered = question.candidates(found)
    whole = [c for c in offered if found.loss_on(c.key, WINDOWS) is not None]
    best = min(whole, key=lambda c: found.scores[c.key].loss)
    kept = best.selection
    assert (made.target, made.kept_ffn, made.kept_heads) == (best.target, kept.ffn, kept.heads)
    assert isinstance(made.target, HeterogeneousShape)
    assert question.budget is not None and abs(question.budget.error(made.target)) <= Budget.TOLERANCE
    assert found.scores[best.key].loss < found.scores[offered[0].key].loss - 0.1  # than all layers alike
    assert (made.compensation is not None) == (method == "flap") and made.seed == 3
    # The table has all that were run, with the windows that each was run on.
    assert made.chosen is not None and made.candidates[made.chosen].windows == WINDOWS
    assert len(made.candidates) == len(offered) == len({c.key for c in offered})
    assert {row.windows for row in made.candidates} == {windows for _, windows in ran}
    passes = sum(found.scores[c.key].windows or WINDOWS for c in offered)
    assert spent(question, offered, found)["scoring"]["flops"] == passes * SOURCE.forward_flops(LENGTH)
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made


def test_it_goes_on_where_its_scores_end() -> None:
    whole, _ = run_all(asked(), statistics())
    draw = random.Random(0)
    for _ in range(5):
        known = dict(list(whole.scores.items())[: draw.randrange(1, len(whole.scores))])
        again, ran = run_all(asked(), replace(statistics(), scores=known))
        assert again.scores.keys() == whole.scores.keys() and ran
        kept = [plan.make(asked(), ratio=0.5, ratio_of="linears", statistics=one).kept_ffn for one in (again, whole)]
        assert kept[0] == kept[1]
    assert run_all(asked(), whole)[1] == []
    longer = run_all(asked(search_generations=9), whole)  # the first six generations are known
    assert len(longer[1]) <= 9 and longer[0].scores.keys() > whole.scores.keys()
    other, _ = run_all(asked(seed=4), statistics())
    assert other.scores.keys() != whole.scores.keys()


def test_scores_with_and_without_biases_for_means_are_kept_apart() -> None:
    plain = {c.key for c in asked("flap", compensate=False).next_run(statistics()).candidates}  # type: ignore[union-attr]
    made_up = {c.key for c in asked("flap").next_run(statistics()).candidates}  # type: ignore[union-attr]
    assert len(plain) == len(made_up) == 2 and not plain & made_up


def test_layers_that_are_exempt_stay_whole_and_the_least_is_kept() -> None:
    question = asked("llm-pruner", exempt_layers="0", least_kept=0.2)
    found, _ = run_all(question, statistics())
    made = plan.make(question, ratio=0.5, ratio_of="linears", statistics=found)
    first, *others = made.target.by_layer()
    assert first == SOURCE.by_layer()[0]
    assert all(layer.ffn_hidden_size >= 20 and layer.num_query_groups >= 2 for layer in others)


def test_candidates_that_are_not_finite_never_win() -> None:
    question, found = asked(), statistics()
    while (run := question.next_run(found)) is not None:
        losses = [
            math.inf if c.target.by_layer()[0].ffn_hidden_size > 52 else loss(c, 0) for c in run.candidates
        ]  # fmt: skip
        found = with_scores(found, run.candidates, losses, run.windows)
    made = plan.make(question, ratio=0.5, ratio_of="linears", statistics=found)
    assert made.target.by_layer()[0].ffn_hidden_size <= 52


@pytest.mark.parametrize(
    ("own", "target", "says"),
    [
        ({"search_generations": 0}, {}, "--search-generations: expected at least 1, got 0"),
        ({"allocation": "global"}, {}, "--search-generations: expected --allocation search with it, got "),
        ({"allocation": "uniform", "search_generations": None, "least_kept": 0.2}, {},
         "--least-kept: expected --allocation owl, global or search with it, got --allocation uniform"),
        ({}, {"target_ffn_hidden_size": 48, "divisible_by": 4},
         "--allocation: expected --ratio or --target-params with it, got search for explicit sizes"),
        ({"least_kept": 0.9}, {}, "--least-kept: expected at most"),
        ({}, {"ratio": 0.5, "divisible_by": 4, "keep_heads": True}, "--keep-heads: "),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(own: dict[str, Any], target: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        asked(target=target or None, **own)
