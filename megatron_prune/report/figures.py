"""The figures of a report, drawn to read on a light and on a dark page alike.

Backgrounds are transparent and data colours of middle lightness. Text and axes are drawn in ``INK``:
files keep it, a neutral grey; in the page it becomes the page's own text colour. ``Drawing`` holds
one figure as SVG for the page and writes it as SVG and PNG files.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

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
    """One colour for every method at a pattern and a ratio, by label, in the study's order."""
    found: dict[str, str] = {}
    for item in results.compared:
        found.setdefault(label(*item.comparison.pruning.subject), COLOURS[len(found) % len(COLOURS)])
    return found


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
    return _drawing(
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


def loss_curves(results: Results, losses: Mapping[str, Path]) -> Drawing | None:
    """Training loss of every run against tokens: all that a model has seen, and the budget alone."""
    curves = {cell: curve for cell, path in losses.items() if (curve := _curve(results, cell, path)) is not None}
    if not curves:
        return None
    return _drawing(
        lambda stacked: _loss_curves(results, curves, stacked),
        "loss-curves",
        "Training loss against tokens",
        "Training loss, a running mean over 2% of each run. All tokens: the parent, the pruned models that go on "
        "from it, and scratch at equal total tokens. This training alone: pruned and scratch on the same samples "
        "in the same order. The dotted line is the entropy of single tokens in the validation text: no model that "
        "ignores context can be below it there.",
    )


def _loss_curves(results: Results, curves: Mapping[str, np.ndarray], stacked: bool) -> Figure:
    figure = Figure(figsize=(3.9, 6.4) if stacked else (7.6, 3.5), layout="constrained")
    whole, budget = figure.subplots(*((2, 1) if stacked else (1, 2)), sharey=True)
    start = results.lay.parent_tokens or 0
    if "parent" in curves:
        _line(whole, curves["parent"], 0, INK, "-")
    drawn: set[Any] = set()
    palette = colours(results)
    for item in results.compared:
        made = item.comparison
        colour = palette[label(*made.pruning.subject)]
        axis, offset = (whole, start) if made.setting == "equal-total" else (budget, 0)
        for cell, begin, dashes in ((made.pruned, offset, "-"), (made.scratch, 0, DASHED)):
            # Methods of one shape share a scratch run: it is drawn once, in the first one's colour; all sparse
            # methods share a dense one, in none's.
            if cell is not None and cell in curves and (cell, axis) not in drawn:
                drawn.add((cell, axis))
                dense = cell == made.scratch and made.against == "dense" and made.pruning.method.pattern is not None
                _line(axis, curves[cell], begin, INK if dense else colour, dashes)
    for axis, title in ((whole, "All tokens behind the model"), (budget, "Tokens of this training alone")):
        axis.set_title(title)
        axis.set_xlabel("tokens")
        axis.set_ylabel("training loss, nats per token")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axis.grid(alpha=0.18, linewidth=0.6, color=INK)
        _unigram(axis, results)
    handles = [Line2D([], [], color=INK, label="parent")] if "parent" in curves else []
    handles += [Line2D([], [], color=colour, label=name) for name, colour in palette.items()]
    handles += [Line2D([], [], color=INK, linestyle=DASHED, label="from scratch")]
    columns = 1 if stacked else min(3, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5)
    return figure


def _curve(results: Results, cell: str, path: Path) -> np.ndarray | None:
    """[2, points]: tokens and loss, smoothed; None where there is no table."""
    if cell not in results.records or not path.is_file():
        return None
    with open(path, newline="") as handle:
        rows = [(float(row["samples"]), float(row["loss"])) for row in csv.DictReader(handle) if row["loss"]]
    if not rows:
        return None
    samples, loss = np.array(rows).T
    width = max(1, len(loss) // 50)
    means = np.convolve(loss, np.ones(width) / width, mode="valid")
    return np.array([samples[width - 1 :] * results.study.data.seq_length, means])


def _line(axis: Any, curve: np.ndarray, offset: int, colour: str, dashes: Any) -> None:
    axis.plot(curve[0] + offset, curve[1], color=colour, linewidth=1.3, linestyle=dashes)


def _unigram(axis: Any, results: Results) -> None:
    if results.parent is None:
        return
    height = results.parent["unigram_loss"]["validation"]
    axis.axhline(height, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axis.annotate(
        f"unigram {height:.2f}", (1, height), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", fontsize=8,
    )  # fmt: skip


def signed(value: float) -> str:
    """``-0.0541`` → ``−0.054``, with a minus that is as wide as the plus."""
    return f"{value:+.3f}".replace("-", "\u2212")


def amount(value: float) -> str:
    """``409600`` → ``410k``; three significant digits."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def _drawing(draw: Callable[[bool], Figure], name: str, title: str, caption: str) -> Drawing:
    with matplotlib.rc_context(STYLE):
        files = []
        for stacked in (False, True):
            svg = io.StringIO()
            draw(stacked).savefig(svg, format="svg", metadata={"Date": None})
            files.append(svg.getvalue())
        png = io.BytesIO()
        draw(False).savefig(png, format="png", dpi=200)
    return Drawing(name, files[0], files[1], png.getvalue(), title, caption)
