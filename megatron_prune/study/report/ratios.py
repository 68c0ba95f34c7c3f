"""The figure of the gap against how much was removed: a row for each setting, a panel for each budget."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.report.drawing import COLOURS, INK, SETTINGS, Drawing, amount, drawing, grid, name_lowest

MOST = 3  # budgets that are shown: the smallest, the middle one and the largest of more


def gap_by_ratio(results: Results) -> Drawing | None:
    """Scratch minus pruned on test against the ratio; None where no method has two of them."""
    verdicts = [verdict for verdict in results.verdicts if verdict.ratio is not None]
    ratios: dict[str, set[float]] = {}
    for verdict in verdicts:
        ratios.setdefault(_name(verdict), set()).add(verdict.ratio or 0.0)
    if not any(len(found) > 1 for found in ratios.values()):
        return None
    budgets = sorted({verdict.tokens for verdict in verdicts})
    if len(budgets) > MOST:
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
    figure = Figure(figsize=(3.9 if stacked else 7.6, 0.8 + (2.3 if stacked else 2.4) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    names = list(dict.fromkeys(_name(verdict) for verdict in verdicts))
    for axis, (setting, tokens) in zip(axes, places, strict=True):
        for number, name in enumerate(names):
            own = sorted(
                (v for v in verdicts if (v.setting, v.tokens, _name(v)) == (setting, tokens, name)),
                key=lambda v: v.ratio or 0.0,
            )
            reach = [0.0 if v.test.high is None else v.test.high - v.test.mean for v in own]
            shift = 0.006 * (number - (len(names) - 1) / 2)  # so that bars at one ratio stay apart
            axis.errorbar(
                [(v.ratio or 0.0) + shift for v in own], [v.test.mean for v in own], yerr=reach, fmt="o-",
                color=COLOURS[number % len(COLOURS)], markersize=4, linewidth=1.1,
            )  # fmt: skip
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_title(f"{SETTINGS[setting]}\n{amount(tokens)} tokens of retraining", fontsize=9)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axis.set_xticks(sorted({v.ratio or 0.0 for v in verdicts}))
        axis.tick_params(labelsize=8, labelbottom=True)
        grid(axis)
    name_lowest(axes, len(places), columns, "removed")
    figure.supylabel("scratch minus pruned, nats", fontsize=9)
    handles = [
        Line2D([], [], color=COLOURS[number % len(COLOURS)], marker="o", markersize=4, label=name)
        for number, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if stacked else 3, fontsize=8.5)
    return figure


def _name(verdict: Verdict) -> str:
    """The method and its pattern, where that does not say the ratio itself."""
    unstructured = f" {verdict.pattern}" if verdict.pattern == "unstructured" else ""
    kind = " N:M" if verdict.pattern and not unstructured else unstructured
    return f"{verdict.method}{kind}{', dense scratch' * verdict.dense}"
