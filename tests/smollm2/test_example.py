"""The example's files: its study is read whole, its script uses the study's paths, its budget adds up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import yaml

from megatron_prune import methods
from megatron_prune.study import config

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2_135m"


def test_the_study_names_methods_and_paths_that_there_are():
    study = config.load(EXAMPLE / "study.yaml")
    script = (EXAMPLE / "run.sh").read_text()
    assert {method.name for method in study.methods if not method.pattern} <= set(methods.names())
    sparse = {(method.name, method.pattern) for method in study.methods if method.pattern}
    names = set(methods.sparse_names()) - {"random"}
    assert sparse == {(name, pattern) for name in names for pattern in ("unstructured", "4:8", "2:4")}
    assert "random" in {method.name for method in study.methods}  # the floor
    prefixes = [prefix for _, prefix in study.data.train]
    prefixes += [study.data.calibration, study.data.validation, study.data.test]
    assert "DATA=runs/smollm2-data" in script and all(Path(p).parent == Path("runs/smollm2-data") for p in prefixes)
    assert study.parent.import_hf == "runs/smollm2-data/hf" and study.parent.equal_total == "skip"


def test_the_budget_is_shared_out_among_the_runs(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("budget", EXAMPLE / "budget.py")
    budget = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(budget)
    monkeypatch.setattr(budget, "seconds_per_step", lambda study, checkpoint: 10.0)
    output = tmp_path / "study.yaml"
    monkeypatch.setattr(sys, "argv", ["budget.py", "--minutes", "120", "--checkpoint", "c", "--output", str(output)])
    assert budget.main() == 0
    study = config.load(output)
    tokens = study.recipe.global_batch_size * study.data.seq_length
    steps, rest = divmod(study.budgets[0], tokens)
    # Four methods, each pruned and scratch, at 3/4 and 1/2 of the whole model's 10 s a step, in 70% of two hours;
    # three sparse ones of the whole model's cost, at two ratios and two N:M; dense scratch; SparseGPT's own scratch.
    runs = 2 * 4 * 0.75 + 2 * 4 * 0.5 + 3 * (2 + 2) + 1 + (2 + 2)
    assert rest == 0 and steps == int(7200 * 0.7 / (runs * 10))
    unchanged = yaml.safe_load((EXAMPLE / "study.yaml").read_text()) | {"budgets": study.budgets}
    assert yaml.safe_load(output.read_text()) == unchanged
