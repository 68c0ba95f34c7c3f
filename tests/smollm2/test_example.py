"""The example's files: its study is read whole, its script uses the study's paths, its budget adds up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
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


# Pruned: five methods, two at most of one shape: so scratch is trained once in depth and once in width. At 3/4 and 1/2
# of the whole model's 10 s a step. Sparse: three methods of the whole model's cost, at two ratios and two N:M; dense
# scratch; SparseGPT's own scratch under its masks.
@pytest.mark.parametrize(
    ("kind", "runs"), [("structured", (5 + 2) * (0.75 + 0.5)), ("sparse", 3 * (2 + 2) + 1 + (2 + 2))]
)
def test_the_budget_is_shared_out_among_the_runs(tmp_path, monkeypatch, kind, runs):
    spec = importlib.util.spec_from_file_location("budget", EXAMPLE / "budget.py")
    budget = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(budget)
    monkeypatch.setattr(budget, "seconds_per_step", lambda study, checkpoint: 10.0)
    output = tmp_path / "study.yaml"
    argv = ["budget.py", "--minutes", "120", "--methods", kind, "--checkpoint", "c", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    assert budget.main() == 0
    study = config.load(output)
    tokens = study.recipe.global_batch_size * study.data.seq_length
    steps, rest = divmod(study.budgets[0], tokens)
    assert rest == 0 and steps == int(7200 * 0.7 / (runs * 10 * 2))  # at two learning rates, in 70% of two hours
    assert study.name == f"smollm2-{kind}" and {method.sparse for method in study.methods} == {kind == "sparse"}
    unchanged = yaml.safe_load((EXAMPLE / "study.yaml").read_text())
    written = yaml.safe_load(output.read_text())
    assert written["methods"] == [m for m in unchanged["methods"] if ("pattern" in m) == (kind == "sparse")]
    varies = {"name": study.name, "methods": written["methods"], "budgets": study.budgets}
    assert written == unchanged | varies
