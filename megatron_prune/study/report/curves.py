"""The figure of loss curves: every run's training loss against tokens."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import Comparison, label
from megatron_prune.study.report.drawing import (
    COLOURS,
    DASHED,
    INK,
    NARROW,
    WIDE,
    Drawing,
    colours,
    drawing,
    grid,
    label_ends,
    panels,
    tip,
    wrapped,
)
from megatron_prune.study.report.figures import common_tail
from megatron_prune.study.report.tabular import amount

TITLES = {
    "equal-total": "All tokens behind the model",
    "equal-training": "Tokens of this training alone",
    "equal-flops": "Tokens of this training alone, equal FLOPs",
}
FEW = 24  # up to this number of runs lines are thick
MANY = 48  # from this number of runs on each method has a panel
Curves = Mapping[str, np.ndarray]
Panels = dict[tuple[str, str], list[Comparison]]


def loss_curves(results: Results, tables: Mapping[str, Path]) -> Drawing | None:
    """Training loss of every run against all tokens that a model has seen, and against its budget's tokens.

    ``tables``: ``losses.csv`` by cell. With more arms than colours, or very many runs, each method has a panel.
    """
    read = {cell: curve for cell, path in tables.items() if (curve := _curve(results, cell, path)) is not None}
    longest = max((curve.shape[1] for curve in read.values()), default=0)
    smooth = {cell: _smooth(curve, longest) for cell, curve in read.items()}
    many = len(colours(results)) > len(COLOURS) or len(smooth) > MANY
    own = _panels(results, smooth, many)
    if not own:
        return None
    return drawing(
        lambda stacked: _loss_curves(results, smooth, own, many, stacked),
        "loss-curves",
        "Training loss against tokens",
        "Training loss, a running mean over 2% of the longest run, at most 10% of each. Solid: pruned; dashed: from "
        "scratch. All tokens: the parent, the pruned models that continue from it, and scratch at equal total tokens. "
        "This training alone: pruned and scratch on the same samples in the same order. The dotted line is the entropy "
        "of single tokens in the validation text: no model that ignores context can be below it there.",
    )


def _loss_curves(results: Results, curves: Curves, own: Panels, many: bool, stacked: bool) -> Figure:
    rows, columns = panels(len(own), stacked, most=2)
    palette = _by_variant(results) if many else colours(results)
    parents = [cell for cell in curves if results.records[cell]["kind"] == "parent"]
    with_parent = bool(parents) and any(setting == "equal-total" for setting, _ in own)
    keys: dict[str, Any] = {"parent": {"color": INK}} if with_parent else {}
    keys |= {name: {"color": colour} for name, colour in palette.items()}
    keys |= {"from scratch": {"color": INK, "linestyle": DASHED}}
    across = 1 if stacked else min(len(keys), max(1, 88 // (max(map(len, keys)) + 6)))  # 88 characters; 6: a key's line
    named = not many and not stacked and len(own) <= 2
    height = rows * 2.6 + (0 if named else 0.18 * math.ceil(len(keys) / across) + 0.2)
    figure = Figure(figsize=(NARROW if stacked else WIDE, height), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis, ((setting, title), compared) in zip(axes, own.items(), strict=False):
        if with_parent and setting == "equal-total":
            for parent in parents:
                _line(axis, curves[parent], 0, {"color": INK, "linewidth": 1.3}, parent)
        drawn: set[str] = set()
        for made in compared:
            colour = palette[_variant(made) if many else label(*made.subject)]
            _pair(axis, results, curves, made, colour, drawn)
        if named and with_parent and setting == "equal-total":
            _name_parent(axis, curves[parents[0]])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens", fontsize=8.5)
        axis.xaxis.set_major_locator(MaxNLocator(5 if columns == 1 or len(own) < 3 else 4))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axis.tick_params(labelsize=8)
        grid(axis)
        _unigram(axis, results)
    for axis in axes[::columns]:
        axis.set_ylabel("training loss, nats per token", fontsize=8.5)
    for axis in axes[len(own) :]:
        axis.set_visible(False)
    if named:
        label_ends(axes[len(own) - 1], _ends(results, curves, list(own.values())[-1], palette), 1.9, 7.5)
        return figure
    handles = [Line2D([], [], label=name, **style) for name, style in keys.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=8)
    return figure


def _name_parent(axis: Any, curve: np.ndarray) -> None:
    """The parent's name below its line, or right of it where that is at the left edge."""
    at = curve[:, curve.shape[1] // 3]
    low, high = axis.get_xlim()
    edge = at[0] - low < 0.25 * (high - low)
    shift, ha, va = ((6, 4), "left", "bottom") if edge else ((-6, -6), "right", "top")
    axis.annotate("parent", at, xytext=shift, textcoords="offset points", ha=ha, va=va, fontsize=8)


def _ends(
    results: Results, curves: Curves, compared: Sequence[Comparison], palette: Mapping[str, str]
) -> list[tuple[float, str, str]]:
    """Labels for the ends of a panel's lines: pruned ones by name, those from scratch together."""
    last: dict[str, list[float]] = {}
    short = {name: name.removesuffix(common_tail(results)) for name in palette}
    for made in compared:
        if made.pruned in curves:
            last.setdefault(label(*made.subject), []).append(curves[made.pruned][1, -1])
        if made.scratch is not None and made.scratch in curves:
            last.setdefault("", []).append(curves[made.scratch][1, -1])
    return [
        (
            float(np.mean(values)),
            wrapped(short[name], 7.5, 1.4) if name else "from scratch\n(dashed)",
            palette.get(name, INK),
        )
        for name, values in last.items()
    ]


def _panels(results: Results, curves: Curves, many: bool) -> Panels:
    """The content of each panel, by setting and title: one setting or, with ``many`` arms, one method in it."""
    parents = any(results.records[cell]["kind"] == "parent" for cell in curves)
    found: Panels = {("equal-total", TITLES["equal-total"]): []} if parents and not many else {}
    several = len({item.comparison.setting for item in results.compared}) > 1
    for setting, title in TITLES.items():
        for made in (item.comparison for item in results.compared if item.comparison.setting == setting):
            if made.pruned in curves or made.scratch in curves:
                method = made.pruning.method.title
                own = f"{method}\n{title.lower()}" if several else method
                found.setdefault((setting, own if many else title), []).append(made)
    return found


def _pair(axis: Any, results: Results, curves: Curves, made: Comparison, colour: str, drawn: set[str]) -> None:
    """Draw a pruned run and its scratch run in front of the panel's other lines.

    Methods of one shape share a scratch run, drawn once in the first one's colour; the dense run that all sparse
    methods share has a neutral colour.
    """
    start = (results.lay.parent_tokens or 0) if made.setting == "equal-total" else 0
    dense = made.against == "dense" and made.pruning.sparse
    width = 1.3 if len(curves) <= FEW else 0.7
    for cell, offset, style in (
        (made.pruned, start, {"color": colour, "linewidth": width}),
        (made.scratch, 0, {"color": INK if dense else colour, "linewidth": width, "linestyle": DASHED}),
    ):
        if cell is not None and cell in curves and cell not in drawn:
            drawn.add(cell)
            _line(axis, curves[cell], offset, style, cell)


def _by_variant(results: Results) -> dict[str, str]:
    """One colour per pattern and ratio, independent of the method."""
    names = dict.fromkeys(_variant(item.comparison) for item in results.compared)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def _variant(made: Comparison) -> str:
    """``2:4, 50% removed``"""
    return label(*made.subject).removeprefix(made.subject[0]).lstrip(", ") or "target"


def _curve(results: Results, cell: str, path: Path) -> np.ndarray | None:
    """[2, steps]: tokens and loss; None if there is no table."""
    if cell not in results.records or not path.is_file():
        return None
    with open(path, newline="") as handle:
        rows = [(float(row["samples"]), float(row["loss"])) for row in csv.DictReader(handle) if row["loss"]]
    return np.array(rows).T * [[results.study.data.seq_length], [1]] if rows else None


def _smooth(curve: np.ndarray, longest: int) -> np.ndarray:
    """[2, points]: a running mean over the same number of tokens in every run, except the shortest ones."""
    width = max(1, min(longest // 50, curve.shape[1] // 10))
    return np.array([curve[0, width - 1 :], np.convolve(curve[1], np.ones(width) / width, mode="valid")])


def _line(axis: Any, curve: np.ndarray, offset: int, style: Mapping[str, Any], cell: str) -> None:
    (line,) = axis.plot(curve[0] + offset, curve[1], **style)
    tip(line, cell)


def _unigram(axis: Any, results: Results) -> None:
    if results.parent is None:
        return
    height = results.parent["unigram_loss"]["validation"]
    axis.axhline(height, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axis.annotate(
        f"unigram {height:.2f}", (1, height), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom", fontsize=8,
    )  # fmt: skip
