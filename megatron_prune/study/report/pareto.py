"""Test loss and accuracy against what a model costs to run, with the models that no other one beats in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.serving import TIMES
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
from megatron_prune.study.report.tables import accuracies, accuracy_of, exp
from megatron_prune.study.report.tabular import perplexity
from megatron_prune.study.report.trends import kind_style, points

PARENT = "parent"
# Key of a row, unit, and what it is called.
AXES = (
    ("flops_forward_kept", 1e9, "GFLOPs of 2,048 tokens, kept weights"),
    ("weight_bytes", 1e6, "weights, MB (dense)"),
    ("fastest_decode", 1e-3, "decode, ms per token (measured)"),
)


@dataclass(frozen=True)
class Quality:
    """What is drawn upwards: key of a point, name of the axis, ``shown`` in a tip; ``sign`` -1: more is better."""

    key: str
    label: str
    shown: Callable[[float], str]
    sign: int = 1


LOSS = Quality("loss", "test loss, nats per token", lambda loss: f"{loss:.4f} nats, perplexity {perplexity(exp(loss))}")


def front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The places of those that no other one beats: none costs at most as much and has a lower loss, or costs less and
    has at most the same loss. By cost; of equal ones the first."""
    best, found = float("inf"), []
    for place in sorted(range(len(costs)), key=lambda place: (costs[place], losses[place])):
        if losses[place] < best:
            best = losses[place]
            found.append(place)
    return found


def serving_costs(results: Results) -> Iterator[Drawing]:
    """Loss against FLOPs and memory, and against latency if it was measured; then the same of the accuracy of the first
    suite, or else task, if the study has any. None without verdicts."""
    if not results.headlines:
        return
    kinds = {verdict.label: headline.granularity for headline in results.headlines for verdict in headline.every}
    largest = max(verdict.tokens for verdict in results.verdicts)
    shown = [point for point in points(results, kinds) if point["tokens"] == largest]
    parents = [row for row in results.rows if row["arm"] == "parent" and row["status"] == "finished"]
    if parents and results.parent is not None:
        loss, cells = results.parent["test_loss"], [row["cell"] for row in parents]
        shown.append({**parents[0], "arm": PARENT, "kind": PARENT, "loss": loss, "name": PARENT, "cells": cells})
    shown = [{**point, "fastest_decode": _fastest(point)} for point in shown]
    axes = [axis for axis in AXES if any(point[axis[0]] for point in shown)]
    if not axes:
        return
    several = ", at the largest budget" * (len(results.study.budgets) > 1)
    rest = (
        "The dashed line joins the models that no other one beats in both. Filled: pruned and retrained; hollow: from "
        "scratch; means over seeds. The star is the parent. FLOPs without removed weights are saved by sparse kernels "
        "only; decoding is with the fastest kernels that were measured."
    )
    yield drawing(
        partial(draw, shown, axes, LOSS),
        "serving",
        "Test loss against the cost of running the model",
        f"To the left and below is better{several}. {rest}",
    )
    for measure in accuracies(results)[:1]:
        scored = [{**point, "accuracy": accuracy_of(results, measure, point["cells"])} for point in shown]
        scored = [point for point in scored if point["accuracy"] is not None]
        upwards = Quality("accuracy", f"accuracy, {measure.name}", "{:.1%}".format, -1)
        yield drawing(
            partial(draw, scored, axes, upwards),
            "serving-accuracy",
            f"Accuracy against the cost of running the model: {measure.name}",
            f"To the left and above is better{several}. {measure.title}. {rest}",
        )


def _fastest(point: Mapping[str, Any]) -> float | None:
    """Seconds per decoded token by the fastest kernels that were measured, dense ones or those of 2:4."""
    known = [point[key] for key in TIMES if key.startswith("decode_seconds") and point[key] is not None]
    return min(known, default=None)


def draw(
    shown: Sequence[dict[str, Any]], axes: Sequence[tuple[str, float, str]], quality: Quality, stacked: bool
) -> Figure:
    """``quality`` of the points ``shown`` against ``axes`` (of ``AXES``); the first line of a panel is its front."""
    size = (NARROW, 0.6 + 2.5 * len(axes)) if stacked else (WIDE, 3.3)
    figure = Figure(figsize=size, layout="constrained")
    grid_of = figure.subplots(*((len(axes), 1) if stacked else (1, len(axes))), sharey=True, squeeze=False).ravel()
    for axis, (key, unit, words) in zip(grid_of, axes, strict=True):
        known = [point for point in shown if point[key]]
        costs, values = [point[key] / unit for point in known], [point[quality.key] for point in known]
        best = front(costs, [quality.sign * value for value in values])
        axis.plot([costs[n] for n in best], [values[n] for n in best], linestyle=DASHED, color=INK, linewidth=1.0,
                  zorder=1)  # fmt: skip
        for point, at, value in zip(known, costs, values, strict=True):
            colour, marker = (INK, "*") if point["arm"] == PARENT else kind_style(point["kind"])
            style: dict[str, Any] = HOLLOW if point["arm"] == "scratch" else {}
            large = 11 if point["arm"] == PARENT else 6.5
            (mark,) = axis.plot(at, value, marker, color=colour, markersize=large, alpha=0.9, **style)
            tip(mark, f"{point['name']}: {quality.shown(value)}, {at:,.4g} {words}")
        axis.margins(0.12)
        axis.set_xlabel(words, fontsize=8.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        if quality is not LOSS:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axis.tick_params(labelsize=8, labelleft=True)
        grid(axis)
    for axis in grid_of if stacked else grid_of[:1]:
        axis.set_ylabel(quality.label, fontsize=8.5)
    if quality is LOSS:
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
