"""The four arms of a study with both objectives: the figure of their losses, and the table of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_prune.study.analysis.effects import ASKED, NAMES
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.report.drawing import (
    ARMS,
    DASHED,
    HOLLOW,
    INK,
    NARROW,
    PARENT,
    WIDE,
    Drawing,
    drawing,
    grid,
    panels,
    tip,
    with_perplexity,
    wrapped,
)
from megatron_prune.study.report.tables import SETTINGS, exp, setting_name, shown_p
from megatron_prune.study.report.tabular import Column, Table, count, number, perplexity, signed, span, words

Losses = Mapping[tuple[str, str], Sequence[float]]  # by arm and objective, of every seed


def figure(results: Results) -> Drawing | None:
    """Test loss of every arm on the text alone and distilled, one panel per method and setting."""
    shown: dict[str, Losses] = {}
    several = len({one.setting for one in results.four_arms}) > 1
    for one in results.four_arms:
        for name, losses in one.losses.items():
            title = f"{name}{', dense scratch' * one.dense}"
            shown[f"{title}, {SETTINGS[one.setting].lower()}" if several else title] = losses
    if not shown:
        return None
    tokens = " or ".join(f"{each:,}" for each in sorted({one.tokens for one in results.four_arms}))
    return drawing(
        lambda stacked: _figure(results, shown, stacked),
        "teacher",
        "What the start gives, and what the teacher gives",
        f"Test loss after {tokens} tokens of retraining, trained on the text alone and distilled from the parent. The "
        "distance between the lines is what the pruned start gives, their slope what the teacher gives; parallel lines "
        "mean that neither needs the other. Small points are seeds. The dashed line is the parent.",
    )


def _figure(results: Results, shown: Mapping[str, Losses], stacked: bool) -> Figure:
    rows, columns = panels(len(shown), stacked)
    made = Figure(figsize=(NARROW if stacked else WIDE, 0.5 + 2.5 * rows), layout="constrained")
    axes = made.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    parent = results.parent["test_loss"] if results.parent else None
    for number_, (axis, (name, losses)) in enumerate(zip(axes, shown.items(), strict=False)):
        _panel(axis, name, losses)
        axis.set_title(wrapped(name, 9, 2.6 if stacked else WIDE / columns - 0.7), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", labelleft=number_ % columns == 0)
        grid(axis)
        if parent is not None:
            axis.axhline(parent, **PARENT)
        if number_ % columns == columns - 1 or number_ == len(shown) - 1:
            with_perplexity(axis, vertical=True)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("test loss, nats per token", fontsize=8.5)
    handles = [
        Line2D([], [], color=ARMS["pruned"], marker="o", label="pruned"),
        Line2D([], [], color=ARMS["scratch"], marker="o", linestyle=DASHED, label="scratch", **HOLLOW),
    ]
    if parent is not None:
        handles.append(Line2D([], [], label=f"parent {parent:.3f}", **PARENT))
    made.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    return made


def _panel(axis: Any, name: str, losses: Losses) -> None:
    for arm in ("pruned", "scratch"):
        style: dict[str, Any] = {"linestyle": DASHED, **HOLLOW} if arm == "scratch" else {}
        own = [np.array(losses[arm, what]) for what in NAMES]
        axis.plot([0, 1], [each.mean() for each in own], "o-" if arm == "pruned" else "o", color=ARMS[arm],
                  markersize=5.5, linewidth=1.3, **style)  # fmt: skip
        for at, (what, each) in enumerate(zip(NAMES.values(), own, strict=True)):
            if len(each) > 1:
                axis.plot([at] * len(each), each, ".", color=ARMS[arm], markersize=3, alpha=0.6)
            (point,) = axis.plot(at, each.mean(), "o", markersize=7, alpha=0)
            tip(point, f"{name}, {arm}, {what}: {each.mean():.4f} nats, perplexity {perplexity(exp(each.mean()))}")
    axis.set_xticks([0, 1], list(NAMES.values()), color=INK)
    axis.set_xlim(-0.25, 1.25)


def table(found: Results) -> Table:
    """The answers and their parts, grouped by granularity."""
    shown = []
    for one in found.four_arms:
        group = f"{one.subject}: {setting_name(one.setting, None, False).lower()}"
        for effect in one.effects:
            documents = effect.documents
            row = {
                "group": group, "asked": ASKED[effect.question], "value": effect.gap.mean, "low": effect.gap.low,
                "high": effect.gap.high, "p": effect.gap.p, "corrected_p": effect.corrected, "answer": effect.outcome,
                "documents_low": documents.low if documents else None,
                "documents_high": documents.high if documents else None,
            }  # fmt: skip
            shown.append(row)
            for name, part in effect.simple.items():
                shown.append(dict.fromkeys(row) | {
                    "group": group, "asked": f"{ASKED[effect.question]}: {name}", "value": part.mean, "low": part.low,
                    "high": part.high, "answer": "",
                })  # fmt: skip

    columns = [
        words("question", "asked", wrap=True), Column("nats", lambda row: signed(row["value"], 4), {"value": "value"}),
        span("95% over seeds", "low", "high", 4),
        *([span("95% over documents", "documents_low", "documents_high", 4)]
          if any(row["documents_low"] is not None for row in shown) else []),
        number("p", "p", shown_p), number("corrected p", "corrected_p", shown_p), words("answer", "answer"),
    ]  # fmt: skip
    caption = (
        "Differences of test losses, positive where the start or the teacher helps. Start: scratch minus pruned, the "
        "mean with and without the teacher. Teacher: text alone minus distilled, the mean of both arms. Whether one "
        "needs the other: how much larger the start's part is with the teacher (a difference of differences). "
        "Intervals are paired t over seeds; p is corrected by Holm over the three questions of all rows."
    )
    return Table("teacher", caption, columns, shown, group="group")


def worth(found: Results) -> Table:
    """What the teacher is worth in tokens of training on the text alone."""
    shown = [
        {
            "comparison": f"{each.subject.label}: {SETTINGS[each.subject.setting].lower()}", "arm": each.arm,
            "tokens": each.tokens, "loss": each.loss, "plain": each.plain, "low": each.low, "high": each.high,
            "status": each.status, "from": min(each.curve), "to": max(each.curve),
            "times": each.plain and each.plain / each.tokens,
        }
        for one in found.four_arms
        for each in one.worth
    ]  # fmt: skip

    def stated(row: Mapping[str, Any]) -> str:
        if row["plain"] is None:
            return {"beyond": f"more than {row['to']:,}", "below": f"less than {row['from']:,}"}[row["status"]]
        ends = "" if row["low"] is None else f" [{row['low']:,.0f}, {row['high']:,.0f}]"
        return f"{row['plain']:,.0f}{ends}"

    columns = [
        words("comparison", "comparison", wrap=True), words("arm", "arm"),
        number("tokens distilled on", "tokens", count), number("test loss", "loss", lambda value: f"{value:.4f}"),
        Column("worth in tokens of text alone", stated,
               {key: key for key in ("plain", "low", "high", "status", "from", "to")}),
        number("times as many", "times", lambda value: f"{value:.2f}"),
    ]  # fmt: skip
    caption = (
        "How many tokens of training on the text alone reach the loss of the distilled runs: on a line in log(tokens) "
        "between the budgets that were trained, seed by seed, with a 95% t interval over seeds. Nothing is stated "
        "outside those budgets."
    )
    return Table("worth", caption, columns, shown)
