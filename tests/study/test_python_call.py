"""``megatron_prune.Study``: a study from Python is the one of the command line."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import yaml

import megatron_prune as mp
from megatron_prune import artifacts
from megatron_prune.api import checkpoints, studies
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.study_commands import study_main
from megatron_prune.study import schema
from megatron_prune.study.prunings import Places
from megatron_prune.study.run import local
from tests.study import made_up


def test_a_study_runs_from_python_as_from_the_command_line(tmp_path: Path, monkeypatch, capsys, corpora) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "Local", functools.partial(local.Local, execute_command=made_up.FakeLauncher()))
    Path("study.yaml").write_text(yaml.safe_dump(made_up.mapping(corpora)))
    study = mp.Study.load("study.yaml")
    assert "shortgpt, minitron-width" in repr(study) and "1,280 tokens" in repr(study)
    found = study.run(runs_dir="from-python")
    capsys.readouterr()
    assert study_main(["run", "study.yaml", "--runs-dir", "from-shell"]) == 0
    said = capsys.readouterr().out
    assert found.verdicts and all(line in said for line in found.verdicts)
    assert found.report == Path("from-python/made-up/report/index.html") and found.report.is_file()
    assert len(found.rows) == len(Path("from-shell/made-up/report/results.csv").read_text().splitlines()) - 1
    assert repr(found).splitlines()[0] == f"study made-up: report in {found.report}"


def test_a_key_that_there_is_not_is_named(tmp_path: Path, corpora) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**made_up.mapping(corpora), "budgetz": [1]}))
    with pytest.raises(mp.MegatronPruneError, match="budgetz"):
        mp.Study.load(path)


def test_a_study_that_asks_for_it_measures_its_models_once(tmp_path: Path, monkeypatch, corpora) -> None:
    """The benchmark is a stand-in: it is tested on its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "Local", functools.partial(local.Local, execute_command=made_up.FakeLauncher()))
    asked = []

    def measure(settings):
        asked.append(settings)
        times = {"seconds": 0.012345, "least": 0.01, "most": 0.02, "tokens_per_second": 81.0}
        models = [{"fingerprint": open_checkpoint(path).fingerprint(), "measured": {"dense": {"prefill": times,
                   "decode": times}}} for path in settings.checkpoints]  # fmt: skip
        artifacts.write_json(settings.output, {"models": models})

    monkeypatch.setattr(checkpoints, "run_benchmark", measure)
    content = made_up.mapping(corpora)
    content["evaluation"] = {**content.get("evaluation", {}), "efficiency": True}
    Path("study.yaml").write_text(yaml.safe_dump(content))
    study = mp.Study.load("study.yaml")
    found = study.run()
    studies.measure_efficiency(study.studies[0], Places(Path("runs/made-up")))
    (settings,) = asked
    parent, *pruned = settings.checkpoints
    assert parent.endswith("cells/parent/checkpoint")
    assert len(pruned) == len(content["methods"]) * len(content["ratios"]) and settings.prompt <= 512
    assert all(row["decode_seconds"] == 0.012345 for row in found.rows if row["arm"] != "scratch")
    text = found.report.read_text()
    assert "decode, ms per token" in text and "12.35" in text


def test_under_slurm_nothing_is_measured(corpora) -> None:
    content = made_up.mapping(corpora)
    content |= {"evaluation": {"efficiency": True}, "launch": {"launcher": "slurm", "slurm": {"ranks_per_node": 1}}}
    with pytest.raises(mp.MegatronPruneError, match="evaluation.efficiency: expected false, got true with launcher"):
        schema.from_mapping(content)
