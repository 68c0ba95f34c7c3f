"""What the page says of verdicts and trends, as tables. Every number is one of ``Results``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.analysis.statistics import Difference
from megatron_prune.study.analysis.verdicts import Verdict, p_value
from megatron_prune.study.grid import SUBJECT
from megatron_prune.study.report import numbers
from megatron_prune.study.report.drawing import signed

Shown = list[dict[str, Any]]


def verdicts(found: Results) -> Shown:
    """Every verdict with its numbers, those of one comparison one below the other: its name and its rows."""
    groups: dict[str, Shown] = {}
    for verdict in found.verdicts:
        setting = numbers.setting(verdict.setting, verdict.against, verdict.sparse)
        groups.setdefault(f"{verdict.label}: {setting.lower()}", []).append(_verdict(verdict))
    return [{"name": name, "rows": rows} for name, rows in groups.items()]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    test, documents = verdict.test, verdict.documents
    return {
        "tokens": numbers.count(verdict.tokens),
        "pruned": numbers.loss(verdict.pruned["test"]),
        "scratch": numbers.loss(verdict.scratch["test"]),
        "gap": signed(test.mean, 4),
        "winner": verdict.winner,
        "interval": numbers.interval(test.low, test.high),
        "freedom": f"{test.freedom:.3g}" if test.freedom else numbers.DASH,
        "detectable": numbers.DASH if verdict.detectable is None else f"{verdict.detectable:.3f}",
        "edge": bool(verdict.edges),
        "p": _p(test.p),
        "corrected": _p(verdict.corrected),
        "effect": numbers.DASH if test.effect is None else signed(test.effect, 1),
        "documents": numbers.interval(documents.low, documents.high) if documents else numbers.DASH,
    }


def _p(value: float | None) -> str:
    return numbers.DASH if value is None else p_value(value).removeprefix("= ")


def trends(found: Results) -> Shown:
    """Every comparison over its budgets: who is ahead where, and its break-even."""
    shown = []
    for trend in found.trends:
        own = [v for v in found.verdicts if all(getattr(v, key) == getattr(trend, key) for key in SUBJECT)]
        own = sorted((v for v in own if v.tokens in trend.arms.tokens), key=lambda v: v.tokens)
        winners = [verdict.winner for verdict in own]
        shown.append(
            {
                "subject": trend.subject,
                "winner": winners[0] if len(set(winners)) == 1 else "neither",
                "budgets": _ahead(winners),
                "gaps": f"{_gap(own[0].test)} at {own[0].tokens:,} tokens, {_gap(own[-1].test)} at {own[-1].tokens:,}",
                "break_even": trend.break_even.words,
                "laws": trend.laws,
            }
        )
    return shown


def _ahead(winners: Sequence[str]) -> str:
    words = [
        f"{name} at {winners.count(winner)}"
        for winner, name in (("pruned", "pruned is ahead"), ("scratch", "scratch is ahead"), ("neither", "neither"))
        if winner in winners
    ]
    return f"{', '.join(words)} of {len(winners)} budgets"


def _gap(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return signed(difference.mean)
    return f"{signed(difference.mean)} {numbers.interval(difference.low, difference.high)}"
