"""The miniature: its proportions are the paper's, and each cut keeps what tests each claim."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import DataError, UsageError
from megatron_prune.study import estimate, grid, outlook, schema
from megatron_prune.study.grid import selects
from megatron_prune.study.prunings import Places, granularity, prunings

EXAMPLE = Path(__file__).parents[2] / "examples" / "miniature"
_spec = importlib.util.spec_from_file_location("miniature_plan", EXAMPLE / "plan.py")
assert _spec is not None and _spec.loader is not None
plan = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # dataclasses look it up there
_spec.loader.exec_module(plan)


def look(study: schema.StudyConfig) -> outlook.Outlook:
    """Without corpora."""
    return outlook.look(study, Places(Path("RUN")), planned=True)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return plan.read(seeds=3)


@pytest.fixture(scope="module")
def planned(whole) -> list[tuple[int, int, schema.StudyConfig, grid.Grid]]:
    """Every step of the cuts: its seeds and cuts, the study, its grid."""
    found = []
    for seeds, cuts, _ in plan.steps(3):
        study = schema.from_mapping(plan.cut(whole | {"seeds": whole["seeds"][:seeds]}, cuts))
        found.append((seeds, cuts, study, look(study).estimated_grid(study)))
    return found


def test_its_proportions_are_the_papers() -> None:
    study = schema.load(EXAMPLE / "study.yaml")
    found = look(study)
    assert found.source is not None and study.parent.pretrain is not None and study.parent_per_seed
    parameters, tokens = found.source.parameters(), study.parent.pretrain.tokens
    assert 0.7e6 < parameters < 1.5e6 and tokens / parameters == pytest.approx(25, rel=0.01)
    assert [budget / tokens for budget in study.budgets] == [0.05, 0.15, 0.25, 1.25, 2.5]
    methods = {(method.name, method.pattern) for method in study.methods}
    structured = ("shortgpt", "minitron-depth", "minitron-width", "sheared-llama", "random")
    assert {(name, None) for name in structured} <= methods
    assert {(name, p) for name in ("wanda", "sparsegpt") for p in ("unstructured", "2:4")} <= methods
    assert ("random", "unstructured") in methods
    layers = {p.ratio: found.targets[p.name].num_layers for p in prunings(study) if p.method.name == "shortgpt"}
    assert layers == {0.5: 4, 0.625: 3, 0.75: 2, 0.875: 1}  # each ratio can be cut exactly
    parents = {p.ratio: 1 - found.targets[p.name].linear_parameters() / found.source.linear_parameters()
               for p in prunings(study) if p.method.name == "minitron-width"}  # fmt: skip
    assert all(removed == pytest.approx(ratio, abs=0.01) for ratio, removed in parents.items())


def test_other_ratios_than_a_half_have_one_budget_at_equal_training(planned) -> None:
    _, _, study, made = planned[0]
    others = {(one.budget, one.setting) for one in made.comparisons if one.pruning.ratio != 0.5}
    assert others == {(4_800_000, "equal-training")}
    halves = {(one.budget, one.setting) for one in made.comparisons if one.pruning.ratio == 0.5}
    assert halves == {(budget, setting) for budget in study.budgets for setting in study.settings}


def test_every_cut_removes_work_and_keeps_every_claim_testable(planned) -> None:
    earlier: set[tuple[Any, ...]] | None = None
    for seeds, cuts, study, made in planned:
        assert {question.label[:3] for question in study.compare if question.label} == {f"({x})" for x in "bcdefg"}
        for question in study.compare:
            every = question.along == "tokens"
            for side in (question.of, question.than):
                if side is None:
                    continue
                own = [one for one in made.comparisons if selects(study, side, one, every_budget=every)]
                assert {one.seed for one in own} == set(range(1, seeds + 1)), (cuts, question.label)
                if question.kind == "trend":
                    along = {one.budget if every else one.pruning.ratio for one in own}
                    assert len(along) >= 3, (cuts, question.label)
        # claim (a): each granularity has a comparison in the family
        family = [one for one in made.comparisons if study.family.holds(one.group(0) | {"budget": one.budget})]
        assert {granularity(one.pruning) for one in family} == {"depth", "width", "sparse"}
        keys = {(one.pruning.name, one.setting, one.against, one.budget) for one in made.comparisons}
        assert earlier is None or keys < earlier, cuts
        earlier = keys


class Prices:
    """A FLOP takes as long as it takes for the parent to need an hour; two at a time."""

    gpus = 2
    parent = 0.0

    def seconds(self, one: estimate.Estimate, nproc: int) -> float | None:
        return None if one.flops is None else 3600 * one.flops / self.parent


def test_hours_cut_as_little_as_fits_and_too_few_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(plan, "look", look)
    real, known = plan.hours, dict[str, float]()

    def hours(content: dict[str, Any], prices: Any) -> float:
        if str(content) not in known:
            known[str(content)] = real(content, prices)
        return known[str(content)]

    monkeypatch.setattr(plan, "hours", hours)
    content, prices = plan.read(seeds=2), Prices()
    prices.parent = next(estimate.of_study(study := schema.from_mapping(content), look(study))).flops or 0
    everything, took, told = plan.fit(content, None, prices)
    assert everything == plan.cut(content, 0) and 120 < took < 180 and len(told) == 1
    less, hours, told = plan.fit(content, 70, prices)
    assert hours <= 70 and less["seeds"] == [1, 2] and len(told) > 2
    listed = [float(line.split()[0]) for line in told]
    assert listed == sorted(listed, reverse=True) and listed[-2] > 70  # the cut before was not enough
    least = plan.hours(plan.cut(content, len(plan.CUTS)), prices)
    with pytest.raises(UsageError, match=rf"--hours: expected at least {least:.1f} on this machine.*got 1"):
        plan.fit(content, 1, prices)


def test_a_trial_is_another_study_of_whole_batches_in_the_same_proportions() -> None:
    content = plan.read(seeds=1, scale=0.01, rate=0.003)
    study = schema.from_mapping(plan.cut(content, len(plan.CUTS)))
    assert study.name == "miniature-x0.01" and study.seeds == [1] and study.recipe.rates == [0.003]
    assert study.parent.pretrain is not None
    batch = 32 * 256
    numbers = [study.parent.pretrain.tokens, *study.budgets, *(m.tokens for m in study.methods if m.tokens)]
    assert all(tokens % batch == 0 and tokens > 0 for tokens in numbers)
    assert [budget / study.parent.pretrain.tokens for budget in study.budgets[3:]] == pytest.approx(
        [1.25, 2.5], rel=0.05
    )
    asked = {budget for question in study.compare for budget in question.of.budgets or []}
    assert asked == {study.budgets[2]}
    assert plan.read(seeds=3) == plan.read(seeds=3, scale=1.0)
    look(study)


def test_the_small_one_has_the_proportions_and_claims_of_the_other() -> None:
    content = plan.read(seeds=3, scale=0.3, study=EXAMPLE / "small.yaml")
    study, large = schema.from_mapping(content), schema.load(EXAMPLE / "study.yaml")
    assert study.name == "miniature-small-x0.3" and study.parent.pretrain is not None
    assert [question.label for question in study.compare] == [question.label for question in large.compare]
    source, tokens = look(study).source, study.parent.pretrain.tokens
    assert source is not None and tokens / source.parameters() == pytest.approx(25, rel=0.02)
    assert [budget / tokens for budget in study.budgets] == pytest.approx([0.05, 0.15, 0.25, 1.25, 2.5], rel=0.02)
    rate = schema.load(EXAMPLE / "small-rate.yaml")
    assert look(rate).source == source and rate.budgets[0] / tokens == pytest.approx(0.2, rel=0.01)
    assert rate.recipe.arguments == study.recipe.arguments
    script = (EXAMPLE / "run.sh").read_text()
    assert "--small) NAME=small RATE=small-rate;" in script and "[ $NAME = small ] && echo 0.3 || echo 1" in script


def test_the_parents_text_is_never_repeated_and_the_rest_is_counted(whole) -> None:
    """The last samples are those that masks are learned on: after the parent's and those of the longest retraining."""
    batch = 32 * 256
    parent, longest = -(-19_200_000 // batch) * batch, round(48_000_000 / batch) * batch
    last = parent + longest + 5_242_880
    assert plan.needed(whole) == pytest.approx(last, abs=batch)
    one, told = plan.with_epochs(whole, 80_000_000)
    assert one["data"]["epochs"] == 1 and "seen before" not in told
    two, told = plan.with_epochs(whole, 50_000_000)
    assert two["data"]["epochs"] == 2 and f"{plan.needed(whole):,}, 1.45 epochs: what follows" in told
    with pytest.raises(UsageError, match="the parent's text is not to be repeated"):
        plan.with_epochs(whole, 19_200_000)


def test_the_rate_is_that_of_the_best_scratch_run(tmp_path) -> None:
    rates = schema.load(EXAMPLE / "rate.yaml").recipe.rates
    lines = [{"cell": f"scratch-x-lr{rate:g}", "lr": rate, "validation_loss": abs(rate - 0.008)} for rate in rates]
    lines += [{"cell": "pruned-x", "lr": rate, "validation_loss": -1.0} for rate in rates] + [{"cell": "parent"}]
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plan.best_rate(ledger, EXAMPLE / "rate.yaml")[0] == 0.008
    ledger.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(DataError, match="expected scratch runs at .*: run .*rate.yaml to its end"):
        plan.best_rate(ledger, EXAMPLE / "rate.yaml")


def test_the_rate_is_chosen_for_the_shape_and_the_recipe_of_the_study() -> None:
    study, rate = schema.load(EXAMPLE / "study.yaml"), schema.load(EXAMPLE / "rate.yaml")
    assert rate.parent.flags == study.parent.flags and rate.data == study.data
    assert rate.recipe.arguments == study.recipe.arguments and rate.recipe.global_batch_size == 32
    assert study.recipe.lr in rate.recipe.rates[1:-1]
    shapes = {cell.source.name: look(rate).targets[cell.source.name] for cell in look(rate).estimated_grid(rate).cells}
    assert set(shapes.values()) == {look(study).source}


def test_the_script_uses_the_paths_of_the_study_and_its_flags() -> None:
    study, script = schema.load(EXAMPLE / "study.yaml"), (EXAMPLE / "run.sh").read_text()
    assert study.data.tokenizer is not None
    data = Path(study.data.tokenizer.model).parent
    assert f"DATA={data}\n" in script and "VOCABULARY=1024" in script
    prefixes = [prefix for _, prefix in study.data.train] + [
        study.data.calibration,
        study.data.validation,
        study.data.test,
    ]
    assert [Path(prefix).parent for prefix in prefixes] == [data] * 4
    flags = set(re.findall(r"options\+=\((--[a-z-]+)|(--[a-z-]+) \"\$(?:SEEDS|SCALE|STUDY)\"", script))
    known = (EXAMPLE / "plan.py").read_text()
    assert flags and all(f'"{first or second}"' in known for first, second in flags)
    names = [line for line in (EXAMPLE / "packages.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(names) == len(set(names)) > 20 and all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) for name in names)


@pytest.mark.parametrize("argv", [["--fast"], ["--hours"]])
def test_the_script_refuses_what_it_does_not_know(argv) -> None:
    ended = subprocess.run(["bash", str(EXAMPLE / "run.sh"), *argv], capture_output=True, text=True)
    assert ended.returncode in (1, 2) and ended.stdout == "" and ended.stderr
