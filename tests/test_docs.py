"""The documentation builds without a warning, and its reference of study.yaml has every key that the file may have."""

from __future__ import annotations

import dataclasses
import html
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune import verbs
from megatron_prune.methods import options
from megatron_prune.settings import Settings
from megatron_prune.study.schema import StudyConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "docs" / "mkdocs.yml")]
    done = subprocess.run([*build, "-d", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    pages = sorted((ROOT / "docs" / "pages").rglob("*.md"))
    listed = (ROOT / "docs" / "mkdocs.yml").read_text()
    for page in pages:
        assert str(page.relative_to(ROOT / "docs" / "pages")) in listed
    assert len(list(site.rglob("index.html"))) == len(pages)


def test_the_reference_has_every_flag_of_the_command_line(site: Path) -> None:
    page = html.unescape((site / "cli-reference" / "index.html").read_text())
    settings = [cls for cls in vars(verbs).values() if isinstance(cls, type) and issubclass(cls, Settings)]
    for flag in (flag for cls in (*settings, *options.STRUCTURED.values()) for flag in cls.flags()):
        assert flag.option in page, flag


def test_the_reference_has_every_key_of_a_study(site: Path) -> None:
    page = html.unescape((site / "study-reference" / "index.html").read_text())
    for field in dataclasses.fields(StudyConfig):
        assert f"<code>{field.name}</code>" in page
    assert "<code>declared_unseen</code>" in page  # of a section inside it


def test_the_reference_has_every_function_with_its_keywords(site: Path) -> None:
    import megatron_prune

    page = html.unescape((site / "api" / "index.html").read_text())
    for name in megatron_prune.__all__:
        assert f"<code>{name}</code>" in page
    for keyword in ("calibration_sequences", "retrain_tokens", "devices", "Study.run", "window_losses"):
        assert keyword in page
