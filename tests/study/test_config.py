"""study.yaml is read strictly: errors name the key and the allowed values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.errors import DataError, UsageError
from megatron_prune.study import schema, values

ROOT = Path(__file__).resolve().parents[2]
GOOD: dict[str, Any] = {
    "name": "a-study",
    "data": {"train": "a", "calibration": "c", "validation": "v", "test": "t", "seq_length": 8},
    "parent": {"pretrain": {"tokens": "1.5M", "arguments": {"num_layers": 2}}},
    "recipe": {"lr": "3e-4", "global_batch_size": 16, "micro_batch_size": 8},
    "methods": [{"name": "shortgpt"}],
    "ratios": [0.5],
    "budgets": ["400k"],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """``GOOD`` with one key set; ``...`` removes it."""
    content = copy.deepcopy(GOOD)
    *inside, last = path.split(".")
    here: Any = content
    for part in inside:
        here = here[int(part)] if isinstance(here, list) else here[part]
    if value is ...:
        del here[last]
    else:
        here[int(last) if isinstance(here, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seeds", [0, 1], r"seeds\.0: expected greater than 0, got 0"),
        ("seed", 1, r"seed: expected one of name, data, .*seeds.*, got an unknown key"),
        ("data.seqlength", 8, r"data\.seqlength: expected one of train, .*seq_length.*, got an unknown key"),
        ("methods.0.ratio", 0.5, r"methods\.0\.ratio: expected one of name, pattern, settings.*, got an unknown key"),
        ("parent.pretrain.layers", 2, r"parent\.pretrain\.layers: expected one of tokens, arguments, seed"),
        ("recipe.lr", ..., r"recipe\.lr: expected a value.*, got nothing"),
        ("recipe.lr", "fast", r"recipe\.lr: expected .*, got 'fast'"),
        ("recipe.arguments", {"train_iters": 3}, r"recipe\.arguments\.train-iters: expected.*set"),
        ("parent.pretrain.arguments", {"seed": 3}, r"parent\.pretrain\.arguments\.seed: expected.*set"),
        ("recipe.global_batch_size", 12, r"recipe\.global_batch_size: expected a multiple of .* = 8, got 12"),
        ("launch", {"nproc": 3, "tensor_parallel": 2}, r"launch\.nproc: expected a multiple of .* = 2, got 3"),
        ("budgets", ["40 apples"], r"budgets\.0: expected a positive number.*, got '40 apples'"),
        ("budgets", ["0 steps"], r"budgets\.0: expected greater than 0, got 0"),
        ("budgets", ["1.5 steps"], r"budgets\.0: expected a positive number.*, got '1.5 steps'"),
        ("budgets", ["3_125 steps", "400k"], r"budgets: expected different values, got \[400000, 400000\]"),
        ("budgets", [100, 100], r"budgets: expected different values, got \[100, 100\]"),
        ("budgets", ["400k", 400_030], r"budgets: .*got 400000 and 400030 .*are 3125 steps of 128 tokens: one run"),
        ("budgets", [63], r"budgets: expected at least half a global batch"),
        ("evaluation", {"corpora": {"test": "x"}}, r"evaluation\.corpora\.test: expected another label"),
        ("evaluation", {"corpora": {"c 4": "x"}}, r"evaluation\.corpora.*c 4"),
        ("evaluation", {"limit": 5}, r"evaluation\.limit: expected evaluation\.tasks with it, got it alone"),
        ("evaluation", {"tasks": ["paper-perplexity"]}, r"evaluation\.tasks: .*got paper-perplexity.*prepare-suite"),
        ("evaluation", {"tasks": ["paper-zero-shot"], "few_shot": 5}, r"evaluation\.few_shot: expected 0 with paper"),
        ("evaluation", {"tasks": ["a"], "suites": {"paper-zero-shot": {"a": "acc"}}}, r"under a name of its own"),
        ("evaluation", {"tasks": ["a", "a"]}, r"evaluation\.tasks: expected different values"),
        ("ratios", [1.5], r"ratios\.0: expected less than 1, got 1\.5"),
        ("ratios", [], r"ratios: expected .*, got none"),
        ("settings", ["equal-training"] * 2, r"settings: expected different values, got .*"),
        ("methods", [{"name": "random"}, {"name": "wanda", "pattern": "2:4", "target": {"num-layers": 2}}],
         r"methods\.wanda-2-4\.target: expected either a pattern or a target, got both"),
        ("methods.0.pattern", "4:2", r"methods\.0\.pattern: expected unstructured, or N:M with.*, got '4:2'"),
        ("methods.0.pattern", "sometimes", r"methods\.0\.pattern: expected .*, got 'sometimes'"),
        ("methods.0.pattern", True, r"methods\.0\.pattern: expected .*, got True"),
        ("methods.0.compare", {"equal-total": ["masked"]}, r"methods\.shortgpt\.compare: .* settings alone"),
        ("methods.0.compare", [], r"methods\.0\.compare: expected .*, got \[\]"),
        ("methods.0.compare", ["equal-total"] * 2, r"methods\.0\.compare: expected different values, got .*"),
        ("methods.0.compare", ["equal-time"], r"methods\.0\.compare\.equal-time.*: .*'equal-training', 'equal"),
        ("methods.0.compare", {"equal-total": ["thin"]}, r"compare\.equal-total\.0: expected 'dense'.*, got 'thin'"),
        ("methods.0.settings", {"ratio": 0.3}, r"methods\.shortgpt\.settings\.ratio: expected.*set"),
        ("methods", [{"name": "wanda", "pattern": "2:4"}] * 2, r"methods: expected a label.*, got wanda-2-4 twice"),
        ("methods", [{"name": "wanda", "pattern": "2:4"}, {"name": "magnitude", "pattern": "2:4", "label": "wanda"}],
         r"methods: expected .*, got two with the same name and pattern"),
        ("scratch", ["sparse"], r"scratch\.0: expected 'dense' or 'masked'.*, got 'sparse'"),
        ("settings", ["equal-time"], r"settings\.0: expected 'equal-training', 'equal-total' or .*, got 'equal-time'"),
        ("methods", [{"name": "random"}] * 2, r"methods: expected a label.*, got random twice"),
        ("parent.load", "x", r"parent: expected exactly one.*, got pretrain and load"),
        ("parent", {}, r"parent: expected .*, got none of them"),
        ("parent.declared_tokens", 5, r"parent\.declared_tokens.*expected .* with them, got parent\.pretrain"),
        ("data.validation", "./a", r"data\.validation: expected a corpus that is not in data\.train, got \./a"),
        ("data.train", [[1, "a"], "b"], r"data\.train: expected .*, got weights for some"),
        ("data.train", [[0, "a"]], r"data\.train\.0\.0: expected greater than 0, got 0"),
        ("name", "../x", r"name: expected .*, got '\.\./x'"),
        ("launch", {"launcher": "lsf"}, r"launch\.launcher: expected 'local' or 'slurm'.*, got 'lsf'"),
        ("launch", {"slurm": {}}, r"launch\.slurm: expected launcher: slurm with it, got it alone"),
        ("launch", {"launcher": "slurm", "nproc": 12, "slurm": {"ranks_per_node": 8}}, r"launch\.nproc: .*got 12"),
        ("launch", {"launcher": "slurm", "parallel_cells": 2}, r"launch\.parallel_cells: expected .*, got 2"),
        ("launch", {"retries": -1}, r"launch\.retries: expected .*, got -1"),
        ("recipe.lr", [1e-3], r"recipe\.lr.*at least 2"),
        ("recipe.lr", [1e-3, 1e-3], r"recipe\.lr: expected different values, got .*"),
        ("recipe.lr", [1e-3, 0], r"recipe\.lr: expected greater than 0, got .*"),
        ("recipe.lr", [1e-3, 2e-3], r"parent\.pretrain\.lr: expected one learning rate, got nothing"),
        ("retention", "some", r"retention: expected 'all', 'final' or 'none'.*, got 'some'"),
        ("tracking", {"wandb_entity": "me"}, r"tracking\.wandb_entity: .*wandb_project with it, got me alone"),
        ("recipe.arguments", {"wandb-project": "x"}, r"recipe\.arguments\.wandb-project: expected.*set"),
        ("methods.0", {"chain": [{"name": "shortgpt", "ratio": 0.5}]}, r"got name '' and 1 links of a chain"),
        ("methods.0", {"name": "wanda", "chain": [{"name": "shortgpt", "ratio": 0.5}] * 2},
         r"got name 'wanda' and 2 links of a chain"),
        ("methods.0", {"chain": [{"name": "shortgpt", "ratio": 0.5}, {"name": "wanda", "pattern": "unstructured"}]},
         r"methods\.chain\.wanda-unstructured: expected .*, got nothing that says how much"),
        ("methods.0", {"chain": [{"name": "flap", "ratio": 0.5}, {"name": "wanda", "pattern": "2:4", "ratio": 0.5}]},
         r"methods\.chain\.wanda-2-4: expected .*, got more than one"),
        ("methods.0", {"chain": [{"name": "shortgpt", "ratio": 0.5}] * 2, "settings": {"axis": "depth"}},
         r"expected pattern, settings, target and tokens in the links of the chain, got them beside a chain"),
    ],
)  # fmt: skip
def test_refuses(path: str, value: Any, message: str) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        schema.from_mapping(changed(path, value))


def test_budgets_of_different_steps_are_not_refused() -> None:
    study = schema.from_mapping(changed("budgets", [128 * 7, 128 * 8]))
    assert study.budgets == [896, 1024]


def test_defaults_and_round_trip() -> None:
    study = schema.from_mapping(GOOD)
    assert study.parent.pretrain is not None and study.parent.pretrain.tokens == 1_500_000
    assert study.parent.pretrain.arguments == {"num-layers": 2}
    assert study.budgets == [400_000] and study.recipe.lr == 3e-4
    assert study.settings == ["equal-training", "equal-total"]
    assert study.calibration_seq_length == study.evaluation_seq_length == 8
    assert schema.from_mapping(schema.resolved(study)) == study


@pytest.mark.parametrize(
    ("text", "tokens"), [("400k", 400_000), ("1.5M", 1_500_000), ("1e9", 10**9), ("50B", 5 * 10**10), (7, 7)]
)
def test_tokens(text: Any, tokens: int) -> None:
    assert values.parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([[0.7, "a"], [0.3, "b"]], ["0.7", "a", "0.3", "b"]),
    ],
)
def test_blend_is_megatrons(train: Any, words: list[str]) -> None:
    assert schema.from_mapping(changed("data.train", train)).data.blend == words


@pytest.mark.parametrize("written", ["2:4", '"2:4"', "'2:4'"])
def test_a_pattern_needs_no_quotes(written: str) -> None:
    content = yaml.safe_load(f"name: wanda\npattern: {written}")
    (method,) = schema.from_mapping(changed("methods", [content])).methods
    assert (method.pattern, method.title, method.tag, method.own_ratio) == ("2:4", "wanda", "wanda-2-4", 0.5)


def test_a_sparse_method_says_which_comparisons_it_is_for() -> None:
    methods = [
        {"name": "shortgpt", "compare": ["equal-total"]},
        {"name": "wanda", "pattern": "unstructured"},
        {"name": "wanda", "pattern": "16:32", "compare": {"equal-training": ["dense", "masked"], "equal-total": None}},
    ]
    study = schema.from_mapping(changed("methods", methods))
    assert [method.tag for method in study.methods] == ["shortgpt", "wanda-unstructured", "wanda-16-32"]
    assert [study.compared(method) for method in study.methods] == [
        [("equal-total", "dense")],
        [("equal-training", "masked"), ("equal-total", "masked")],
        [("equal-training", "dense"), ("equal-training", "masked"), ("equal-total", "masked")],
    ]
    assert schema.from_mapping(schema.resolved(study)) == study
    with pytest.raises(UsageError, match="ratio_of: expected linears.*, got all"):
        schema.from_mapping(changed("methods", methods) | {"ratio_of": "all"})
    with pytest.raises(UsageError, match="ratios: expected .*, got none"):
        schema.from_mapping(changed("methods", methods[1:]) | {"ratios": []})
    schema.from_mapping(changed("methods", methods[2:]) | {"ratios": []})


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing.yaml"):
        schema.load(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(UsageError, match=r"expected valid YAML, got .*broken\.yaml, line 1"):
        schema.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UsageError, match="expected a mapping.*, got a list"):
        schema.load(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: a\nbudgets: [1]\nname: b",
            r"study\.yaml, line 3: name: expected each key once, .* lines 1 and 3",
        ),
        (
            "recipe:\n  lr: 1e-3\n  'lr': 2e-3",
            r"study\.yaml, line 3: lr: expected each key once, .* lines 2 and 3",
        ),
        ("parents: {a: {load: x}}", "name: expected a text, got nothing"),
        ("name: 5\nparents: {a: {load: x}}", "name: expected a text, got 5"),
    ],
)
def test_a_key_that_is_there_twice_and_parents_without_a_name_are_refused(tmp_path: Path, text, message: str) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        schema.load_all(tmp_path / "study.yaml")


def test_a_merged_key_may_be_set_again(tmp_path: Path) -> None:
    content = changed("recipe", {"global_batch_size": 16, "micro_batch_size": 8, "lr": 1e-3})
    text = yaml.safe_dump({**content, "recipe": None}).replace("recipe: null", "recipe: {<<: {global_batch_size: 16, "
                                                               "micro_batch_size: 8, lr: 1e-3}, lr: 2e-3}")  # fmt: skip
    (tmp_path / "study.yaml").write_text(text)
    assert schema.load(tmp_path / "study.yaml").recipe.lr == 2e-3


STUDIES = [path for path in sorted(ROOT.glob("examples/*/*.yaml")) if path.name not in ("layouts.yaml", "common.yaml")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_study_is_valid(path: Path) -> None:
    study = schema.load(path)
    assert schema.from_mapping(yaml.safe_load(yaml.safe_dump(schema.resolved(study)))) == study


def test_budgets_in_steps_are_exactly_those_steps() -> None:
    """12,500 steps of the paper's batch are 52,428,800,000 tokens: no rounding on the way."""
    content = changed("budgets", ["12_500 steps", "1 step"])
    content["recipe"] |= {"global_batch_size": 1024}
    content["data"] |= {"seq_length": 4096}
    content["family"] = {"budgets": ["12_500 steps"]}
    found = schema.from_mapping(content)
    assert found.budgets == [52_428_800_000, 4_194_304] and found.family.budgets == [52_428_800_000]
    assert schema.from_mapping(schema.resolved(found)) == found
