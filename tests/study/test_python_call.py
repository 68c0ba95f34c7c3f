"""``megatron_prune.Study``: a study from Python is the one of the command line."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import yaml

import megatron_prune as mp
from megatron_prune.cli import study as verb
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
    assert verb.main(["run", "study.yaml", "--runs-dir", "from-shell"]) == 0
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
