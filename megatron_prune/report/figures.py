"""Figures of a report, drawn to read on a light and on a dark page alike; and where the runs ended.

Backgrounds are transparent and data colours of middle lightness. Text and axes are drawn in ``INK``:
files keep it, a neutral grey; in the page it becomes the page's own text colour. ``Drawing`` holds
one figure as SVG for the page and writes it as SVG and PNG files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_prune import artifacts
from megatron_prune.study.results import Results
from megatron_prune.study.verdicts import Verdict, label

INK = "#7b7c7d"
COLOURS = ("#3a7bd5", "#dd7a2f", "#2a9c7c", "#a65fc9", "#c0992b", "#cf4f63", "#5b8f3a", "#4aa3b8")
SETTINGS = {"equal-training": "Equal training tokens", "equal-total": "Equal total tokens"}
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


def final_losses(results: Results) -> Drawing | None:
    """Test loss of pruned and scratch at the end of training, a panel a setting, the parent as a line."""
    panels = {
        setting: [verdict for verdict in results.verdicts if verdict.setting == setting]
        for setting in SETTINGS
        if any(verdict.setting == setting for verdict in results.verdicts)
    }
    if not panels:
        return None
    several_seeds = max(verdict.test.seeds for verdict in results.verdicts) > 1
    return drawing(
        lambda stacked: _final_losses(results, panels, stacked),
        "final-loss",
        "Final test loss, pruned against scratch",
        "Test loss at the end of training, lower is better. The number on each line is scratch minus pruned: "
        "positive where the pruned model ends lower. The dashed line is the parent. "
        + ("Points are means over seeds." if several_seeds else "One seed: there are no intervals."),
    )


def _final_losses(results: Results, panels: Mapping[str, Sequence[Verdict]], stacked: bool) -> Figure:
    parent = results.parent["test_loss"] if results.parent else None
    several = len({verdict.tokens for verdict in results.verdicts}) > 1
    every = list(dict.fromkeys(_name(verdict, several) for verdict in results.verdicts))
    rows = {
        setting: [name for name in every if not stacked or name in {_name(v, several) for v in verdicts}]
        for setting, verdicts in panels.items()
    }
    heights = [0.75 + 0.62 * len(names) for names in rows.values()]
    size = (3.9, 0.5 + sum(heights)) if stacked else (7.6, 0.5 + heights[0])
    figure = Figure(figsize=size, layout="constrained")
    grid, ratios = ((len(panels), 1), heights) if stacked else ((1, len(panels)), None)
    axes = figure.subplots(*grid, sharex=True, squeeze=False, height_ratios=ratios).ravel()
    for axis, (setting, verdicts) in zip(axes, panels.items(), strict=True):
        names = rows[setting]
        _dumbbells(axis, {names.index(_name(v, several)): v for v in verdicts}, colours(results))
        axis.set_yticks(range(len(names)), names if stacked or axis is axes[0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_title(SETTINGS[setting], pad=18)
        axis.set_xlabel("test loss, nats per token")
        axis.tick_params(axis="x", labelbottom=True)
        if parent is not None:
            axis.axvline(parent, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
            axis.annotate(
                f"parent {parent:.3f}", (parent, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
                textcoords="offset points", ha="center", va="bottom", fontsize=8,
            )  # fmt: skip
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(low, high + 0.22 * (high - low))  # room for the gaps' numbers
    hollow: dict[str, Any] = {"linestyle": "", "color": INK, "markerfacecolor": "none"}
    handles = [Line2D([], [], marker="o", linestyle="", color=INK, label="pruned, retrained")]
    if not all(verdict.dense for verdict in results.verdicts):
        sparse = any(verdict.pattern for verdict in results.verdicts)
        text = "same shape (and masks), from scratch" if sparse else "same shape, from scratch"
        handles.append(Line2D([], [], marker="o", **hollow, label=text))
    if any(verdict.dense for verdict in results.verdicts):
        handles.append(Line2D([], [], marker="s", **hollow, label="no masks, from scratch"))
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if stacked else len(handles), fontsize=8.5)
    return figure


def _dumbbells(axis: Any, verdicts: Mapping[int, Verdict], palette: Mapping[str, str]) -> None:
    """A line from scratch to pruned for every verdict, at its height, the gap to the right of it."""
    for height, verdict in verdicts.items():
        colour = palette[verdict.label]
        pruned, scratch = verdict.pruned["test"], verdict.scratch["test"]
        axis.plot([pruned, scratch], [height, height], color=colour, linewidth=1.6, alpha=0.55, zorder=1)
        axis.plot(pruned, height, "o", color=colour, markersize=7, zorder=3)
        hollow = {"markerfacecolor": "none", "markeredgewidth": 1.6}
        axis.plot(scratch, height, "s" if verdict.dense else "o", color=colour, markersize=7, zorder=2, **hollow)
        gap = signed(verdict.test.mean)
        if verdict.test.low is not None and verdict.test.high is not None:
            gap += f"\n[{signed(verdict.test.low)}, {signed(verdict.test.high)}]"
        axis.annotate(
            gap, (max(pruned, scratch), height), xytext=(9, 0), textcoords="offset points", ha="left",
            va="center", fontsize=8.5, color=colour,
        )  # fmt: skip
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def _name(verdict: Verdict, several: bool) -> str:
    """What stands at the left of a verdict's line; with ``several`` budgets, its own too."""
    lines = verdict.label.split(", ") + ["dense scratch"] * verdict.dense
    return "\n".join([*lines, f"{amount(verdict.tokens)} tokens"] if several else lines)


def signed(value: float) -> str:
    """``-0.0541`` → ``−0.054``, with a minus that is as wide as the plus."""
    return f"{value:+.3f}".replace("-", "\u2212")


def amount(value: float) -> str:
    """``409600`` → ``410k``; three significant digits."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def drawing(draw: Callable[[bool], Figure], name: str, title: str, caption: str) -> Drawing:
    """``draw(stacked)``, drawn both ways, in the report's style."""
    with matplotlib.rc_context(STYLE):
        files = []
        for stacked in (False, True):
            svg = io.StringIO()
            draw(stacked).savefig(svg, format="svg", metadata={"Date": None})
            files.append(svg.getvalue())
        png = io.BytesIO()
        draw(False).savefig(png, format="png", dpi=200)
    return Drawing(name, files[0], files[1], png.getvalue(), title, caption)
