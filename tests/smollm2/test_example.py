"""The example's files: its study is valid, its script uses the study's paths, its budget adds up."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune import methods
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.study import grid, prunings, schema
from megatron_prune.study.sample_ranges import Batch, Lay

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2_135m"


def test_the_study_names_methods_and_paths_that_there_are():
    study = schema.load(EXAMPLE / "study.yaml")
    script = (EXAMPLE / "run.sh").read_text()
    assert {method.name for method in study.methods if not method.pattern} <= set(methods.names())
    sparse = {(method.name, method.pattern) for method in study.methods if method.pattern}
    names = set(methods.sparse_names()) - {"random"}
    assert sparse == {(name, pattern) for name in names for pattern in ("unstructured", "4:8", "2:4")}
    assert "random" in {method.name for method in study.methods}  # the floor
    prefixes = [prefix for _, prefix in study.data.train]
    prefixes += [study.data.calibration, study.data.validation, study.data.test]
    assert "DATA=runs/smollm2-data" in script and all(Path(p).parent == Path("runs/smollm2-data") for p in prefixes)
    assert study.parent.import_hf == "runs/smollm2-data/hf"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def test_equal_total_is_a_comparison_that_says_why_it_was_not_run():
    study = schema.load(EXAMPLE / "study.yaml")
    lay = Lay(Batch(study.recipe.global_batch_size, study.data.seq_length), 0, study.parent.declared_tokens)
    consumed = {pruning.name: 16_384 for pruning in prunings.prunings(study)}
    found = grid.expand(study, lay, {}, consumed).comparisons
    reasons = {(c.setting, bool(c.scratch), bool(c.not_run)) for c in found}
    assert reasons == {("equal-training", True, False), ("equal-total", False, True)}
    assert not study.family.holds({"setting": "equal-total"})  # comparisons that are not run affect no verdict


SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, tied=True)


# By hand, at depth's shapes: structured, nine pruned models and one from scratch for depth, one for width, one for
# groups and FFN channels, one for these with biases, and one for the method that learns masks, at both ratios; sparse,
# three methods at two ratios and two N:M, dense scratch, SparseGPT's own scratch. All at two rates.
@pytest.mark.parametrize(("kind", "layers"), [
    ("structured", 2 * (9 + 5) * [22, 15]), ("sparse", 2 * (3 * (2 + 2) + 1 + (2 + 2)) * [30]),
])  # fmt: skip
@pytest.mark.parametrize("minutes", [60, 120, 1200])
def test_the_budget_is_what_the_runs_take(kind, layers, minutes):
    budget, whole = script("budget"), yaml.safe_load((EXAMPLE / "study.yaml").read_text())
    content = budget.only(whole, kind)
    study, steps, expected = budget.planned(content, minutes, 4.0, SMOLLM2)
    read = schema.from_mapping(study, where="study")
    assert read.budgets == [steps * read.recipe.global_batch_size * 512]
    training = sum(replace(SMOLLM2, num_layers=n).training_flops(512) for n in layers) / SMOLLM2.training_flops(512)
    share = 4.0 * steps * training / (60 * minutes)
    assert 0.6 < share < 1 and 60 * (minutes - expected) < 4.0 * training  # another step would be too many
    assert {method.sparse for method in read.methods} == {kind == "sparse"} and read.name == f"smollm2-{kind}"
    tokens = {method.tokens for method in read.methods if method.name == "sheared-llama"}
    assert all(0 < found <= 81_920 and found % 2048 == 0 for found in tokens) and len(tokens) == (kind == "structured")
    own = [m | {"tokens": max(tokens, default=0)} if "tokens" in m else m for m in whole["methods"]]
    assert study["methods"] == [m for m in own if ("pattern" in m) == (kind == "sparse")]
    varies = ("name", "methods", "budgets", "evaluation", "calibration")
    assert {k: v for k, v in study.items() if k not in varies} == {k: v for k, v in whole.items() if k not in varies}
    if minutes == 1200:
        assert (read.evaluation.windows, read.calibration.sequences) == (16, 32)  # the study's own
        assert tokens <= {81_920}


def test_with_distillation_every_run_is_made_twice_and_the_teacher_speaks_once():
    budget, whole = script("budget"), yaml.safe_load((EXAMPLE / "study.yaml").read_text())
    contents = [budget.only(whole, "sparse", objective) for objective in ("lm", "distill")]
    plain, both = (
        schema.from_mapping(budget.planned(content, 600, 4.0, SMOLLM2)[0], where="study") for content in contents
    )
    assert (plain.name, both.name) == ("smollm2-sparse", "smollm2-sparse-distill")
    assert plain.objectives == ["lm"] and both.objectives == ["lm", "distill"] and both.distillation.cached
    one, two = (budget.work(study, SMOLLM2) for study in (plain, both))
    assert two.runs == 2 * one.runs and two.calibration == one.calibration
    assert two.training == 2 * one.training + SMOLLM2.forward_flops(512)
    assert 0.45 < both.budgets[0] / plain.budgets[0] < 0.5


def test_a_short_budget_evaluates_less_and_one_that_is_too_short_is_refused():
    budget = script("budget")
    content = budget.only(yaml.safe_load((EXAMPLE / "study.yaml").read_text()), "structured")
    study, steps, expected = budget.planned(content, 36, 8.0, SMOLLM2)
    assert study["evaluation"]["windows"] == study["calibration"]["sequences"] == 4 and steps >= 4 and expected <= 36
    assert {m["tokens"] for m in study["methods"] if "tokens" in m} == {4 * 4 * 512}
    with pytest.raises(UsageError, match=r"--budget: expected at least \d+ on this.*, got 5 minutes") as why:
        budget.planned(content, 5, 8.0, SMOLLM2)
    least = int(str(why.value).split("at least ")[1].split()[0])
    assert budget.planned(content, least, 8.0, SMOLLM2)[1] == 4


def test_another_source_than_the_one_that_is_there_is_refused(tmp_path, monkeypatch, capsys):
    prepare, hub = script("prepare"), tmp_path / "cache"
    hub.mkdir()
    (tmp_path / "blob").write_text("{}")
    (hub / "config.json").symlink_to(tmp_path / "blob")
    monkeypatch.setattr(prepare, "local_directory", lambda name: hub)
    output = tmp_path / "data" / "hf"
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--output", str(output), "--hub", "owner/model"])
    assert prepare.main() == 0 and prepare.main() == 0
    assert (output / "config.json").read_text() == "{}" and not (output / "config.json").is_symlink()
    gguf = ["--gguf", str(tmp_path / "model.gguf")]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--output", str(output), *gguf])
    assert prepare.main() == 2
    assert f"{output} was made from owner/model, not from model.gguf" in capsys.readouterr().err
