"""The page of a simulated study in a real browser: light, dark, wide, narrow and printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.study.prunings import Places
from tests.report import browser

pytestmark = pytest.mark.skipif(
    browser.PROGRAM is None,
    reason=f"no browser: none of {', '.join(browser.NAMES)} is in PATH (tests/run.sh installs one)",
)
FIGURES = """Array.from(document.querySelectorAll('figure')).map(figure => {
  const shown = Array.from(figure.querySelectorAll('svg')).filter(svg => svg.checkVisibility());
  const box = shown[0].getBoundingClientRect(), text = shown[0].querySelector('text');
  return {shown: shown.length, left: box.left, right: box.right, width: box.width, height: box.height,
          ink: getComputedStyle(text).fill, size: text.getBoundingClientRect().height,
          stacked: !!shown[0].closest('.stacked')};
})"""
COLOURS = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


@pytest.fixture(scope="module")
def report(simulated_study: Places) -> Path:
    return simulated_study.root / "report" / "index.html"


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


def luminance(colour: str) -> float:
    """0 to 1, of ``rgb(r, g, b)``."""
    red, green, blue = (int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_figures_are_seen_in_the_pages_own_ink(
    report: Path, chromium: browser.Browser, dark: bool, width: int, tmp_path: Path
) -> None:
    chromium.open(report, width=width, dark=dark)
    assert chromium.complaints == []
    assert chromium.requests == [report.as_uri()]  # self-contained
    assert chromium.value("document.documentElement.scrollWidth") <= width  # tables scroll in their own boxes
    ink, paper = chromium.value(COLOURS)
    assert (
        (luminance(paper) < 0.1 and luminance(ink) > 0.7) if dark else (luminance(paper) > 0.9 > 0.2 > luminance(ink))
    )
    shown = chromium.value(FIGURES)
    assert len(shown) == len(list((report.parent / "figures").glob("*.svg"))) == 6
    for figure in shown:
        assert figure["shown"] == 1 and figure["stacked"] == (width < 640)
        assert 0 <= figure["left"] < figure["right"] <= width and figure["height"] > 100
        assert figure["ink"] == ink and figure["size"] >= 7, json.dumps(figure)
    chromium.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_it_prints_black_on_white_with_everything_that_is_short_unfolded(
    report: Path, chromium: browser.Browser
) -> None:
    chromium.open(report, width=800, dark=True, media="print")
    ink, paper = chromium.value(COLOURS)
    assert (luminance(ink), luminance(paper)) == (0, 1)
    folded = chromium.value(
        "Array.from(document.querySelectorAll('details:not(.long)'))"
        ".filter(one => !one.parentElement.closest('details'))"
        ".map(one => one.lastElementChild.getBoundingClientRect().height)"
    )
    assert folded and min(folded) > 0
    assert chromium.pdf().startswith(b"%PDF")


def test_a_complaint_would_be_heard(chromium: browser.Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<!doctype html><link rel=icon href=data:,><img src=missing.png><script>console.error('x'); nothing()</script>"
    )
    chromium.open(broken, width=600)
    text = " ".join(chromium.complaints)
    assert "ReferenceError" in text and "ERR_FILE_NOT_FOUND" in text and '"value": "x"' in text
