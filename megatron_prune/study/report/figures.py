"""The figures at the largest budget: the gaps behind the conclusion, and the final losses.

Pruned is blue and filled, scratch orange and hollow; the scratch marker shows its setting. Grey: not told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_prune.study.analysis.headlines import Headline
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.grid import label
from megatron_prune.study.report.drawing import (
    ARMS,
    HOLLOW,
    INK,
    NARROW,
    PARENT,
    SCRATCH,
    WIDE,
    Drawing,
    drawing,
    inches,
    tip,
    width_of,
    with_perplexity,
    wrapped,
)
from megatron_prune.study.report.tables import SETTINGS, exp
from megatron_prune.study.report.tabular import MINUS, interval, perplexity, signed


@dataclass(frozen=True)
class PlotLine:
    """One row of the figure of gaps: a comparison or a mean of several. ``group`` is set on a group's first row."""

    group: str
    name: str
    mean: float
    low: float | None
    high: float | None
    winner: str
    together: bool

    @property
    def words(self) -> str:
        return signed(self.mean) + (f" {interval(self.low, self.high)}" if self.low is not None else "")


def gaps(results: Results) -> Drawing | None:
    """Scratch minus pruned with its interval: one panel per setting with all comparisons by granularity."""
    panels: dict[str, list[PlotLine]] = {}
    names = short_labels([verdict for headline in results.headlines for verdict in headline.verdicts])
    for headline in results.headlines:
        panels.setdefault(headline.setting, []).extend(_lines(headline, names))
    if not panels:
        return None
    kinds = {_interval(verdict)[2] for headline in results.headlines for verdict in headline.verdicts}
    over = " or ".join(sorted(kind for kind in kinds if kind))
    several = len({verdict.budget for headline in results.headlines for verdict in headline.every}) > 1
    tokens = " or ".join(f"{one:,}" for one in sorted({v.tokens for h in results.headlines for v in h.verdicts}))
    return drawing(
        lambda stacked: _gaps(panels, stacked),
        "gaps",
        "The gap, scratch minus pruned",
        f"Test loss of scratch minus that of pruned after {tokens} tokens of retraining"
        f"{', the largest budget' * several}{removed(results)}: to the right of zero the pruned model ends lower. "
        + (f"Bars are 95% intervals over {over}. " if over else "There are no intervals: one seed. ")
        + "Diamonds are means of the comparisons below them. Grey: not told apart.",
    )


def common_tail(results: Results) -> str:
    """The common end of all labels if all comparisons remove the same share: ``, 50% removed``."""
    ratios = {item.comparison.pruning.subject[2] for item in results.compared}
    ratio = next(iter(ratios), None)
    return f", {100 * ratio:g}% removed" if len(ratios) == 1 and ratio is not None else ""


def short_labels(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Labels without the ratio that they share, which ``removed`` shows once."""
    ratios = {verdict.ratio for verdict in verdicts}
    return {v.label: label(v.method, v.pattern, None if len(ratios) == 1 else v.ratio, v.objective) for v in verdicts}


def removed(results: Results) -> str:
    """``, 50% of the blocks' linear weights removed``, if that is the same for all."""
    ratios = {verdict.ratio for verdict in results.verdicts}
    ratio = next(iter(ratios), None)
    if len(ratios) != 1 or ratio is None:
        return ""
    what = "all parameters" if results.study.ratio_of == "all" else "the blocks' linear weights"
    return f", {100 * ratio:g}% of {what} removed"


def _lines(headline: Headline, names: Mapping[str, str]) -> list[PlotLine]:
    """The mean of a granularity's comparisons, if there are several, and each of them."""
    against = ""
    if headline.sparse:
        against = "\nvs dense scratch" if headline.dense else "\nvs same masks"
    against += "\nboth distilled" * (headline.objective == "distill")
    group, lines = headline.granularity.capitalize() + against, []
    if len(headline.verdicts) > 1:
        low, high = headline.interval or (None, None)
        name = f"mean of {len(headline.verdicts)}"
        lines.append(PlotLine(group, name, headline.test.mean, low, high, headline.winner, True))
    for verdict in headline.verdicts:
        low, high, _ = _interval(verdict)
        group = "" if lines else group
        lines.append(PlotLine(group, names[verdict.label], verdict.test.mean, low, high, verdict.shown_winner, False))
    return lines


def _interval(verdict: Verdict) -> tuple[float | None, float | None, str]:
    """The interval over seeds if there are several, otherwise over documents if there are enough."""
    if verdict.test.low is not None:
        return verdict.test.low, verdict.test.high, "seeds"
    if verdict.documents and verdict.documents.low is not None:
        return verdict.documents.low, verdict.documents.high, "evaluation documents (one seed)"
    return None, None, ""


def _gaps(panels: Mapping[str, Sequence[PlotLine]], stacked: bool) -> Figure:
    """Names and numbers are at the sides, or above each bar on a narrow page; laid out in inches so nothing is cut."""
    size = 8.0 if stacked else 8.5
    room = 1.75 if stacked else 2.1
    panels = {
        setting: [replace(line, name=wrapped(line.name, size, room, bold=line.together)) for line in lines]
        for setting, lines in panels.items()
    }
    every = [line for lines in panels.values() for line in lines]
    tall = 0.15 * max(line.name.count("\n") for line in every)
    width, unit, above, below = (NARROW, 0.4 + tall, 0.5, 0.55) if stacked else (WIDE, 0.26 + tall, 0.45, 0.52)
    groups = 0.22 + max(width_of(line.group, 8.5, bold=True) for line in every)
    left = 0.2 if stacked else groups + 0.15 + max(width_of(line.name, 8.5, bold=line.together) for line in every)
    right = 0.2 if stacked else 0.15 + max(width_of(line.words, 8.5, bold=line.together) for line in every)
    heights = {setting: unit * _places(lines, stacked)[-1] for setting, lines in panels.items()}
    total = sum(heights.values()) + (above + below) * len(panels)
    figure, top = Figure(figsize=(width, total)), total
    for setting, lines in panels.items():
        top -= above + heights[setting]
        axis = figure.add_axes((left / width, top / total, (width - left - right) / width, heights[setting] / total))
        _panel(axis, lines, groups, width - (0.02 if stacked else right), stacked)
        axis.set_ylim(_places(lines, stacked)[-1] - 0.5, -0.5)
        axis.set_xlabel("scratch minus pruned, nats per token", fontsize=8.5)
        figure.text(
            0.02 / width, (top + heights[setting] + 0.2) / total, SETTINGS[setting], fontsize=10, fontweight="bold"
        )
        top -= below
    return figure


def _places(lines: Sequence[PlotLine], stacked: bool) -> list[float]:
    """Where each row of a panel is, and where it ends; on a narrow page a group's name has its own row, and on a wide
    one the next group begins below its last line."""
    places, place, free = [], -1.0, -1.0
    for line in lines:
        place += 1.55 if stacked and line.group else 1.0
        if line.group:
            place = max(place, free)
            free = -1.0 if stacked else place + 0.25 + 0.58 * len(line.group.split("\n"))
        places.append(place)
    return [*places, max(place + 1, free)]


def _panel(axis: Any, lines: Sequence[PlotLine], names_at: float, numbers_at: float, stacked: bool) -> None:
    ends = [end for line in lines for end in (line.mean, line.low, line.high, 0.0) if end is not None]
    room = 0.1 * (max(ends) - min(ends) or 1.0)
    axis.set_xlim(min(ends) - room, max(ends) + room)
    if not stacked:
        axis.axvline(0, color=INK, linewidth=0.9)
        axis.grid(axis="x", alpha=0.18, linewidth=0.6, color=INK)
    for line, place in zip(lines, _places(lines, stacked), strict=False):
        if stacked:  # text is between the bars
            axis.plot([0, 0], [place + 0.07, place + 0.33], color=INK, linewidth=0.9)
        _gap(axis, place, line, names_at, numbers_at, stacked)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(5 if stacked else 8))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.3g}".replace("-", MINUS) if value else "0")
    )
    axis.tick_params(axis="x", labelsize=8)
    low, high = axis.get_xlim()
    for arm, words, sign, align in (("scratch", "\u2190 scratch ends lower", -1, "right"),
                                    ("pruned", "pruned ends lower \u2192", 1, "left")):  # fmt: skip
        if (high if sign > 0 else -low) / (high - low) > (0.48 if stacked else 0.4):
            axis.annotate(words, (0, 1), xycoords=("data", "axes fraction"), xytext=(4 * sign, 3), ha=align,
                          va="bottom", textcoords="offset points", fontsize=8, color=ARMS[arm])  # fmt: skip


def _gap(axis: Any, place: float, line: PlotLine, names_at: float, numbers_at: float, stacked: bool) -> None:
    colour, weight, size = ARMS[line.winner], "bold" if line.together else "normal", 8.5 - 0.5 * stacked
    y = place + 0.2 * stacked
    if line.low is not None:
        axis.plot([line.low, line.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    (point,) = axis.plot(line.mean, y, "D" if line.together else "o", color=colour, markersize=6.5, markeredgewidth=1.4,
                         markerfacecolor="none" if line.winner == "neither" else colour)  # fmt: skip
    tip(point, f"{line.name}: {line.words} nats")
    where: dict[str, Any] = {"transform": inches(axis), "fontsize": size, "clip_on": False}
    if stacked:
        above = 0.43 + (line.name.count("\n") * 8 * 1.0 / 72) / 0.4
        axis.text(0.02, place + 0.02 - above, line.group.replace("\n", " "), va="bottom", fontweight="bold", **where)
        axis.text(0.02, place + 0.02, line.name, va="bottom", fontweight=weight, linespacing=1.0, **where)
        axis.text(
            numbers_at, place + 0.02, line.words, va="bottom", ha="right", color=colour, fontweight=weight, **where
        )
        return
    for number, words in enumerate(line.group.split("\n")):
        axis.text(0.02, place + 0.58 * number, words, va="center", fontweight="bold", **where)
    axis.text(names_at, place, line.name, va="center", fontweight=weight, linespacing=1.0, **where)
    axis.text(numbers_at + 0.1, place, line.words, va="center", color=colour, fontweight=weight, **where)


# Losses of both arms


def final_losses(results: Results) -> Drawing | None:
    """Final test loss of pruned and scratch in one panel: one row per comparison at its largest budget, the parent as a
    line. Other budgets are in the figures over budgets."""
    rows: dict[tuple[str, bool], dict[str, Verdict]] = {}
    for headline in results.headlines:
        for verdict in headline.verdicts:
            rows.setdefault((verdict.label, verdict.dense), {})[verdict.setting] = verdict
    if not rows:
        return None
    order = list(dict.fromkeys((verdict.label, verdict.dense) for verdict in results.verdicts))
    rows = {name: rows[name] for name in sorted(rows, key=order.index)}
    several_seeds = max(v.test.seeds for own in rows.values() for v in own.values()) > 1
    several = len({verdict.budget for verdict in results.verdicts}) > 1
    sparse = any(verdict.sparse for verdict in results.verdicts)
    return drawing(
        lambda stacked: _final_losses(results, rows, stacked),
        "final-loss",
        "Final test loss, pruned against scratch" + " (largest budget)" * several,
        f"Test loss at the end of training{removed(results)}; lower is better. The upper scale is the perplexity. "
        f"Numbers are scratch minus pruned: positive where pruned is lower. The dashed line is the parent. Scratch is "
        f"of the same shape{', and under the same masks unless called dense' * sparse}. "
        + ("Points are means over seeds." if several_seeds else "One seed."),
    )


def _final_losses(results: Results, rows: Mapping[tuple[str, bool], Mapping[str, Verdict]], stacked: bool) -> Figure:
    parent = results.parent["test_loss"] if results.parent else None
    settings = [setting for setting in SETTINGS if any(setting in own for own in rows.values())]
    short = short_labels([verdict for own in rows.values() for verdict in own.values()])
    size, room = (8.0, NARROW - 0.3 - 0.45 * len(settings)) if stacked else (8.5, 2.4)
    names = {key: wrapped(short[key[0]] + ", dense scratch" * key[1], size, room) for key in rows}
    tall = 0.15 * max(name.count("\n") for name in names.values())
    heads = [SETTINGS[setting].replace(" ", "\n", 1) for setting in settings]
    column = 0.15 + max([0.55, *(width_of(head, 8, bold=True) for head in heads)])
    width, unit, above, left, right = (
        (NARROW, 0.42 + tall, 0.62, 0.2, 0.2) if stacked
        else (WIDE, 0.3 + tall, 0.55, 0.15 + max(width_of(name, 8.5) for name in names.values()),
              0.12 + column * len(settings))
    )  # fmt: skip
    handles = _key(settings, parent)
    below = 0.5 + (0.18 * len(handles) if stacked else 0.22) + 0.1
    height = unit * len(rows)
    total = above + height + below
    figure = Figure(figsize=(width, total))
    axis = figure.add_axes((left / width, below / total, (width - left - right) / width, height / total))
    for place, (key, own) in enumerate(rows.items()):
        at = [width - right + 0.12 + column * number for number in range(len(settings))]
        _dumbbell(axis, place, names[key], own, dict(zip(settings, at, strict=True)), stacked)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.margins(x=0.04)
    if not stacked:
        for number, head in enumerate(heads):
            at_column = (width - right + 0.12 + column * number) / width
            figure.text(at_column, (below + height + 0.1) / total, head, fontsize=8, fontweight="bold", va="bottom",
                        linespacing=1.1)  # fmt: skip
    if parent is not None:
        for place in range(len(rows)) if stacked else ():  # text is between the lines
            axis.plot([parent, parent], [place + 0.08, place + 0.32], **PARENT | {"linestyle": (0, (2, 1.5))}, zorder=0)
        if not stacked:
            axis.axvline(parent, **PARENT, zorder=0)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("test loss, nats per token", fontsize=8.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5 if stacked else 8))
    axis.grid(axis="x", alpha=0.18 * (not stacked), linewidth=0.6, color=INK)
    with_perplexity(axis, vertical=False)
    figure.legend(
        handles=handles, loc="lower center", ncols=1 if stacked else len(handles), fontsize=8, borderaxespad=0.1
    )
    return figure


def _dumbbell(
    axis: Any, place: int, name: str, own: Mapping[str, Verdict], columns: Mapping[str, float], stacked: bool
) -> None:
    """The pruned run and its scratch runs on one line; the gaps next to it, or above it on a narrow page."""
    pruned = next(iter(own.values())).pruned["test"]
    y = place + 0.2 * stacked
    ends = [pruned, *(verdict.scratch["test"] for verdict in own.values())]
    axis.plot([min(ends), max(ends)], [y, y], color=INK, linewidth=1.2, alpha=0.6, zorder=1)
    (point,) = axis.plot(pruned, y, "o", color=ARMS["pruned"], markersize=7, zorder=3)
    tip(point, f"{name}, pruned and retrained: {pruned:.4f} nats, perplexity {perplexity(exp(pruned))}")
    for setting, verdict in own.items():
        loss = verdict.scratch["test"]
        (point,) = axis.plot(loss, y, SCRATCH[setting], color=ARMS["scratch"], markersize=6.5, zorder=2, **HOLLOW)
        tip(point, f"{name}, scratch, {SETTINGS[setting].lower()}: {loss:.4f} nats, perplexity {perplexity(exp(loss))}")
    where: dict[str, Any] = {"transform": inches(axis), "clip_on": False, "va": "center", "linespacing": 1.0}
    where["fontsize"] = 8.5 - 0.5 * stacked
    if stacked:
        where["va"] = "bottom"
        axis.text(0.02, place + 0.02, name, **where)
        gaps = [(signed(own[setting].test.mean, 2), own[setting].shown_winner) for setting in columns if setting in own]
        for number, (words, winner) in enumerate(reversed(gaps)):
            axis.text(NARROW - 0.02 - 0.45 * number, place + 0.02, words, ha="right", color=ARMS[winner], **where)
        return
    axis.text(0.02, place, name, **where)
    for setting, at in columns.items():
        if setting in own:
            axis.text(at, place, signed(own[setting].test.mean), color=ARMS[own[setting].shown_winner], **where)


def _key(settings: Sequence[str], parent: float | None) -> list[Line2D]:
    handles = [Line2D([], [], marker="o", linestyle="", color=ARMS["pruned"], label="pruned, retrained")]
    handles += [
        Line2D([], [], marker=SCRATCH[setting], linestyle="", color=ARMS["scratch"], **HOLLOW,
               label=f"scratch, {SETTINGS[setting].lower()}") for setting in settings
    ]  # fmt: skip
    if parent is not None:
        handles.append(Line2D([], [], label=f"parent {parent:.3f}", **PARENT))
    return handles
