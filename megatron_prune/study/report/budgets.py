"""Figures over budgets: validation loss of both arms, and the gap with its break-even.

Each budget is a run of its own. The first has a panel for each pruned model; the second one for each setting, or,
where there are more models than colours, for each setting and method.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from megatron_prune.study.analysis import scaling_laws
from megatron_prune.study.analysis.conclusions import Trend
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.report.drawing import (
    COLOURS,
    DASHED,
    INK,
    SETTINGS,
    Drawing,
    by_tokens,
    colours,
    drawing,
    grid,
    name_lowest,
    panels,
    signed,
)

HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.3}


def losses(results: Results) -> Drawing | None:
    """Validation loss against tokens, pruned and scratch, the gap at every budget, the parent as a line."""
    setting = next((s for s in SETTINGS if any(verdict.setting == s for verdict in results.verdicts)), None)
    if setting is None:
        return None
    shown: dict[str, list[Verdict]] = {}
    for verdict in results.verdicts:
        if verdict.setting == setting:
            shown.setdefault(verdict.label, []).append(verdict)
    return drawing(
        lambda stacked: _losses(results, shown, stacked),
        "loss-by-budget",
        f"Validation loss against tokens, {SETTINGS[setting].lower()}",
        "Validation loss at the end of training against the tokens of retraining, a run of its own for each budget. "
        "Filled and solid: pruned and retrained; hollow and dashed: from scratch. The numbers above are the gaps, "
        "scratch minus pruned. The grey line is the parent. Means over seeds.",
    )


def _losses(results: Results, shown: dict[str, list[Verdict]], stacked: bool) -> Figure:
    rows, columns = panels(len(shown), stacked)
    figure = Figure(figsize=(3.9 if stacked else 7.6, 0.4 + (2.5 if stacked else 2.35) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    palette = colours(results)
    parent = results.parent["validation_loss"] if results.parent else None
    for axis, (name, verdicts) in zip(axes, shown.items(), strict=False):
        kinds = list(dict.fromkeys(verdict.against for verdict in verdicts))
        for number, against in enumerate(kinds):
            own = sorted((v for v in verdicts if v.against == against), key=lambda v: v.tokens)
            tokens = [verdict.tokens for verdict in own]
            marker = "s" if own[0].dense else "o"
            style = {"color": palette[name], "linewidth": 1.3, "markersize": 5}
            axis.plot(tokens, [v.pruned["validation"] for v in own], "o-", **style)
            axis.plot(tokens, [v.scratch["validation"] for v in own], marker, linestyle=DASHED, **style, **HOLLOW)
            if len(kinds) > 1:  # which scratch the gaps are against
                axis.plot(
                    -0.05, 1, marker, transform=axis.transAxes + ScaledTranslation(0, (6 + 9 * number) / 72,
                    axis.figure.dpi_scale_trans), clip_on=False, color=palette[name], markersize=4, **HOLLOW,
                )  # fmt: skip
            for verdict in own:
                axis.annotate(
                    signed(verdict.validation.mean, 2), (verdict.tokens, 1), xycoords=("data", "axes fraction"),
                    xytext=(0, 2 + 9 * number), textcoords="offset points", ha="center", va="bottom", fontsize=7,
                    color=palette[name],
                )  # fmt: skip
        by_tokens(axis, (verdict.tokens for verdict in verdicts))
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", labelleft=True, labelsize=8)
        axis.set_title("\n".join(name.split(", ", 1)), pad=6 + 9 * len(kinds), fontsize=9)
        grid(axis)
        if parent is not None:
            axis.axhline(parent, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    name_lowest(axes, len(shown), columns, "tokens of retraining")
    figure.supylabel("validation loss, nats per token", fontsize=9)
    dense = any(verdict.dense for verdicts in shown.values() for verdict in verdicts)
    own_scratch = any(not verdict.dense for verdicts in shown.values() for verdict in verdicts)
    handles = [Line2D([], [], color=INK, marker="o", label="pruned")]
    if own_scratch:
        handles.append(Line2D([], [], color=INK, marker="o", linestyle=DASHED, label="scratch", **HOLLOW))
    if dense:
        handles.append(Line2D([], [], color=INK, marker="s", linestyle=DASHED, label="scratch, no masks", **HOLLOW))
    if parent is not None:
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=f"parent {parent:.3f}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if stacked else 4, fontsize=8.5)
    return figure


def gaps(results: Results) -> Drawing | None:
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
        " (none for one seed). Curves are the difference of the laws of both arms, where these could be fitted; a bar "
        "on the line of zero is a break-even's 95% interval.",
    )


def _gaps(results: Results, shown: dict[str, list[Trend]], many: bool, stacked: bool) -> Figure:
    rows, columns = panels(len(shown), stacked, most=3 if many else 2)
    names = list(dict.fromkeys(_name(trend, many) for trends in shown.values() for trend in trends))
    across = 1 if stacked else max(1, min(len(names), 104 // (max(map(len, names)) + 2)))
    height = (2.4 if columns > 2 else 3.0) * rows + 0.3 + 0.18 * math.ceil(len(names) / across)
    figure = Figure(figsize=(3.9 if stacked else 7.6, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    palette = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    verdicts = {(v.label, v.setting, v.against, v.tokens): v.test for v in results.verdicts}
    for axis, (title, trends) in zip(axes, shown.items(), strict=False):
        for number, trend in enumerate(trends):
            _gap(axis, trend, verdicts, palette[_name(trend, many)], (number + 0.5) / len(trends) - 0.5)
        axis.axhline(0, color=INK, linewidth=0.9)
        by_tokens(axis, (tokens for trend in trends for tokens in trend.arms.tokens))
        axis.set_title(title)
        grid(axis)
    for axis in axes[::columns]:
        axis.set_ylabel("scratch minus pruned, nats")
    name_lowest(axes, len(shown), columns, "tokens of retraining")
    handles = [Line2D([], [], color=palette[name], marker="o", markersize=5, label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=8)
    return figure


def _gap(axis: Any, trend: Trend, verdicts: dict[Any, Any], colour: str, shift: float) -> None:
    """One comparison; ``shift`` from -0.5 to 0.5 keeps bars at one budget apart."""
    found = [verdicts[trend.label, trend.setting, trend.against, tokens] for tokens in trend.arms.tokens]
    step = min(np.diff(np.log(trend.arms.tokens)))
    tokens = np.exp(np.log(trend.arms.tokens) + 0.3 * step * shift)
    means = [difference.mean for difference in found]
    reach = [0.0 if difference.high is None else difference.high - difference.mean for difference in found]
    axis.errorbar(tokens, means, yerr=reach, color=colour, fmt="s" if trend.dense else "o", markersize=4, linewidth=1.1)
    if trend.break_even.by == "laws":
        at = np.geomspace(trend.arms.tokens[0], trend.arms.tokens[-1], 60)
        axis.plot(at, scaling_laws.gaps(trend.arms, at).mean(axis=0), color=colour, linewidth=1.1, alpha=0.75)
    else:
        axis.plot(tokens, means, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
    even = trend.break_even
    if even.low is not None and even.high is not None:
        axis.plot([even.low, even.high], [0, 0], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")


def _name(trend: Trend, many: bool) -> str:
    words = trend.label.removeprefix(trend.method).lstrip(", ") if many else trend.label
    return words + ", dense scratch" * trend.dense
