"""Test loss against what a model costs to run, with the models that no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.report.drawing import (
    DASHED,
    HOLLOW,
    INK,
    NARROW,
    WIDE,
    Drawing,
    drawing,
    grid,
    tip,
    with_perplexity,
)
from megatron_prune.study.report.tables import exp
from megatron_prune.study.report.tabular import perplexity
from megatron_prune.study.report.trends import kind_style, points

PARENT = "parent"
# Key of a row, unit, and what it is called.
_AXES = (
    ("flops_forward_kept", 1e9, "GFLOPs of 2,048 tokens, kept weights"),
    ("weight_bytes", 1e6, "weights, MB (dense)"),
    ("decode_seconds", 1e-3, "decode, ms per token (measured, dense kernels)"),
)


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The places of those that no other one beats: none costs at most as much and has a lower loss, or costs less and
    has at most the same loss. By cost; of equal ones the first."""
    best, found = float("inf"), []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], losses[place])):
        if losses[place] < best:
            best = losses[place]
            found.append(place)
    return found


def serving_costs(results: Results) -> Drawing | None:
    """Loss against FLOPs and memory, and against latency if it was measured; None without verdicts."""
    if not results.headlines:
        return None
    kinds = {verdict.label: headline.granularity for headline in results.headlines for verdict in headline.every}
    largest = max(verdict.tokens for verdict in results.verdicts)
    shown = [point for point in points(results, kinds) if point["tokens"] == largest]
    parents = [row for row in results.rows if row["arm"] == "parent" and row["status"] == "finished"]
    if parents and results.parent is not None:
        loss = results.parent["test_loss"]
        shown.append({**parents[0], "arm": PARENT, "kind": PARENT, "loss": loss, "name": PARENT})
    axes = [axis for axis in _AXES if any(point[axis[0]] for point in shown)]
    if not axes:
        return None
    several = len(results.study.budgets) > 1
    return drawing(
        lambda stacked: _draw(shown, axes, stacked),
        "serving",
        "Test loss against the cost of running the model",
        f"To the left and below is better{', at the largest budget' * several}. The dashed line joins the models that "
        "no other one beats in both. Filled: pruned and retrained; hollow: from scratch; means over seeds. The star is "
        "the parent. FLOPs without removed weights are saved by sparse kernels only.",
    )


def _draw(shown: Sequence[dict[str, Any]], axes: Sequence[tuple[str, float, str]], stacked: bool) -> Figure:
    size = (NARROW, 0.6 + 2.5 * len(axes)) if stacked else (WIDE, 3.3)
    figure = Figure(figsize=size, layout="constrained")
    grid_of = figure.subplots(*((len(axes), 1) if stacked else (1, len(axes))), sharey=True, squeeze=False).ravel()
    for axis, (key, unit, words) in zip(grid_of, axes, strict=True):
        known = [point for point in shown if point[key]]
        costs, losses = [point[key] / unit for point in known], [point["loss"] for point in known]
        best = front(costs, losses)
        axis.plot([costs[n] for n in best], [losses[n] for n in best], linestyle=DASHED, color=INK, linewidth=1.0,
                  zorder=1)  # fmt: skip
        for point, at, loss in zip(known, costs, losses, strict=True):
            colour, marker = (INK, "*") if point["arm"] == PARENT else kind_style(point["kind"])
            style: dict[str, Any] = HOLLOW if point["arm"] == "scratch" else {}
            large = 11 if point["arm"] == PARENT else 6.5
            (mark,) = axis.plot(at, loss, marker, color=colour, markersize=large, alpha=0.9, **style)
            tip(mark, f"{point['name']}: {loss:.4f} nats, perplexity {perplexity(exp(loss))}, {at:,.4g} {words}")
        axis.margins(0.12)
        axis.set_xlabel(words, fontsize=8.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(labelsize=8, labelleft=True)
        grid(axis)
    for axis in grid_of if stacked else grid_of[:1]:
        axis.set_ylabel("test loss, nats per token", fontsize=8.5)
    for axis in grid_of if stacked else grid_of[-1:]:
        with_perplexity(axis, vertical=True)
    kinds = dict.fromkeys(point["kind"] for point in shown if point["kind"] != PARENT)
    handles = [Line2D([], [], marker=kind_style(kind)[1], linestyle="", color=kind_style(kind)[0], label=kind)
               for kind in kinds]  # fmt: skip
    handles += [Line2D([], [], marker="o", linestyle="", color=INK, label="filled: pruned"),
                Line2D([], [], marker="o", linestyle="", color=INK, label="hollow: scratch", **HOLLOW),
                Line2D([], [], linestyle=DASHED, color=INK, label="none is better in both")]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if stacked else min(len(handles), 5), fontsize=8)
    return figure
