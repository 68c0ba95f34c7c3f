"""The tables in the body of a report, made of ``Results``: verdicts, laws, and the cost of models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_prune.evaluation.efficiency import THEORETICAL
from megatron_prune.study.analysis.inference import Difference
from megatron_prune.study.analysis.measures import Measure, MeasureVerdict
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.serving import COSTS, TIMES
from megatron_prune.study.analysis.verdicts import Verdict, p_value
from megatron_prune.study.grid import SUBJECT, Subject, label
from megatron_prune.study.report.tabular import (
    DASH,
    Column,
    Row,
    Table,
    count,
    flops,
    interval,
    loss,
    number,
    perplexity,
    signed,
    span,
    words,
)

SETTINGS = {
    "equal-training": "Equal training tokens",
    "equal-total": "Equal total tokens",
    "equal-flops": "Equal FLOPs",
}


def setting_name(setting: str | None, against: str | None, sparse: bool) -> str:
    """A comparison's setting as text; scratch runs of a smaller shape are always dense, so that is not mentioned."""
    if setting is None:
        return ""
    return SETTINGS[setting] + ", dense scratch" * (sparse and against == "dense")


def in_text(found: Results) -> list[Table]:
    """The tables of the report's body that are not empty."""
    made = [
        verdicts(found), compared(found), measured(found), laws(found), efficiency(found), serving(found),
    ]  # fmt: skip
    return [table for table in made if table.rows]


def verdicts(found: Results) -> Table:
    """Every verdict with its numbers, grouped by comparison."""
    seeds = len(found.study.seeds) > 1
    documents = any(verdict.documents and verdict.documents.low is not None for verdict in found.verdicts)
    several = len({verdict.tokens for verdict in found.verdicts}) > 1
    columns = [
        *([] if several else [words("comparison", "comparison", wrap=True)]),
        number("tokens of retraining", "tokens", count),
        number("pruned, loss", "pruned", loss), number("perplexity", "pruned_perplexity", perplexity),
        number("scratch, loss", "scratch", loss), number("perplexity", "scratch_perplexity", perplexity),
        Column("S − P", lambda row: signed(row["gap"], 4) + "*" * row["at_edge"], {"gap": "gap", "at_edge": "at_edge"},
               style=lambda row: f"gap {row['shown_winner']}"),
    ]  # fmt: skip
    if seeds:
        columns += [
            span("95% over seeds", "low", "high"), number("df", "freedom", lambda value: f"{value:.3g}"),
            number("p", "p", shown_p), number("corrected p", "corrected_p", shown_p),
            number("effect", "effect", lambda value: signed(value, 1)),
            number("detectable", "detectable", lambda value: f"{value:.3f}"),
        ]  # fmt: skip
    if documents:
        columns.append(span("95% over documents", "documents_low", "documents_high"))
    columns.append(Column("verdict", lambda row: VERDICTS[row["winner"]], {"winner": "winner"}, text=True,
                          style=lambda row: f"gap {row['shown_winner']}"))  # fmt: skip
    caption = (
        "Test losses at the end of training, means over seeds, in nats per token and as perplexities. S − P: scratch "
        "minus pruned."
    )
    shown = [_verdict(verdict) for verdict in found.verdicts]
    order = list(dict.fromkeys(row["comparison"] for row in shown))
    shown.sort(key=lambda row: order.index(row["comparison"]))  # keep a comparison's budgets together
    return Table("verdicts", caption, columns, shown, group="comparison" if several else "")


VERDICTS = {"pruned": "pruned ends lower", "scratch": "scratch ends lower", "neither": "not told apart"}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    test, documents = verdict.test, verdict.documents
    losses = {arm: getattr(verdict, arm)["test"] for arm in ("pruned", "scratch")}
    return {
        "comparison": _comparison(verdict),
        "tokens": verdict.tokens,
        **losses,
        **{f"{arm}_perplexity": exp(value) for arm, value in losses.items()},
        "gap": test.mean,
        "winner": verdict.winner,
        "shown_winner": verdict.shown_winner,
        "low": test.low,
        "high": test.high,
        "freedom": test.freedom or None,
        "detectable": verdict.detectable,
        "at_edge": bool(verdict.edges),
        "p": test.p,
        "corrected_p": verdict.corrected,
        "effect": test.effect,
        "documents_low": documents.low if documents else None,
        "documents_high": documents.high if documents else None,
    }


def shown_p(value: float) -> str:
    return p_value(value).removeprefix("= ")


ENDS = ("low", "high", "inner_low", "inner_high", "margin")


def compared(found: Results) -> Table:
    """The answers to the questions of ``compare``."""
    shown = [
        {
            "question": one.subject, "setting": SETTINGS[one.setting], "measure": one.measure.title,
            "answer": one.outcome, "value": one.gap.mean, "low": one.gap.low, "high": one.gap.high,
            "inner_low": one.inner and one.inner[0], "inner_high": one.inner and one.inner[1], "p": one.p,
            "corrected_p": one.corrected, "detectable": one.detectable, "comparisons": one.comparisons,
            "margin": one.asked.margin, "shown": one.shown_interval,
            "documents_low": one.documents.low if one.documents else None,
            "documents_high": one.documents.high if one.documents else None,
        }
        for one in sorted(found.contrasts, key=lambda one: list(SETTINGS).index(one.setting))
    ]  # fmt: skip
    columns = [
        words("question", "question", wrap=True), words("measure", "measure", wrap=True),
        Column("value", lambda row: signed(row["value"], 4), {"value": "value", "comparisons": "comparisons"}),
        Column("interval", _shown_interval, {name: name for name in ENDS}),
        *([span("95% over documents", "documents_low", "documents_high", 4)]
          if any(row["documents_low"] is not None for row in shown) else []),
        number("p", "p", shown_p), number("corrected p", "corrected_p", shown_p),
        number("detectable", "detectable", lambda value: f"{value:.4f}"), words("answer", "answer"),
    ]  # fmt: skip
    caption = (
        "A gap is the advantage of pruning over its scratch run: scratch minus pruned in nats, or pruned minus scratch "
        "as a share of the questions. Values: a difference of two gaps, a slope of the gap per 10% of the linears "
        "removed or per doubling of the tokens, or a gap against its margin (two one-sided tests at 5%: the 90% "
        "interval is inside). Detectable: what such a study tells from zero in four cases of five."
    )
    return Table("compare", caption, columns, shown, group="setting")


def _shown_interval(row: Row) -> str:
    if row["shown"] is None:
        return DASH
    share, (low, high) = row["shown"]
    return f"{interval(low, high, 4)} ({share:.0%})"


def measured(found: Results) -> Table:
    """Every comparison on suites, further corpora, and tasks of no suite."""
    parts = {task for one in found.measured if one.measure.kind == "suite" for task in one.measure.metrics}
    own = [one for one in found.measured if one.measure.kind != "task" or one.measure.name not in parts]
    return of_measures("measures", own)


def of_measures(name: str, made: Sequence[MeasureVerdict]) -> Table:
    """A table of verdicts on measures, grouped by measure."""
    shown = [
        {
            "measure": one.measure.title, "comparison": _comparison(one), "tokens": one.tokens, "pruned": one.pruned,
            "scratch": one.scratch, "gap": one.gap.mean, "low": one.gap.low, "high": one.gap.high, "p": one.gap.p,
            "corrected_p": one.corrected, "questions": one.questions, "winner": one.winner,
            "documents_low": one.documents.low if one.documents else None,
            "documents_high": one.documents.high if one.documents else None,
        }
        for one in made
    ]  # fmt: skip
    several = len({one.tokens for one in made}) > 1
    columns = [
        words("comparison", "comparison", wrap=True),
        *([number("tokens of retraining", "tokens", count)] if several else []),
        number("pruned", "pruned", loss), number("scratch", "scratch", loss),
        Column("gap", lambda row: signed(row["gap"], 4), {"gap": "gap"}, style=lambda row: f"gap {row['winner']}"),
        span("95%", "low", "high"),
        *([span("95% over documents", "documents_low", "documents_high")]
          if any(row["documents_low"] is not None for row in shown) else []),
        *([number("questions", "questions", count)] if any(row["questions"] for row in shown) else []),
        number("p", "p", shown_p), number("corrected p", "corrected_p", shown_p),
        Column("ahead", lambda row: AHEAD[row["winner"]], {"winner": "winner"}, text=True,
               style=lambda row: f"gap {row['winner']}"),
    ]  # fmt: skip
    caption = (
        "Losses in nats per token, accuracies as shares of the questions, means over seeds. The gap is positive where "
        "pruning is ahead. Intervals of losses are over seeds, those of accuracies over seeds and questions, paired by "
        "question; p is corrected by Holm over the family, separately for suites, tasks and corpora."
    )
    return Table(name, caption, columns, shown, group="measure")


AHEAD = {"pruned": "pruned", "scratch": "scratch", "neither": "neither"}


def _comparison(made: Subject) -> str:
    setting = setting_name(made.setting, made.against, made.sparse)
    return f"{made.label}: {setting[0].lower()}{setting[1:]}"


def laws(found: Results) -> Table:
    """Every comparison over its budgets: which arm is ahead where, break-even and laws."""
    columns = [
        words("comparison", "subject", wrap=True), words("who is ahead", "ahead", wrap=True),
        words("S − P", "gaps", wrap=True), words("break-even: scratch catches up", "break_even", wrap=True),
        words("laws of the mean over seeds", "laws", wrap=True),
    ]  # fmt: skip
    shown = []
    for trend in found.trends:
        own = [v for v in found.verdicts if all(getattr(v, key) == getattr(trend, key) for key in SUBJECT)]
        own = sorted((v for v in own if v.tokens in trend.arms.tokens), key=lambda v: v.tokens)
        gaps = f"{_gap(own[0].test)} at {own[0].tokens:,} tokens, {_gap(own[-1].test)} at {own[-1].tokens:,}"
        shown.append({"subject": trend.subject, "ahead": _ahead([verdict.winner for verdict in own]), "gaps": gaps,
                      "break_even": trend.break_even.words, "laws": trend.laws})  # fmt: skip
    return Table("laws", "On test losses; each budget is a separate run.", columns, shown)


def _ahead(winners: Sequence[str]) -> str:
    found = [
        f"{name} at {winners.count(winner)}"
        for winner, name in (("pruned", "pruned is ahead"), ("scratch", "scratch is ahead"), ("neither", "neither"))
        if winner in winners
    ]
    return f"{', '.join(found)} of {len(winners)} budgets"


def _gap(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return signed(difference.mean)
    return f"{signed(difference.mean)} {interval(difference.low, difference.high)}"


def efficiency(found: Results) -> Table:
    """The cost of each model, parent first: size, FLOPs per token, measured training speed."""
    shown = []
    for name, own in models(found).items():
        values: dict[str, list[float | None]] = {
            key: [row[key] for row in own] for key in ("params", "params_nonzero", "removed_linears", "removed_all")
        }
        values |= {key: [_per_token(row, key) for row in own] for key in ("flops_train", "flops_train_theoretical")}
        best = _at_largest_budget(own)
        both = {key: _ends(every) for key, every in values.items()}
        shown.append({
            "model": name, "test_loss": best, "perplexity": exp(best), "tokens_per_second": _speed(own),
            **{f"{key}_{end}": ends[place] for key, ends in both.items() for place, end in enumerate(("low", "high"))},
            **_accuracies(found, own),
        })  # fmt: skip
    columns = [
        words("model", "model"), _range("parameters", "params", count), _range("not zero", "params_nonzero", count),
        _range("of linears removed", "removed_linears", lambda value: f"{value:.1%}"),
        _range("of all removed", "removed_all", lambda value: f"{value:.1%}"),
        _range("FLOPs per token", "flops_train", flops), _range("of kept weights", "flops_train_theoretical", flops),
        number("tokens per second", "tokens_per_second", lambda value: f"{value:,.0f}"),
        number("test loss", "test_loss", loss), number("perplexity", "perplexity", perplexity),
        *_accuracy_columns(found),
    ]  # fmt: skip
    caption = (
        "What a model costs. FLOPs of training per token: dense matrix products that are executed; of kept weights: "
        "without the removed ones. Speed: of the longest runs on the machine that ran the study, tokens trained on "
        "over the time of all attempts, their median; steps that were run again after a kill count as time alone. Test "
        f"loss{' and accuracy' * bool(accuracies(found))}: pruned and retrained at the largest budget, mean over seeds."
    )
    return Table("efficiency", caption, columns, shown)


def models(found: Results) -> dict[str, list[Row]]:
    """The finished rows of every model by its label, parent first."""
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        if row["status"] == "finished" and row["arm"] in ("parent", "pruned"):
            groups.setdefault("parent" if row["arm"] == "parent" else label(*subject(row)), []).append(row)
    return groups


def serving(found: Results) -> Table:
    """What each model costs to run: FLOPs and memory from its shape and masks, times if they were measured."""
    shown, measured = [], False
    for name, own in models(found).items():
        row: dict[str, Any] = {"model": name}
        for key in COSTS:
            row[f"{key}_low"], row[f"{key}_high"] = _ends([one[key] for one in own])
        for key in TIMES:
            known = [one[key] for one in own if one[key] is not None]
            row[key] = statistics.median(known) if known else None
            measured = measured or bool(known)
        shown.append({**row, "test_loss": _at_largest_budget(own), **_accuracies(found, own)})
    kept = any(row["weight_bytes_packed_low"] is not None for row in shown)
    columns = [
        words("model", "model"), _range("FLOPs, 2,048 tokens", "flops_forward", flops),
        _range("of kept weights", "flops_forward_kept", flops), _range("weights, MB", "weight_bytes", _mega),
        *([_range("packed 2:4, MB (theoretical, not measured)", "weight_bytes_packed", _mega)] if kept else []),
        _range("cache per token, kB", "cache_bytes_per_token", lambda value: f"{value / 1e3:,.2f}"),
        *([number("prefill, ms", "prefill_seconds", _milli), number("decode, ms per token", "decode_seconds", _milli),
           number("decode, tokens per second", "decode_tokens_per_second", lambda value: f"{value:,.0f}")]
          if measured else []),
        *([_sparse("decode with 2:4 kernels, ms per token", "decode_seconds_2_4")] if kept else []),
        *([_sparse("with FP8 and 2:4, ms per token", "decode_seconds_fp8_2_4")]
          if any(row["decode_seconds_fp8_2_4"] for row in shown) else []),
        number("test loss", "test_loss", loss), *_accuracy_columns(found),
    ]  # fmt: skip
    caption = (
        "What a model costs to run. FLOPs of one forward pass: dense matrix products, and the same without the removed "
        "weights, which only sparse kernels save. Weights in the type of the recipe; the cache holds keys and values. "
        + ("Times are of transformers on the machine that measured them (efficiency.json); with dense kernels a sparse "
           "model is as fast as a dense one of its shape. " if measured else "No times were measured. ")
        + f"Test loss{' and accuracy' * bool(accuracies(found))} as above."
    )  # fmt: skip
    return Table("serving", caption, columns, shown)


def _sparse(head: str, key: str) -> Column:
    """A time of sparse kernels, which only models under 2:4 masks can have."""

    def shown(row: Row) -> str:
        if row["weight_bytes_packed_low"] is None:
            return DASH
        return THEORETICAL if row[key] is None else _milli(row[key])

    return Column(head, shown, {key: key}, wrap=True)


def _mega(value: float) -> str:
    return f"{value / 1e6:,.2f}"


def _milli(value: float) -> str:
    return f"{value * 1e3:,.2f}"


def _range(head: str, key: str, show: Callable[[Any], str]) -> Column:
    """One value, or the smallest and largest if seeds differ."""
    low, high = f"{key}_low", f"{key}_high"

    def shown(row: Row) -> str:
        return DASH if row[low] is None else " to ".join(dict.fromkeys((show(row[low]), show(row[high]))))

    return Column(head, shown, {low: low, high: high})


def _ends(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (None, None)


def _per_token(row: Row, key: str) -> float | None:
    done = row[key] if row[key] is not None else row["flops_total"] if row["arm"] == "parent" else None
    return done / row["tokens_train"] if done and row["tokens_train"] else None


def _speed(rows: Sequence[Row]) -> float | None:
    """Median of the longest runs' training speed in tokens per second, over all attempts."""
    longest = max((row["tokens_train"] or 0 for row in rows), default=0)
    found = [row["tokens_train"] / row["seconds"] for row in rows if row["seconds"] and row["tokens_train"] == longest]
    return statistics.median(found) if found else None


def _at_largest_budget(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["test_loss"] for row in _largest(rows))


def _largest(rows: Sequence[Row]) -> list[Row]:
    longest = max((row["tokens_train"] or 0 for row in rows), default=0)
    return [row for row in rows if (row["tokens_train"] or 0) == longest]


def accuracies(found: Results) -> list[Measure]:
    """The suites that the models are scored on; without one, the first task."""
    own = {one.measure.name: one.measure for one in found.measured if one.measure.kind == "suite"}
    tasks = [one.measure for one in found.measured if one.measure.kind == "task"]
    return [*own.values()] or tasks[:1]


def accuracy_of(found: Results, measure: Measure, cells: Iterable[str]) -> float | None:
    """The mean over these runs; None if one of them was asked no questions."""
    records = [found.records[cell] for cell in cells]
    return statistics.fmean(map(measure.accuracy, records)) if all("tasks" in one for one in records) else None


def _accuracies(found: Results, rows: Sequence[Row]) -> dict[str, float | None]:
    cells = dict.fromkeys(row["cell"] for row in _largest(rows))
    return {f"accuracy of {one.name}": accuracy_of(found, one, cells) for one in accuracies(found)}


def _accuracy_columns(found: Results) -> list[Column]:
    return [number(f"accuracy, {one.name}", f"accuracy of {one.name}", "{:.1%}".format) for one in accuracies(found)]


def subject(row: Row) -> tuple[str, str | None, float | None, str]:
    """The arguments of ``label`` for a row of ``results.csv``."""
    return row["method"], row["pattern"], row["ratio"], row["objective"]


def exp(value: float) -> float:
    """The perplexity of a loss in nats; infinite on overflow."""
    return math.exp(value) if value < 700 else math.inf
