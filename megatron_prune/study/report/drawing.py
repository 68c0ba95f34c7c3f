"""How figures of a report are drawn, to read on a light and on a dark page alike; and kept.

Backgrounds are transparent and data colours of middle lightness. Text and axes are drawn in ``INK``:
files keep it, a neutral grey; in the page it becomes the page's own text colour. ``Drawing`` holds
one figure as SVG for the page and writes it as SVG and PNG files.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megatron_prune import artifacts
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import label

INK = "#7b7c7d"
COLOURS = ("#3a7bd5", "#dd7a2f", "#2a9c7c", "#a65fc9", "#c0992b", "#cf4f63", "#5b8f3a", "#4aa3b8")
SETTINGS = {
    "equal-training": "Equal training tokens",
    "equal-total": "Equal total tokens",
    "equal-flops": "Equal FLOPs",
}
DASHED = (0, (3, 1.5))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "svg.hashsalt": "megatron_prune",  # the same figure is the same file
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
    """A figure: SVG as a file would hold it, side by side and stacked, PNG bytes, and what to say about it."""

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
        """Its ink is the page's, its ids are its own, it scales to its column."""
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
        svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
        svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{self.title}" ', 1)

    def write(self, directory: Path) -> None:
        artifacts.write_bytes(directory / f"{self.name}.svg", self.svg.encode())
        artifacts.write_bytes(directory / f"{self.name}.png", self.png)


def colours(results: Results) -> dict[str, str]:
    """A colour by label for every method at a pattern and a ratio, in the study's order.

    Where there are more of them than colours, those of one method share one.
    """
    subjects = list(dict.fromkeys(item.comparison.pruning.subject for item in results.compared))
    shared = [subject[0] if len(subjects) > len(COLOURS) else label(*subject) for subject in subjects]
    order = list(dict.fromkeys(shared))
    return {
        label(*subject): COLOURS[order.index(name) % len(COLOURS)]
        for subject, name in zip(subjects, shared, strict=True)
    }


def signed(value: float, digits: int = 3) -> str:
    """``-0.0541`` → ``−0.054``, with a minus that is as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def amount(value: float) -> str:
    """``409600`` → ``410k``; three significant digits."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def drawing(draw: Callable[[bool], Figure], name: str, title: str, caption: str) -> Drawing:
    """``draw(stacked)``, drawn both ways, in the report's style."""
    with matplotlib.rc_context(STYLE):
        beside, stacked = draw(False), draw(True)
        files = [io.BytesIO(), io.BytesIO(), io.BytesIO()]
        beside.savefig(files[0], format="svg", metadata={"Date": None})
        beside.savefig(files[1], format="png", dpi=200)
        stacked.savefig(files[2], format="svg", metadata={"Date": None})
    svg, png, narrow = (file.getvalue() for file in files)
    return Drawing(name, svg.decode(), narrow.decode(), png, title, caption)


def panels(count: int, stacked: bool, *, most: int = 3) -> tuple[int, int]:
    """Rows and columns for ``count`` small panels, the rows as even as they can be."""
    rows = count if stacked else math.ceil(count / most)
    return rows, math.ceil(count / rows)


def by_tokens(axis: Any, tokens: Iterable[float]) -> None:
    """A logarithmic axis of budgets, each with its own tick and name."""
    ticks = sorted(set(tokens))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    low, high = ticks[0], ticks[-1]
    room = (high / low) ** 0.08 if high > low else 1.5
    axis.set_xlim(low / room, high * room)


def name_lowest(axes: Any, shown: int, columns: int, text: str) -> None:
    """``text`` below the panels that have none below them, and those without content taken away."""
    for number, axis in enumerate(axes):
        axis.set_visible(number < shown)
        if shown - columns <= number < shown:
            axis.set_xlabel(text, fontsize=9)


def grid(axis: Any) -> None:
    axis.grid(alpha=0.18, linewidth=0.6, color=INK)
