"""The page of a simulated study in a real browser: light, dark, wide, narrow and printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_prune.study.prunings import Places
from megatron_prune.study.report import drawing
from tests.study.report import browser

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


WIDTHS = (360, 414, 560, 641, 768, 900, 1024, 1152, 1280, 1440, 1920, 2000)
SOME_WIDTHS = (360, 641, 1280, 1920)
# Text that overflows the window, its own box, or its figure.
CUT = """(() => {
  const wide = document.documentElement.clientWidth, found = [];
  for (const one of document.querySelectorAll('body *')) {
    const drawn = one.closest('svg');
    if (drawn ? one.tagName !== 'text' : !one.checkVisibility()) continue;
    if (drawn && !drawn.checkVisibility()) continue;
    const box = one.getBoundingClientRect();
    const where = [one.tagName, one.id || one.className, one.textContent.slice(0, 40)];
    if (box.width && (box.right > wide + 0.5 || box.left < -0.5)) found.push(['window', ...where]);
    else if (drawn) {
      const all = drawn.getBoundingClientRect();
      if (box.right > all.right + 1 || box.left < all.left - 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1)
        found.push(['figure', ...where]);
    } else if (one.clientWidth && one.scrollWidth > one.clientWidth + 1) found.push(['box', ...where]);
  }
  return found;
})()"""
# Labels of a figure that overlap.
COVERED = """(() => {
  const found = [];
  for (const drawn of document.querySelectorAll('svg')) {
    if (!drawn.checkVisibility()) continue;
    const words = Array.from(drawn.querySelectorAll('text')).filter(one => one.textContent.trim())
      .map(one => [one.textContent, one.getBoundingClientRect()]);
    for (let i = 0; i < words.length; i++) for (let j = i + 1; j < words.length; j++) {
      const a = words[i][1], b = words[j][1];
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 1 && y > 0.35 * Math.min(a.height, b.height))
        found.push([drawn.getAttribute('aria-label'), words[i][0], words[j][0]]);
    }
  }
  return found;
})()"""


@pytest.mark.parametrize(
    "widths", [SOME_WIDTHS, pytest.param(WIDTHS, marks=pytest.mark.slow)], ids=["some widths", "all widths"]
)
@pytest.mark.parametrize("study", ["quickstart_like", "simulated_study", "scored_study"])
def test_nothing_is_cut_or_covered_at_any_width(
    study: str, widths: tuple[int, ...], chromium: browser.Browser, request: pytest.FixtureRequest
) -> None:
    """Nothing scrolls sideways, no text overflows, and no labels overlap in a figure."""
    page = request.getfixturevalue(study).root / "report" / "index.html"
    chromium.open(page, width=widths[0])
    for width in widths:
        chromium.resize(width)
        assert chromium.value("document.documentElement.scrollWidth") <= width
        assert chromium.value(CUT) == [], width
        assert chromium.value(COVERED) == [], width


def test_what_is_cut_or_covered_would_be_seen(chromium: browser.Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<!doctype html><link rel=icon href=data:,><body style='margin:0'><div style='width:80px;overflow:auto'>"
        "<p style='width:200px'>scrolls</p></div><div style='width:700px'>too wide</div>"
        "<svg aria-label=figure width=100 height=50><text x=60 y=20>sparsegpt unstructured</text>"
        "<text x=0 y=40>one</text><text x=5 y=41>two</text></svg>"
    )
    chromium.open(broken, width=600)
    assert {found[0] for found in chromium.value(CUT)} == {"window", "box", "figure"}
    assert chromium.value(COVERED) == [["figure", "one", "two"]]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_figures_are_seen_in_the_pages_own_ink(
    report: Path, chromium: browser.Browser, dark: bool, width: int, tmp_path: Path
) -> None:
    chromium.open(report, width=width, dark=dark)
    assert chromium.complaints == []
    assert chromium.requests == [report.as_uri()]  # self-contained
    ink, paper = chromium.value(COLOURS)
    assert (
        (luminance(paper) < 0.1 and luminance(ink) > 0.7) if dark else (luminance(paper) > 0.9 > 0.2 > luminance(ink))
    )
    shown = chromium.value(FIGURES)
    assert len(shown) == len(list((report.parent / "figures").glob("*.svg"))) == 8
    for figure in shown:
        assert figure["shown"] == 1 and figure["stacked"] == (width < 640)
        assert 0 <= figure["left"] < figure["right"] <= width and figure["height"] > 100
        assert figure["ink"] == ink and figure["size"] >= 7, json.dumps(figure)
    chromium.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2 between two colours, ``#rrggbb``."""
    levels = []
    for colour in (one, other):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def test_colours_are_seen_on_both_pages(report: Path) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light, dark = re.findall(r"--page: (#[0-9a-f]{6})", report.read_text())[:2]
    for colour in (*drawing.COLOURS, *(drawing.ARMS[arm] for arm in ("pruned", "scratch"))):
        assert contrast(colour, light) >= 3 and contrast(colour, dark) >= 3, colour


def test_it_prints_black_on_white_in_a_few_pages_with_the_accounts_last(
    quickstart_like: Places, chromium: browser.Browser
) -> None:
    page = quickstart_like.root / "report" / "index.html"
    chromium.open(page, width=800, dark=True, media="print")
    ink, paper = chromium.value(COLOURS)
    assert (luminance(ink), luminance(paper)) == (0, 1)
    assert chromium.value("getComputedStyle(document.getElementById('appendix')).breakBefore") == "page"
    inside = "Array.from(document.querySelectorAll('#appendix table')).map(table => table.id).filter(Boolean)"
    assert {"rows", "account", "matches"} <= set(chromium.value(inside))
    pages = len(re.findall(rb"/Type\s*/Page\b", chromium.pdf()))
    assert 3 <= pages < 10


def test_a_complaint_would_be_heard(chromium: browser.Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<!doctype html><link rel=icon href=data:,><img src=missing.png><script>console.error('x'); nothing()</script>"
    )
    chromium.open(broken, width=600)
    text = " ".join(chromium.complaints)
    assert "ReferenceError" in text and "ERR_FILE_NOT_FOUND" in text and '"value": "x"' in text
