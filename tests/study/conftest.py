"""A made-up study with three seeds, for tests that change a copy of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_prune.study.prunings import Places
from tests.study import made_up


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return made_up.corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Corpora of a test file's own, which its tests may change."""
    return made_up.corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def finished(corpora: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a study of two methods, both settings and three seeds has been run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made_up.run(made_up.study(corpora, seeds=[1, 2, 3]), Path("runs"), made_up.FakeLauncher())
    return folder


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A copy to change; it is the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Places(Path("runs/made-up"))


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own working directory, for files of its tests that write ``runs/``."""
    monkeypatch.chdir(tmp_path)
