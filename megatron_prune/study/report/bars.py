"""The figure at equal total tokens: bars of both arms' losses, and scratch minus pruned below them."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.report.drawing import (
    INK,
    Drawing,
    amount,
    colours,
    drawing,
    grid,
    name_lowest,
    panels,
    signed,
)

SETTING = "equal-total"
WIDTH = 0.38


def equal_total(results: Results) -> Drawing | None:
    """Test losses at equal total tokens; None where no such comparison has finished."""
    shown: dict[str, list[Verdict]] = {}
    for verdict in results.verdicts:
        if verdict.setting == SETTING:
            shown.setdefault(verdict.label + ", dense scratch" * verdict.dense, []).append(verdict)
    if not shown:
        return None
    return drawing(
        lambda stacked: _equal_total(results, shown, stacked),
        "equal-total",
        "Equal total tokens",
        "Test loss where scratch was trained on as many tokens as the pruned model has behind it, its parent's "
        "included, for each budget of retraining. Below: scratch minus pruned, above zero where pruning was worth its "
        "parent, with 95% t intervals over seeds (none for one seed). The dashed line is the parent.",
    )


def _equal_total(results: Results, shown: dict[str, list[Verdict]], stacked: bool) -> Figure:
    budgets = max(len(own) for own in shown.values())
    rows, columns = panels(len(shown), stacked, most=4 if budgets <= 4 else 3)
    figure = Figure(figsize=(3.9 if stacked else 7.6, 0.5 + 3.1 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.5, 1] * rows, sharey=False)
    palette = colours(results)
    verdicts = [verdict for own in shown.values() for verdict in own]
    top = max(max(v.pruned["test"], v.scratch["test"]) for v in verdicts)
    ends = [end for v in verdicts for end in (v.test.low, v.test.high, v.test.mean, 0.0) if end is not None]
    room = 0.22 * (max(ends) - min(ends) or 1.0)
    for number, (name, own) in enumerate(shown.items()):
        row, column = divmod(number, columns)
        losses, below = axes[2 * row][column], axes[2 * row + 1][column]
        own = sorted(own, key=lambda verdict: verdict.tokens)
        _losses(losses, own, palette[own[0].label], results)
        _differences(below, own, palette[own[0].label])
        losses.set_ylim(0, 1.08 * top)
        below.set_ylim(min(ends) - room, max(ends) + room)
        losses.set_title("\n".join(name.split(", ", 1)), fontsize=9)
        if column == 0:
            losses.set_ylabel("test loss, nats", fontsize=8.5)
            below.set_ylabel("S − P, nats", fontsize=8.5)
    name_lowest(axes[::2].ravel(), len(shown), columns, "")
    name_lowest(axes[1::2].ravel(), len(shown), columns, "tokens of retraining")
    handles = [
        Patch(facecolor=INK, edgecolor=INK, label="pruned, retrained"),
        Patch(facecolor="none", edgecolor=INK, label="from scratch"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5)
    return figure


def _losses(axis: Any, verdicts: list[Verdict], colour: str, results: Results) -> None:
    places = range(len(verdicts))
    axis.bar(
        [x - WIDTH / 2 for x in places], [v.pruned["test"] for v in verdicts], WIDTH, color=colour, edgecolor=colour
    )
    axis.bar(
        [x + WIDTH / 2 for x in places], [v.scratch["test"] for v in verdicts], WIDTH, color="none", edgecolor=colour
    )
    if results.parent:
        axis.axhline(results.parent["test_loss"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.set_xticks(list(places), [""] * len(verdicts))
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelsize=8)


def _differences(axis: Any, verdicts: list[Verdict], colour: str) -> None:
    places, means = list(range(len(verdicts))), [v.test.mean for v in verdicts]
    reach = [0.0 if v.test.high is None else v.test.high - v.test.mean for v in verdicts]
    axis.bar(places, means, 0.6, color=colour, alpha=0.35)
    axis.errorbar(places, means, yerr=reach, fmt="o", color=colour, markersize=3.5, linewidth=1.1)
    for place, mean, half in zip(places, means, reach, strict=True):
        up = mean >= 0
        axis.annotate(
            signed(mean, 2), (place, mean + half if up else mean - half), xytext=(0, 3 if up else -3),
            textcoords="offset points", ha="center", va="bottom" if up else "top", fontsize=7, color=colour,
        )  # fmt: skip
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xticks(places, [amount(v.tokens) for v in verdicts], fontsize=7.5)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_xlim(-0.6, len(places) - 0.4)
    grid(axis)
