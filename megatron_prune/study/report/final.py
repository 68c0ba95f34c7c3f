"""The figure of where the runs ended: pruned and scratch, a line between them, at the largest budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.report.drawing import INK, SETTINGS, Drawing, colours, drawing, signed


def final_losses(results: Results) -> Drawing | None:
    """Test loss of pruned and scratch at the end of training, a panel a setting, the parent as a line.

    Of each comparison the largest budget; the others are in the figures over budgets.
    """
    largest = {(verdict.setting, _name(verdict)): verdict for verdict in sorted(results.verdicts, key=_tokens)}
    shown = [verdict for verdict in results.verdicts if verdict is largest[verdict.setting, _name(verdict)]]
    panels = {setting: own for setting in SETTINGS if (own := [v for v in shown if v.setting == setting])}
    if not panels:
        return None
    several_seeds = max(verdict.test.seeds for verdict in shown) > 1
    several = len(shown) < len(results.verdicts)
    return drawing(
        lambda stacked: _final_losses(results, panels, stacked),
        "final-loss",
        "Final test loss, pruned against scratch" + " (largest budget)" * several,
        "Test loss at the end of training, lower is better. The number on each line is scratch minus pruned: "
        "positive where the pruned model ends lower. The dashed line is the parent. "
        + ("Points are means over seeds." if several_seeds else "One seed: there are no intervals."),
    )


def _final_losses(results: Results, panels: Mapping[str, Sequence[Verdict]], stacked: bool) -> Figure:
    parent = results.parent["test_loss"] if results.parent else None
    every = list(dict.fromkeys(_name(verdict) for verdict in results.verdicts))
    rows = {
        setting: [name for name in every if not stacked or name in {_name(v) for v in verdicts}]
        for setting, verdicts in panels.items()
    }
    heights = [0.75 + 0.62 * len(names) for names in rows.values()]
    size = (3.9, 0.5 + sum(heights)) if stacked else (7.6, 0.5 + heights[0])
    figure = Figure(figsize=size, layout="constrained")
    grid, ratios = ((len(panels), 1), heights) if stacked else ((1, len(panels)), None)
    axes = figure.subplots(*grid, sharex=True, squeeze=False, height_ratios=ratios).ravel()
    for axis, (setting, verdicts) in zip(axes, panels.items(), strict=True):
        names = rows[setting]
        _dumbbells(axis, {names.index(_name(v)): v for v in verdicts}, colours(results))
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
        sparse = any(verdict.sparse for verdict in results.verdicts)
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


def _tokens(verdict: Verdict) -> int:
    return verdict.tokens


def _name(verdict: Verdict) -> str:
    """What stands at the left of a verdict's line."""
    return "\n".join(verdict.label.split(", ") + ["dense scratch"] * verdict.dense)
