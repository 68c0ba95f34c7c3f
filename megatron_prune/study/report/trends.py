"""Figures of loss against parameters, FLOPs and budgets, and of the gap against budgets and ratios.

Each budget is a separate run, never an intermediate checkpoint.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from megatron_prune.study.analysis import scaling_laws
from megatron_prune.study.analysis.conclusions import Trend
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.serving import COSTS, TIMES
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.grid import label
from megatron_prune.study.report.drawing import (
    ARMS,
    COLOURS,
    DASHED,
    HOLLOW,
    INK,
    NARROW,
    PARENT,
    SCRATCH,
    WIDE,
    Drawing,
    by_tokens,
    colours,
    drawing,
    grid,
    label_ends,
    name_lowest,
    panels,
    tip,
    with_perplexity,
    wrapped,
)
from megatron_prune.study.report.figures import common_tail
from megatron_prune.study.report.tables import SETTINGS, exp
from megatron_prune.study.report.tabular import amount, perplexity, signed
from megatron_prune.study.values import GRANULARITIES

MOST_BUDGETS = 3  # panels of the figure over ratios; of more budgets the smallest, the middle and the largest


def costs(results: Results) -> Drawing | None:
    """Test loss against nonzero parameters, and against all FLOPs behind the model."""
    finished = [row for row in results.rows if row["status"] == "finished" and row["arm"] != "parent"]
    if not results.headlines or not finished:
        return None
    kinds = {verdict.label: headline.granularity for headline in results.headlines for verdict in headline.every}
    largest = max(verdict.tokens for verdict in results.verdicts)
    several = len(results.study.budgets) > 1
    return drawing(
        lambda stacked: _costs(results, kinds, largest, stacked),
        "cost",
        "Test loss against parameters and FLOPs",
        f"Left: parameters that are not zero{', at the largest budget' * several}. Right: all training FLOPs behind a "
        "model, its parent's and its pruning's included (dense products, masks or not). Filled: pruned and retrained; "
        "hollow: from scratch. Means over seeds. The star is the parent.",
    )


def _costs(results: Results, kinds: Mapping[str, str], largest: int, stacked: bool) -> Figure:
    figure = Figure(figsize=(NARROW, 5.6) if stacked else (WIDE, 3.3), layout="constrained")
    axes = figure.subplots(*((2, 1) if stacked else (1, 2)), sharey=True)
    shown = points(results, kinds)
    parent = results.parent
    for axis, key, words in ((axes[0], "params_nonzero", "parameters that are not zero"),
                             (axes[1], "flops_total", "FLOPs behind the model")):  # fmt: skip
        for line in _lines_of(shown) if key == "flops_total" else ():
            dashes: Any = "-" if line[0]["arm"] == "pruned" else DASHED
            axis.plot([point[key] for point in line], [point["loss"] for point in line], linestyle=dashes, zorder=1,
                      color=kind_style(line[0]["kind"])[0], linewidth=0.7, alpha=0.6)  # fmt: skip
        for point in shown:
            if point[key] and (key == "flops_total" or point["tokens"] == largest):
                style: dict[str, Any] = HOLLOW if point["arm"] == "scratch" else {}
                colour, marker = kind_style(point["kind"])
                (mark,) = axis.plot(point[key], point["loss"], marker, color=colour, markersize=6.5, alpha=0.9, **style)
                tip(mark, f"{point['name']}: {point['loss']:.4f} nats, perplexity {perplexity(exp(point['loss']))}, "
                          f"{amount(point[key])} {words.split(' ')[0]}")  # fmt: skip
        at = None if parent is None else parent.get("parameters_nonzero" if key == "params_nonzero" else "flops")
        if parent is not None and at:
            (mark,) = axis.plot(at, parent["test_loss"], "*", color=INK, markersize=11)
            tip(mark, f"parent: {parent['test_loss']:.4f} nats, {amount(at)} {words.split(' ')[0]}")
            axis.annotate(
                "parent", (at, parent["test_loss"]), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8
            )
        axis.set_xscale("log")
        axis.xaxis.set_minor_locator(NullLocator())
        _few_ticks(axis)
        axis.margins(0.12)
        axis.set_xlabel(words, fontsize=8.5)
        axis.tick_params(labelsize=8)
        axis.tick_params(labelleft=True)
        grid(axis)
    for axis in axes if stacked else axes[:1]:
        axis.set_ylabel("test loss, nats per token", fontsize=8.5)
    for axis in axes if stacked else axes[1:]:
        with_perplexity(axis, vertical=True)
    names = dict.fromkeys(point["kind"] for point in shown)
    styles = {kind: kind_style(kind) for kind in names}
    handles = [
        Line2D([], [], marker=styles[kind][1], linestyle="", color=styles[kind][0], label=kind) for kind in names
    ]
    handles += [Line2D([], [], marker="o", linestyle="", color=INK, label="filled: pruned"),
                Line2D([], [], marker="o", linestyle="", color=INK, label="hollow: scratch", **HOLLOW)]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if stacked else len(handles), fontsize=8)
    return figure


def _lines_of(points: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The points of one arm over its budgets, if there are several."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        if point["flops_total"]:
            lines.setdefault(point["name"], []).append(point)
    return [sorted(line, key=lambda point: point["tokens"]) for line in lines.values() if len(line) > 1]


def kind_style(kind: str) -> tuple[str, str]:
    """Colour and marker of a granularity; for a combination, those of the last."""
    place = GRANULARITIES.index(kind.split(" and ")[-1])
    return COLOURS[place], "os^"[place]


def _few_ticks(axis: Any) -> None:
    """Three to five round numbers on a logarithmic axis that may span less than a decade."""
    low, high = axis.get_xlim()
    if high < 8 * low:
        axis.xaxis.set_major_locator(MaxNLocator(4))
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def points(results: Results, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Means over seeds of both arms: loss, parameters, FLOPs, and their ``cells``. A shared scratch run is included
    once."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    seen: set[str | None] = set()
    sides = results.rows[len(results.rows) - 2 * len(results.compared) :]
    for number, row in enumerate(sides):
        item = results.compared[number // 2]
        name = label(*item.comparison.subject)
        if row["status"] != "finished" or row["cell"] in seen or name not in kinds:
            continue
        seen.add(row["cell"])
        setting = item.comparison.setting if row["arm"] == "scratch" else ""
        groups.setdefault((name, row["arm"], setting, item.comparison.against, item.tokens), []).append(row)
    return [
        {
            "arm": arm, "kind": kinds[name], "tokens": tokens, "cells": [row["cell"] for row in own],
            "loss": statistics.fmean(row["test_loss"] for row in own),
            "name": f"{name}, {arm}" + (f", {SETTINGS[setting].lower()}, {against}" if setting else ""),
            **{value: own[0][value] for value in ("params_nonzero", "flops_total", *COSTS, *TIMES)},
        }
        for (name, arm, setting, against, tokens), own in groups.items()
    ]  # fmt: skip


# Over budgets


def loss_by_budget(results: Results) -> Drawing | None:
    """Test loss against tokens of retraining: pruned, and scratch in every setting; None for one budget, which
    ``figures.final_losses`` shows in one panel."""
    shown: dict[str, list[Verdict]] = {}
    for verdict in results.verdicts:
        shown.setdefault(verdict.label, []).append(verdict)
    if len({verdict.budget for verdict in results.verdicts}) < 2:
        return None
    return drawing(
        lambda stacked: _losses(results, shown, stacked),
        "loss-by-budget",
        "Test loss against tokens of retraining",
        "Test loss at the end of training, a separate run for each budget; on the right as perplexity. Filled and "
        "solid: pruned and retrained; hollow and dashed: from scratch (dotted: without the masks). The grey line is "
        "the parent. Means over seeds.",
    )


def _losses(results: Results, shown: dict[str, list[Verdict]], stacked: bool) -> Figure:
    rows, columns = panels(len(shown), stacked)
    figure = Figure(figsize=(NARROW if stacked else WIDE, 0.5 + 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    parent = results.parent["test_loss"] if results.parent else None
    settings = [setting for setting in SETTINGS if any(verdict.setting == setting for verdict in results.verdicts)]
    for number, (axis, (name, verdicts)) in enumerate(zip(axes, shown.items(), strict=False)):
        for setting, against in dict.fromkeys((verdict.setting, verdict.against) for verdict in verdicts):
            own = [v for v in verdicts if (v.setting, v.against) == (setting, against)]
            _arms(axis, sorted(own, key=lambda v: v.tokens), name)
        by_tokens(axis, (verdict.tokens for verdict in verdicts))
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", labelleft=number % columns == 0)
        axis.set_title("\n".join(name.split(", ", 1)), fontsize=9)
        grid(axis)
        if parent is not None:
            axis.axhline(parent, **PARENT)
    for number in range(len(shown)):
        if number % columns == columns - 1 or number == len(shown) - 1:
            with_perplexity(axes[number], vertical=True)
    name_lowest(axes, len(shown), columns, "tokens of retraining")
    for axis in axes[::columns]:
        axis.set_ylabel("test loss, nats per token", fontsize=8.5)
    handles = [Line2D([], [], color=ARMS["pruned"], marker="o", label="pruned")]
    handles += [
        Line2D([], [], color=ARMS["scratch"], marker=SCRATCH[setting], linestyle=DASHED, **HOLLOW,
               label=f"scratch, {SETTINGS[setting].lower()}") for setting in settings
    ]  # fmt: skip
    if parent is not None:
        handles.append(Line2D([], [], label=f"parent {parent:.3f}", **PARENT))
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if stacked else 4, fontsize=8)
    return figure


def _arms(axis: Any, own: Sequence[Verdict], name: str) -> None:
    """Both arms of one comparison at its budgets."""
    dashes = (0, (1, 1.5)) if own[0].dense else DASHED
    for arm, style in (
        ("pruned", {"marker": "o", "markersize": 5}),
        ("scratch", {"marker": SCRATCH[own[0].setting], "linestyle": dashes, "markersize": 4.5, **HOLLOW}),
    ):
        axis.plot(
            [v.tokens for v in own], [getattr(v, arm)["test"] for v in own], color=ARMS[arm], linewidth=1.2, **style
        )
        for verdict in own:  # one point each, for the tooltips
            loss = getattr(verdict, arm)["test"]
            (point,) = axis.plot(verdict.tokens, loss, "o", markersize=7, alpha=0)
            what = arm if arm == "pruned" else f"scratch, {SETTINGS[verdict.setting].lower()}"
            tip(
                point, f"{name}, {what}, {verdict.tokens:,} tokens: {loss:.4f} nats, perplexity {perplexity(exp(loss))}"
            )


def gap_by_budget(results: Results) -> Drawing | None:
    """Scratch minus pruned on test against the budget, with intervals, laws and break-evens; None for one budget."""
    if not results.trends:
        return None
    many = len(colours(results)) > len(COLOURS)
    shown: dict[str, list[Trend]] = {}
    for trend in results.trends:
        title = SETTINGS[trend.setting]
        shown.setdefault(f"{trend.method}: {title.lower()}" if many else title, []).append(trend)
    return drawing(
        lambda stacked: _gaps(results, shown, many, stacked),
        "gap-by-budget",
        "The gap against tokens, and where scratch catches up",
        "Scratch minus pruned on test: above zero the pruned model is ahead. Bars are 95% t intervals over seeds"
        " (none for one seed). Curves are the difference of the laws of both arms, where these could be fitted; a "
        "thick bar on the line of zero is a break-even's 95% interval.",
    )


def _gaps(results: Results, shown: dict[str, list[Trend]], many: bool, stacked: bool) -> Figure:
    names = list(dict.fromkeys(_name(trend, many) for trends in shown.values() for trend in trends))
    words = {name: wrapped(name.replace(common_tail(results), ""), 7.5, 1.2) for name in names}
    lines = max(sum(words[_name(trend, many)].count("\n") + 1 for trend in trends) for trends in shown.values())
    rows, columns = panels(len(shown), stacked, most=2)
    high = max(2.7, 0.9 + lines * 7.5 * 1.3 / 72)
    figure = Figure(figsize=(NARROW if stacked else WIDE, high * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    palette = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    verdicts = {(v.label, v.setting, v.against, v.tokens): v.test for v in results.verdicts}
    for axis, (title, trends) in zip(axes, shown.items(), strict=False):
        for number, trend in enumerate(trends):
            _gap(axis, trend, verdicts, palette[_name(trend, many)], (number + 0.5) / len(trends) - 0.5)
        axis.axhline(0, color=INK, linewidth=0.9)
        by_tokens(axis, (tokens for trend in trends for tokens in trend.arms.tokens))
        axis.set_title(title)
        axis.tick_params(labelsize=8)
        grid(axis)
        last = [(verdicts[t.label, t.setting, t.against, t.arms.tokens[-1]].mean, _name(t, many)) for t in trends]
        label_ends(axis, [(mean, words[name], palette[name]) for mean, name in last], high - 0.9, 7.5)
    for axis in axes[::columns]:
        axis.set_ylabel("scratch minus pruned, nats", fontsize=8.5)
    name_lowest(axes, len(shown), columns, "tokens of retraining")
    return figure


def _gap(axis: Any, trend: Trend, verdicts: dict[Any, Any], colour: str, shift: float) -> None:
    """One comparison; ``shift`` from -0.5 to 0.5 separates bars at the same budget."""
    found = [verdicts[trend.label, trend.setting, trend.against, tokens] for tokens in trend.arms.tokens]
    step = min(np.diff(np.log(trend.arms.tokens)))
    tokens = np.exp(np.log(trend.arms.tokens) + 0.3 * step * shift)
    means = [difference.mean for difference in found]
    reach = [0.0 if difference.high is None else difference.high - difference.mean for difference in found]
    axis.errorbar(tokens, means, yerr=reach, color=colour, fmt="s" if trend.dense else "o", markersize=4, linewidth=1.1)
    for at, budget, mean, half in zip(tokens, trend.arms.tokens, means, reach, strict=True):
        (point,) = axis.plot(at, mean, "o", markersize=7, alpha=0)
        tip(point, f"{trend.subject}, {budget:,} tokens: {signed(mean)}" + (f" ± {half:.3f} nats" if half else " nats"))
    if trend.break_even.by == "laws":
        fine = np.geomspace(trend.arms.tokens[0], trend.arms.tokens[-1], 60)
        axis.plot(fine, scaling_laws.gaps(trend.arms, fine).mean(axis=0), color=colour, linewidth=1.1, alpha=0.75)
    else:
        axis.plot(tokens, means, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
    even = trend.break_even
    if even.low is not None and even.high is not None:
        axis.plot([even.low, even.high], [0, 0], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")


def _name(trend: Trend, many: bool) -> str:
    words = trend.label.removeprefix(trend.method).lstrip(", ") if many else trend.label
    return words + ", dense scratch" * trend.dense


def gap_by_ratio(results: Results) -> Drawing | None:
    """Scratch minus pruned on test against the ratio; None if no method has two ratios."""
    verdicts = [verdict for verdict in results.verdicts if verdict.ratio is not None]
    ratios: dict[str, set[float]] = {}
    for verdict in verdicts:
        ratios.setdefault(_family(verdict), set()).add(verdict.ratio or 0.0)
    if not any(len(found) > 1 for found in ratios.values()):
        return None
    budgets = sorted({verdict.tokens for verdict in verdicts})
    if len(budgets) > MOST_BUDGETS:
        budgets = [budgets[0], budgets[len(budgets) // 2], budgets[-1]]
    what = "all parameters" if results.study.ratio_of == "all" else "the blocks' linear weights"
    return drawing(
        lambda stacked: _gap_by_ratio(verdicts, budgets, stacked),
        "gap-by-ratio",
        "The gap against the ratio",
        f"Scratch minus pruned on test against the share of {what} that was removed: above zero the pruned "
        "model is ahead. Bars are 95% t intervals over seeds (none for one seed).",
    )


def _gap_by_ratio(verdicts: list[Verdict], budgets: list[int], stacked: bool) -> Figure:
    settings = [setting for setting in SETTINGS if any(verdict.setting == setting for verdict in verdicts)]
    places = [(setting, tokens) for setting in settings for tokens in budgets]
    rows, columns = (len(places), 1) if stacked else (len(settings), len(budgets))
    figure = Figure(figsize=(NARROW if stacked else WIDE, 0.6 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    names = list(dict.fromkeys(_family(verdict) for verdict in verdicts))
    for axis, (setting, tokens) in zip(axes, places, strict=True):
        for number, name in enumerate(names):
            own = sorted(
                (v for v in verdicts if (v.setting, v.tokens, _family(v)) == (setting, tokens, name)),
                key=lambda v: v.ratio or 0.0,
            )
            reach = [0.0 if v.test.high is None else v.test.high - v.test.mean for v in own]
            shift = 0.006 * (number - (len(names) - 1) / 2)  # separates bars at the same ratio
            axis.errorbar(
                [(v.ratio or 0.0) + shift for v in own], [v.test.mean for v in own], yerr=reach, fmt="o-",
                color=COLOURS[number % len(COLOURS)], markersize=4, linewidth=1.1,
            )  # fmt: skip
            for verdict in own:
                (point,) = axis.plot((verdict.ratio or 0.0) + shift, verdict.test.mean, "o", markersize=7, alpha=0)
                tip(point, f"{verdict.subject}: {signed(verdict.test.mean)} nats")
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_title(f"{SETTINGS[setting]}\n{amount(tokens)} tokens of retraining", fontsize=9)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axis.set_xticks(sorted({v.ratio or 0.0 for v in verdicts}))
        axis.tick_params(labelsize=8, labelbottom=True)
        grid(axis)
    name_lowest(axes, len(places), columns, "removed")
    for axis in axes[::columns]:
        axis.set_ylabel("scratch minus pruned, nats", fontsize=8.5)
    handles = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], marker="o", markersize=4, label=name)
        for number, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if stacked else 3, fontsize=8)
    return figure


def _family(verdict: Verdict) -> str:
    """The method and its pattern, unless the pattern implies the ratio."""
    unstructured = f" {verdict.pattern}" if verdict.pattern == "unstructured" else ""
    kind = " N:M" if verdict.pattern and not unstructured else unstructured
    distilled = ", distilled" * (verdict.objective == "distill")
    return f"{verdict.method}{kind}{distilled}{', dense scratch' * verdict.dense}"
