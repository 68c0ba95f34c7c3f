"""Drawing and storing figures of a report, readable on light and dark pages.

Backgrounds are transparent and data colours have medium lightness, with a contrast of at least 3:1 on both pages;
colour never carries meaning alone. Text and axes are drawn in ``INK``, a neutral grey in files; on the page it becomes
the page's text colour. Text is measured in DejaVu Sans, which is wider than page fonts, so that none is cut.
``Drawing`` holds one figure as SVG for the page and writes it as SVG and PNG files.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from megatron_prune import artifacts
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import label
from megatron_prune.study.report.tabular import amount

INK = "#7b7c7d"
ARMS = {"pruned": "#2277c4", "scratch": "#d1631b", "neither": INK}  # blue and orange: every kind of colour vision
COLOURS = ("#9467bd", "#a87b00", "#1b9e77", "#c8558d", "#4a90c2", "#a0613c", "#6f8f2f", "#5d7bb0")
SCRATCH = {"equal-training": "o", "equal-total": "D", "equal-flops": "^"}  # markers of scratch, by setting
HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.4}
DASHED = (0, (3, 1.5))
PARENT: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}
WIDE, NARROW = 7.6, 3.4  # inches
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "svg.hashsalt": "megatron_prune",  # equal figures give equal files
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Drawing:
    """A figure: SVG for files, wide and stacked, PNG bytes, title and caption."""

    name: str
    svg: str
    stacked: str  # the same panels one above the other, for narrow pages
    png: bytes
    title: str
    caption: str

    @property
    def inline(self) -> str:
        """The SVG for a page."""
        return self._inline(self.svg, self.name)

    @property
    def inline_stacked(self) -> str:
        """The SVG for a narrow page."""
        return self._inline(self.stacked, f"{self.name}-stacked")

    def _inline(self, svg: str, name: str) -> str:
        """Adapt it to the page: the page's text colour, unique ids, scaling to the column."""
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        for arm, colour in ARMS.items():  # the page has light and dark variants
            svg = svg.replace(colour, f"var(--{arm})")
        svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
        svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
        svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{self.title}" ', 1)

    def write(self, directory: Path) -> None:
        artifacts.write_bytes(directory / f"{self.name}.svg", self.svg.encode())
        artifacts.write_bytes(directory / f"{self.name}.png", self.png)


def colours(results: Results) -> dict[str, str]:
    """A colour per label (method, pattern and ratio), in the study's order.

    If there are more labels than colours, those of one method share one.
    """
    subjects = list(dict.fromkeys(item.comparison.subject for item in results.compared))
    shared = [subject[0] if len(subjects) > len(COLOURS) else label(*subject) for subject in subjects]
    order = list(dict.fromkeys(shared))
    return {
        label(*subject): COLOURS[order.index(name) % len(COLOURS)]
        for subject, name in zip(subjects, shared, strict=True)
    }


def drawing(draw: Callable[[bool], Figure], name: str, title: str, caption: str) -> Drawing:
    """``draw(stacked)``, drawn both ways, in the report's style."""
    with matplotlib.rc_context(STYLE):
        beside, stacked = draw(False), draw(True)
        files = [io.BytesIO(), io.BytesIO(), io.BytesIO()]
        beside.savefig(files[0], format="svg", metadata={"Date": None})
        beside.savefig(files[1], format="png", dpi=200)
        stacked.savefig(files[2], format="svg", metadata={"Date": None})
    svg, png, narrow = (file.getvalue() for file in files)
    return Drawing(name, _with_tips(svg.decode()), _with_tips(narrow.decode()), png, title, caption)


def tip(artist: Any, text: str) -> None:
    """Show ``text`` on hover over ``artist``."""
    artist.set_gid(f"tip:{text}")


def _with_tips(svg: str) -> str:
    """Turn the tips, which Matplotlib writes as escaped ids, into titles of their elements."""
    number = count()
    return re.sub(r'id="tip:([^"]*)">', lambda found: f'id="tip-{next(number)}">\n<title>{found[1]}</title>', svg)


@cache
def width_of(words: str, size: float, *, bold: bool = False) -> float:
    """Width in inches of the longest line of ``words``."""
    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal", size=size)
    return max((TextPath((0, 0), line, prop=font).get_extents().width / 72 if line.strip() else 0.0
                for line in words.split("\n")), default=0.0)  # fmt: skip


def wrapped(words: str, size: float, room: float, *, bold: bool = False) -> str:
    """``words`` in lines of at most ``room`` inches; a single word that is longer is cut into pieces."""
    lines = [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if width_of(longer, size, bold=bold) <= room:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while width_of(lines[-1], size, bold=bold) > room and len(lines[-1]) > 1:
            cut = next(
                at
                for at in range(len(lines[-1]) - 1, 0, -1)
                if at == 1 or width_of(lines[-1][:at], size, bold=bold) <= room
            )
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return "\n".join(lines)


def inches(axis: Any) -> Any:
    """A transform of (inches from the left edge of the figure, data of the axis)."""
    return blended_transform_factory(axis.figure.dpi_scale_trans, axis.transData)


def label_ends(axis: Any, ends: Sequence[tuple[float, str, str]], height: float, size: float = 8) -> None:
    """Labels at the right of a panel of about ``height`` inches: (end of the line, text, colour).

    Overlapping labels are moved apart and connected to their lines.
    """
    low, high = axis.get_ylim()
    step = size * 1.3 / 72 / height
    places = sorted(
        (((value - low) / (high - low), words, colour) for value, words, colour in ends), key=lambda e: e[0]
    )
    rows = [words.count("\n") + 1 for _, words, _ in places]
    at: list[float] = []
    for (place, _, _), own in zip(places, rows, strict=True):
        below = at[-1] + step * (own + rows[len(at) - 1]) / 2 if at else -math.inf
        at.append(max(place, below))
    over = max(0.0, at[-1] - 1.0) if at else 0.0
    for number in range(len(at) - 1, -1, -1):  # back down from the upper edge
        above = at[number + 1] - step * (rows[number] + rows[number + 1]) / 2 if number + 1 < len(at) else math.inf
        at[number] = min(at[number], above, max(places[number][0], 1.0) if over else math.inf)
    for (place, words, colour), y in zip(places, at, strict=True):
        axis.annotate(
            words, (1, place), xytext=(1.06, y), xycoords="axes fraction", textcoords="axes fraction", color=colour,
            fontsize=size, va="center", ha="left", annotation_clip=False, linespacing=1.05,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def with_perplexity(axis: Any, *, vertical: bool) -> Any:
    """A second axis on the other side of a loss axis: the same values as perplexities."""
    low, high = axis.get_ylim() if vertical else axis.get_xlim()
    second = (axis.secondary_yaxis if vertical else axis.secondary_xaxis)(
        "right" if vertical else "top", functions=(_same, _same)
    )
    ticks = _round_perplexities(math.exp(min(low, 300)), math.exp(min(high, 300)), 5 if vertical else 6)
    (second.set_yticks if vertical else second.set_xticks)(
        [math.log(value) for value in ticks], [f"{v:,.12g}" for v in ticks]
    )
    (second.set_ylabel if vertical else second.set_xlabel)("perplexity", fontsize=8.5)
    second.tick_params(labelsize=8)
    second.spines[:].set_visible(True)
    return second


def _same(value: Any) -> Any:
    return value


def _round_perplexities(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two perplexities, as evenly spaced on a logarithmic scale as possible."""
    if high < 2.5 * low:
        return [value for value in MaxNLocator(most).tick_values(low, high) if low <= value <= high]
    for steps in (
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 2, 3, 5),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def panels(count: int, stacked: bool, *, most: int = 3) -> tuple[int, int]:
    """Rows and columns for ``count`` small panels, with rows as even as possible."""
    rows = count if stacked else math.ceil(count / most)
    return rows, math.ceil(count / rows)


def by_tokens(axis: Any, tokens: Iterable[float]) -> None:
    """A logarithmic axis with one labelled tick per budget."""
    ticks = sorted(set(tokens))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    low, high = ticks[0], ticks[-1]
    room = (high / low) ** 0.08 if high > low else 1.5
    axis.set_xlim(low / room, high * room)


def name_lowest(axes: Any, shown: int, columns: int, text: str) -> None:
    """Put ``text`` below the lowest panel of each column and remove empty panels."""
    for number, axis in enumerate(axes):
        axis.set_visible(number < shown)
        if shown - columns <= number < shown:
            axis.set_xlabel(text, fontsize=9)


def grid(axis: Any) -> None:
    axis.grid(alpha=0.18, linewidth=0.6, color=INK)
