"""The figure of the losses on the way: every run's training loss against tokens."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import Comparison, label
from megatron_prune.study.prunings import Pruning
from megatron_prune.study.report.drawing import COLOURS, DASHED, INK, Drawing, amount, colours, drawing

TITLES = {
    "equal-total": "All tokens behind the model",
    "equal-training": "Tokens of this training alone",
    "equal-flops": "Tokens of this training alone, equal FLOPs",
}
FEW = 24  # runs up to which lines are thick
MANY = 48  # runs from which each method has a panel
CHARACTERS = 88  # of a legend's line in a figure of full width
Curves = Mapping[str, np.ndarray]
Panels = dict[tuple[str, str], list[Comparison]]


def loss_curves(results: Results, losses: Mapping[str, Path]) -> Drawing | None:
    """Training loss of every run against tokens: all that a model has seen, and the budget alone.

    More arms than there are colours, or very many runs, have a panel for each method.
    """
    read = {cell: curve for cell, path in losses.items() if (curve := _curve(results, cell, path)) is not None}
    longest = max((curve.shape[1] for curve in read.values()), default=0)
    curves = {cell: _smooth(curve, longest) for cell, curve in read.items()}
    many = len(colours(results)) > len(COLOURS) or len(curves) > MANY
    panels = _panels(results, curves, many)
    if not panels:
        return None
    return drawing(
        lambda stacked: _loss_curves(results, curves, panels, many, stacked),
        "loss-curves",
        "Training loss against tokens",
        "Training loss, a running mean over 2% of the longest run, at most 10% of each. All tokens: the parent, the "
        "pruned models that go on from it, and scratch at equal total tokens. This training alone: pruned and "
        "scratch on the same samples in the same order. The dotted line is the entropy of single tokens in the "
        "validation text: no model that ignores context can be below it there.",
    )


def _loss_curves(results: Results, curves: Curves, panels: Panels, many: bool, stacked: bool) -> Figure:
    columns = 1 if stacked else min(3 if many else 2, len(panels))
    rows = math.ceil(len(panels) / columns)
    palette = _by_variant(results) if many else colours(results)
    parents = [cell for cell in curves if results.records[cell]["kind"] == "parent"]
    with_parent = bool(parents) and any(setting == "equal-total" for setting, _ in panels)
    keys: dict[str, Any] = {"parent": {"color": INK}} if with_parent else {}
    keys |= {name: {"color": colour} for name, colour in palette.items()}
    keys |= {"from scratch": {"color": INK, "linestyle": DASHED}}
    across = 1 if stacked else min(len(keys), max(1, CHARACTERS // (max(map(len, keys)) + 6)))  # 6: a key's line
    size = (3.9, 2.6) if stacked else (7.6 / columns, 2.7 if columns < 3 else 2.3)
    height = rows * size[1] + 0.2 * math.ceil(len(keys) / across) + 0.3
    figure = Figure(figsize=(columns * size[0], height), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis, ((setting, title), compared) in zip(axes, panels.items(), strict=False):
        if with_parent and setting == "equal-total":
            for parent in parents:
                _line(axis, curves[parent], 0, INK, "-", 1.3)
        drawn: set[str] = set()
        for made in compared:
            colour = palette[_variant(made.pruning) if many else label(*made.pruning.subject)]
            _pair(axis, results, curves, made, colour, drawn)
        axis.set_title(title, fontsize=10 if columns < 3 else 9)
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_locator(MaxNLocator(5 if columns < 3 else 3))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axis.grid(alpha=0.18, linewidth=0.6, color=INK)
        _unigram(axis, results)
    for axis in axes[::columns]:
        axis.set_ylabel("training loss, nats per token")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], label=name, **style) for name, style in keys.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=8.5)
    return figure


def _panels(results: Results, curves: Curves, many: bool) -> Panels:
    """What is drawn together, by setting and title: one setting, with ``many`` arms one method of it."""
    parents = any(results.records[cell]["kind"] == "parent" for cell in curves)
    panels: Panels = {("equal-total", TITLES["equal-total"]): []} if parents and not many else {}
    several = len({item.comparison.setting for item in results.compared}) > 1
    for setting, title in TITLES.items():
        for made in (item.comparison for item in results.compared if item.comparison.setting == setting):
            if made.pruned in curves or made.scratch in curves:
                method = made.pruning.method.title
                own = f"{method}\n{title.lower()}" if several else method
                panels.setdefault((setting, own if many else title), []).append(made)
    return panels


def _pair(axis: Any, results: Results, curves: Curves, made: Comparison, colour: str, drawn: set[str]) -> None:
    """A pruned run and its scratch run, in front of what stands in the panel already.

    Methods of one shape share a scratch run: it is drawn once, in the first one's colour; all sparse methods
    share a dense one, in none's.
    """
    start = (results.lay.parent_tokens or 0) if made.setting == "equal-total" else 0
    dense = made.against == "dense" and made.pruning.sparse
    for cell, offset, ink, dashes in (
        (made.pruned, start, colour, "-"),
        (made.scratch, 0, INK if dense else colour, DASHED),
    ):
        if cell is not None and cell in curves and cell not in drawn:
            drawn.add(cell)
            _line(axis, curves[cell], offset, ink, dashes, 1.3 if len(curves) <= FEW else 0.7)


def _by_variant(results: Results) -> dict[str, str]:
    """One colour for each pattern and ratio, whatever the method."""
    names = dict.fromkeys(_variant(item.comparison.pruning) for item in results.compared)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def _variant(pruning: Pruning) -> str:
    """``2:4, 50% removed``"""
    title, pattern, ratio = pruning.subject
    return label(title, pattern, ratio).removeprefix(title).lstrip(", ") or "target"


def _curve(results: Results, cell: str, path: Path) -> np.ndarray | None:
    """[2, steps]: tokens and loss; None where there is no table."""
    if cell not in results.records or not path.is_file():
        return None
    with open(path, newline="") as handle:
        rows = [(float(row["samples"]), float(row["loss"])) for row in csv.DictReader(handle) if row["loss"]]
    return np.array(rows).T * [[results.study.data.seq_length], [1]] if rows else None


def _smooth(curve: np.ndarray, longest: int) -> np.ndarray:
    """[2, points]: as many tokens behind every point of every run, but for the shortest runs."""
    width = max(1, min(longest // 50, curve.shape[1] // 10))
    return np.array([curve[0, width - 1 :], np.convolve(curve[1], np.ones(width) / width, mode="valid")])


def _line(axis: Any, curve: np.ndarray, offset: int, colour: str, dashes: Any, width: float) -> None:
    axis.plot(curve[0] + offset, curve[1], color=colour, linewidth=width, linestyle=dashes)


def _unigram(axis: Any, results: Results) -> None:
    if results.parent is None:
        return
    height = results.parent["unigram_loss"]["validation"]
    axis.axhline(height, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axis.annotate(
        f"unigram {height:.2f}", (1, height), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", fontsize=8,
    )  # fmt: skip
