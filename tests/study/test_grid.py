"""Ranges and the grid: for any budgets, compared arms consume the samples of docs/pages/concepts.md, Streams."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study import commands, grid, prunings, schema
from megatron_prune.study.prunings import Places
from megatron_prune.study.sample_ranges import Batch, Lay, counted
from tests.study.test_config import GOOD

batches = st.builds(Batch, st.integers(1, 512), st.integers(1, 4096))
SHAPE = {
    "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
    "ffn_hidden_size": 64,
}  # fmt: skip


@given(batches, st.integers(1, 10**6), st.integers(1, 10**7), st.integers(0, 10**6))
def test_ranges(batch: Batch, parent_steps: int, retrain: int, consumed: int) -> None:
    lay = Lay(batch, parent_steps * batch.samples, parent_steps * batch.tokens)
    if 2 * retrain < batch.tokens:
        with pytest.raises(DataError, match="at least half a global batch"):
            lay.retrain(retrain)
        return
    range_ = lay.retrain(retrain)
    assert range_.start == lay.parent_end and range_.end - range_.start == range_.steps * batch.samples
    tokens = range_.steps * batch.tokens
    assert 2 * abs(tokens - retrain) <= batch.tokens
    total = lay.scratch_total(tokens, consumed)
    assert lay.parent_tokens is not None
    wanted = lay.parent_tokens + tokens + (consumed if consumed * 1000 >= lay.parent_tokens + tokens else 0)
    assert total.start == 0 and total.end == total.steps * batch.samples
    assert 0 <= total.steps * batch.tokens - wanted < batch.tokens
    assert total.end >= range_.end  # all samples of the pruned arm


@given(batches, st.integers(1, 100), st.integers(0, 100), st.integers(1, 100))
def test_retraining_begins_after_the_parents_and_that_between_links(
    batch: Batch, parent: int, between: int, steps: int
) -> None:
    lay = Lay(batch, parent * batch.samples, parent * batch.tokens)
    found = lay.retrain(steps * batch.tokens, before=between * batch.tokens)
    assert (found.start, found.steps) == ((parent + between) * batch.samples, steps)
    assert found.end - found.start == steps * batch.samples


@given(
    batches, st.integers(0, 10**15), st.integers(1, 500), st.integers(0, 10**13), st.integers(1, 10**9),
    st.integers(0, 10**14),
)  # fmt: skip
def test_ranges_of_equal_flops(batch: Batch, parent: int, steps: int, spent: int, sequence: int, between: int) -> None:
    """The fewest whole batches with the FLOPs of parent, pruning and all retraining."""
    retrain = batch.range(3 * batch.samples, steps)
    trained = parent + between + steps * batch.samples * sequence
    wanted = trained + (spent if spent * 1000 >= trained else 0)
    found = Lay(batch, 0, 0, parent).scratch_flops(retrain, spent, sequence, between)
    assert found is not None and found.start == 0 and found.end == found.steps * batch.samples
    assert 0 <= found.end * sequence - wanted < batch.samples * sequence
    assert Lay(batch, 0, 0, None).scratch_flops(retrain, spent, sequence) is None  # unknown


@given(st.integers(0, 10**12), st.integers(1, 10**12))
def test_negligible_consumption_is_not_counted(consumed: int, trained: int) -> None:
    assert counted(consumed, trained) == (consumed if consumed >= trained / 1000 else 0)


def make(**changes: object) -> schema.StudyConfig:
    return schema.from_mapping(GOOD | changes)


LAY = Lay(Batch(16, 8), 16 * 1000, 128_000)


def test_every_combination_once() -> None:
    study = make(
        methods=[{"name": "shortgpt"}, {"name": "minitron-width"}],
        ratios=[0.25, 0.5],
        budgets=[12_800, 25_600],
        seeds=[1, 2, 3],
    )
    shapes = {p.name: SHAPE | {"num_layers": 3 + 100 * i} for i, p in enumerate(prunings.prunings(study))}
    made = grid.expand(study, LAY, shapes, {})
    assert len(made.comparisons) == 2 * 2 * 2 * 2 * 3
    ids = [cell.id for cell in made.cells]
    assert len(ids) == len(set(ids)) == 24 + 48
    cells = {cell.id: cell for cell in made.cells}
    for comparison in made.comparisons:
        pruned, scratch = cells[comparison.pruned], cells[comparison.scratch or ""]
        assert pruned.seed == scratch.seed == comparison.seed
        assert pruned.samples.start == LAY.parent_end
        if comparison.setting == "equal-training":
            assert scratch.samples == pruned.samples
        else:
            assert scratch.samples.start == 0 and scratch.samples.end == pruned.samples.end


def test_what_is_left_out_is_not_made_and_nothing_else_is_missing() -> None:
    """Against all comparisons, filtered here; and the runs that these need, and no others."""
    methods = [
        {"name": "shortgpt"},
        {"name": "wanda", "pattern": "2:4", "compare": {"equal-training": ["dense", "masked"]}},
    ]
    whole = {"methods": methods, "ratios": [0.25, 0.5], "budgets": [12_800, 25_600], "seeds": [1, 2]}
    left = [
        {"ratios": [0.25], "budgets": [25_600]}, {"ratios": [0.25], "settings": ["equal-total"]},
        {"methods": ["shortgpt"], "ratios": [0.5], "seeds": [2]}, {"against": "masked", "budgets": [12_800]},
    ]  # fmt: skip

    def comparisons(study: schema.StudyConfig) -> dict[tuple[Any, ...], grid.Comparison]:
        shapes = {p.name: SHAPE | {"num_layers": 3 + 100 * i} for i, p in enumerate(prunings.prunings(study))}
        made = grid.expand(study, LAY, shapes, {})
        runs = {run for one in made.comparisons for run in (one.pruned, one.scratch)}
        assert {cell.id for cell in made.cells} == runs
        assert {p.name for p in prunings.prunings(study)} == {one.pruning.name for one in made.comparisons}
        return {
            (one.pruning.method.name, one.pruning.ratio, one.setting, one.against, one.budget, one.seed): one
            for one in made.comparisons
        }

    def stays(method: str, ratio: float, setting: str, against: str, budget: int, seed: int) -> bool:
        return not (
            (ratio == 0.25 and (budget == 25_600 or setting == "equal-total"))
            or (method == "shortgpt" and ratio == 0.5 and seed == 2)
            or (against == "masked" and budget == 12_800)
        )

    everything, rest = comparisons(make(**whole)), comparisons(make(**whole, leave_out=left))
    assert set(rest) == {key for key in everything if stays(*key)} and 0 < len(rest) < len(everything)
    assert all(rest[key].pruned == everything[key].pruned for key in rest)
    none = make(**whole, leave_out=[{"methods": ["shortgpt"]}])
    assert {p.method.name for p in prunings.prunings(none)} == {"wanda"}


def test_an_objective_is_left_out_alone() -> None:
    study = make(
        methods=[{"name": "shortgpt"}, {"name": "wanda", "pattern": "2:4"}], objectives=["lm", "distill"],
        leave_out=[{"methods": ["wanda"], "objectives": ["distill"]}],
    )  # fmt: skip
    made = grid.expand(study, LAY, {}, {})
    found = {(one.pruning.method.name, one.objective) for one in made.comparisons}
    assert found == {("shortgpt", "lm"), ("shortgpt", "distill"), ("wanda", "lm")}
    assert {(cell.source.method.name, cell.objective) for cell in made.cells} == found


@pytest.mark.parametrize(("left", "message"), [
    ({"seeds": [3]}, r"leave_out\.0\.seeds: expected one that the study has: 1, 2, got 3"),
    ({"methods": ["wanda"]}, r"leave_out\.0\.methods: expected .*shortgpt, got wanda"),
    ({"against": "sparse"}, r"leave_out\.0\.against: expected"),
])  # fmt: skip
def test_only_what_the_study_has_can_be_left_out(left: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(seeds=[1, 2], leave_out=[left])


def test_one_shape_shares_its_scratch_runs_where_they_consume_the_same() -> None:
    study = make(methods=[{"name": "shortgpt"}, {"name": "random", "settings": {"axis": "depth"}}])
    names = [p.name for p in prunings.prunings(study)]
    shapes = dict.fromkeys(names, SHAPE)

    def scratch(consumed: dict[str, int]) -> set[str]:
        return {cell.id for cell in grid.expand(study, LAY, shapes, consumed).cells if cell.kind == "scratch"}

    assert len(scratch({})) == 2
    assert len(scratch({names[0]: 10})) == 2  # below 0.1% of the training tokens
    assert len(scratch({names[0]: 100_000})) == 3
    other = {names[0]: SHAPE, names[1]: SHAPE | {"ffn_hidden_size": 60}}
    assert len([c for c in grid.expand(study, LAY, other, {}).cells if c.kind == "scratch"]) == 4


def test_calibration_follows_the_seed_only_when_windows_do() -> None:
    def cell(**changes: object) -> str:
        study = make(seeds=[3], **changes)
        return prunings.calibration_cell(study, prunings.prunings(study)[0])

    assert cell() == "calibration-s3"
    assert cell(calibration={"sampling": "sequential"}) == "calibration"
    assert cell(calibration={"sampling": "sequential"}, parent_per_seed=True) == "calibration-s3"


def test_a_target_has_no_ratio() -> None:
    study = make(methods=[{"name": "shortgpt", "target": {"num-layers": 2}}, {"name": "random"}], ratios=[0.5, 0.6])
    assert [(p.method.name, p.ratio) for p in prunings.prunings(study)] == [
        ("shortgpt", None), ("random", 0.5), ("random", 0.6)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parent", "tokens", "reason"),
    [
        ({"load": "x", "declared_tokens": "2T"}, 2 * 10**12, "are only declared"),
        ({"load": "x"}, None, "are unknown"),
    ],
)
def test_an_outside_parent_is_not_matched_by_guessing(parent: dict, tokens: int | None, reason: str) -> None:
    study = make(parent=parent)
    made = grid.expand(study, Lay(Batch(16, 8), 0, tokens, declared=tokens or 0), {}, {})
    by_setting = {comparison.setting: comparison for comparison in made.comparisons}
    assert by_setting["equal-total"].scratch is None and reason in by_setting["equal-total"].not_run
    assert by_setting["equal-training"].scratch is not None
    assert [cell.samples.start for cell in made.cells] == [0, 0]


def test_a_declared_parent_is_matched_when_the_study_says_so() -> None:
    study = make(parent={"load": "x", "declared_tokens": 12_800, "equal_total": "run"})
    made = grid.expand(study, Lay(Batch(16, 8), 0, 12_800), {}, {})
    total = next(cell for cell in made.cells if "equal-total" in cell.id)
    assert total.samples.steps * 128 == 12_800 + 400_000


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({}, {1: "--lr-warmup-fraction 0.05", 90: "--lr-warmup-fraction 0.05", 2000: "--lr-warmup-fraction 0.05"}),
        ({"warmup_at_most": 50}, {1: "", 90: "--lr-warmup-iters 4", 2000: "--lr-warmup-iters 50"}),
        ({"warmup_at_most": 50, "warmup_fraction": 0}, {1: "", 90: "", 2000: ""}),
    ],
)
def test_warm_up_is_a_fraction_of_a_runs_steps_up_to_the_cap(recipe: dict[str, Any], words: dict[int, str]) -> None:
    study = make(recipe=GOOD["recipe"] | recipe)
    for steps, expected in words.items():
        argv = commands.recipe(study, Places(Path("runs")), LAY.batch.range(0, steps), 1, 1e-3, permute=True)
        found = [word for i, word in enumerate(argv) if "warmup" in word or (i and "warmup" in argv[i - 1])]
        assert " ".join(found) == expected, steps


def test_masks_of_methods_whose_labels_begin_alike_are_of_two_runs() -> None:
    """A label can contain the separator before a name's seed."""
    method = {"name": "sparsegpt", "pattern": "2:4", "compare": {"equal-training": ["masked"]}}
    study = make(methods=[method | {"label": label} for label in ("my-small", "my-slow")], settings=["equal-training"])
    made = grid.expand(study, LAY, {p.name: SHAPE for p in prunings.prunings(study)}, {})
    found = sorted(c.id.split("-r50-")[0] for c in made.cells if c.kind == "scratch")
    assert found == ["scratch-masked-my-slow", "scratch-masked-my-small"]


def test_of_several_rates_a_comparison_names_the_first() -> None:
    parent = {"pretrain": GOOD["parent"]["pretrain"] | {"lr": 1e-3}}
    study = make(recipe=GOOD["recipe"] | {"lr": [1e-3, 2e-3, 3e-3]}, parent=parent)
    made = grid.expand(study, LAY, {p.name: SHAPE for p in prunings.prunings(study)}, {})
    for comparison in made.comparisons:
        assert [rate for rate, _, _ in comparison.swept] == [1e-3, 2e-3, 3e-3]
        assert (comparison.pruned, comparison.scratch) == comparison.swept[0][1:]
        assert comparison.pruned.endswith("-lr0.001")


def test_shapes_of_layers_that_differ_have_tags_of_their_own() -> None:
    """As in memory and as read from a record; a uniform shape's tag stays."""
    uniform = ModelShape(2, 24, 6, 3, 5, 20, 16, tied=False)
    assert grid.shape_tag(asdict(uniform)) == "L2h24H6G3d5F20"
    found = []
    for ffn in (7, 8):
        shape = uniform.with_layers([uniform.by_layer()[0], LayerShape(4, 2, ffn)])
        found.append(grid.shape_tag(asdict(shape)))
        assert grid.shape_tag(json.loads(json.dumps(asdict(shape)))) == found[-1]
    assert found[0] != found[1] and all(re.fullmatch(r"L2h24H6G3d5F20v\d+", tag) for tag in found)
