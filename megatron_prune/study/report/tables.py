"""The tables of the page but for its findings: what is shown of ``Results``, formatted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import label
from megatron_prune.study.report import numbers

Shown = list[dict[str, Any]]


def rows(found: Results) -> Shown:
    shown = []
    sparse = {item.comparison.pruning.subject for item in found.compared if item.comparison.pruning.sparse}
    for row, gap in zip(found.rows, gaps(found), strict=True):
        shown.append(
            {
                "cell": row["cell"],
                "arm": row["arm"],
                "setting": row["setting"],
                "against": row["against"],
                "shown_setting": numbers.setting(row["setting"], row["against"], _subject(row) in sparse),
                "method": label(*_subject(row)) if row["method"] else "",
                "status": row["status"],
                "seed": numbers.DASH if row["seed"] is None else row["seed"],
                "params": numbers.count(row["params"]),
                "nonzero": numbers.count(row["params_nonzero"]),
                "loss_initial": numbers.loss(row["loss_initial"]),
                "validation_loss": numbers.loss(row["validation_loss"]),
                "test_loss": numbers.loss(row["test_loss"]),
                "gap": "" if gap is None else f"{gap:+.4f}",
                "winner": "" if not gap else "pruned" if gap > 0 else "scratch",
                "first": row["arm"] == "pruned",
            }
        )
    return shown


def _subject(row: Mapping[str, Any]) -> tuple[str, str | None, float | None]:
    return row["method"], row["pattern"], row["ratio"]


def gaps(found: Results) -> list[float | None]:
    """Scratch minus pruned on test, on the scratch row of every finished comparison."""
    values: list[float | None] = []
    pruned: Mapping[str, Any] = {}
    for row in found.rows:
        if row["arm"] == "pruned":
            pruned = row
        finished = row["arm"] == "scratch" and row["status"] == "finished" and pruned["status"] == "finished"
        values.append(row["test_loss"] - pruned["test_loss"] if finished else None)
    return values


def runs(found: Results) -> Shown:
    """Every trained run once, with what lies behind it."""
    behind = {row["cell"]: row for row in found.rows if row["status"] == "finished"}
    shown = []
    for cell, row in behind.items():
        record = found.records[cell]
        first, end = record.get("range", (None, None))
        shown.append(
            {
                "arm": row["arm"],
                "cell": cell,
                "range": numbers.DASH if first is None else f"{first:,} to {end:,}",
                "steps": numbers.count(record.get("steps")),
                "tokens": numbers.count(record["tokens"]),
                "tokens_total": numbers.count(row["tokens_total"]),
                "flops": numbers.flops(record["flops"]),
                "flops_total": numbers.flops(row["flops_total"]),
                "flops_theoretical": numbers.flops(row["flops_train_theoretical"]),
                "spikes": numbers.count(row["loss_spikes"]),
                "not_finite": numbers.count(row["losses_not_finite"]),
                "seconds": numbers.DASH if row["seconds"] is None else f"{row['seconds']:,.1f}",
            }
        )
    return shown


def matches(found: Results) -> Shown:
    shown = []
    for item in found.compared:
        made = item.comparison
        same = sum(line.verdict == "equal" for line in item.match)
        note = f"{same} lines equal, {len(item.match) - same} as allowed" if item.match else item.status
        shown.append(
            {
                "setting": numbers.setting(made.setting, made.against, made.pruning.sparse),
                "method": label(*made.pruning.subject),
                "seed": made.seed,
                "pruned": made.pruned,
                "scratch": made.scratch,
                "note": note,
                "lines": item.match,
            }
        )
    return shown


def prunings(found: Results) -> Shown:
    return [
        {
            "cell": record["cell"],
            "shape": record["shape"],
            "removed_linears": f"{record['removed_linears']:.2%}",
            "removed_all": f"{record['removed_all']:.2%}",
            "near_ties": numbers.count(record["near_ties"]),
            "validation_loss": numbers.loss(record["validation_loss"]),
            "test_loss": numbers.loss(record["test_loss"]),
        }
        for record in found.records.values()
        if record["kind"] == "pruning"
    ]


def left_out(found: Results) -> Shown:
    """Runs that were finished in the folder and that the study does not ask for."""
    return [
        {
            "cell": one.cell,
            "why": one.why,
            "validation_loss": numbers.loss(one.record.get("validation_loss")),
            "test_loss": numbers.loss(one.record.get("test_loss")),
        }
        for one in found.left_out
    ]


def seconds(found: Results) -> Shown:
    return [
        {
            "cell": cell,
            "stages": ", ".join(f"{stage} {value:.1f}" for stage, value in record["seconds"].items()),
            "together": f"{sum(record['seconds'].values()):.1f}",
        }
        for cell, record in found.records.items()
    ]


def efficiency(found: Results) -> Shown:
    """What each model costs, the parent first: size, FLOPs a token, measured speed of training."""
    finished = [row for row in found.rows if row["status"] == "finished" and row["arm"] in ("parent", "pruned")]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in finished:
        name = "parent" if row["arm"] == "parent" else label(*_subject(row))
        groups.setdefault(name, []).append(row)
    return [
        {
            "model": name,
            "params": numbers.span([row["params"] for row in own], numbers.count),
            "nonzero": numbers.span([row["params_nonzero"] for row in own], numbers.count),
            "linears": numbers.span([row["removed_linears"] for row in own], lambda value: f"{value:.1%}"),
            "all": numbers.span([row["removed_all"] for row in own], lambda value: f"{value:.1%}"),
            "flops": numbers.span([_per_token(row, "flops_train") for row in own], numbers.flops),
            "kept": numbers.span([_per_token(row, "flops_train_theoretical") for row in own], numbers.flops),
            "speed": _speed(own),
            "loss": _best(own),
        }
        for name, own in groups.items()
    ]


def sweeps(found: Results) -> Shown:
    """Learning rates of every arm, with the one that stands for it."""
    return [
        {
            "arm": f"{one.arm}, {label(one.method, one.pattern, one.ratio)}",
            "setting": numbers.setting(one.setting, one.against, one.sparse) if one.setting else "all",
            "budget": numbers.count(one.budget),
            "rates": ", ".join(f"{rate:g}: {numbers.loss(loss)}" for rate, loss in one.validation.items()),
            "chosen": numbers.DASH if one.chosen is None else f"{one.chosen:g}",
            "edge": "" if one.edge is None else f"the {one.edge.end}: add {one.edge.add:g}",
        }
        for one in found.sweeps
    ]


def _per_token(row: Mapping[str, Any], key: str) -> float | None:
    done = row[key] if row[key] is not None else row["flops_total"] if row["arm"] == "parent" else None
    return done / row["tokens_train"] if done and row["tokens_train"] else None


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tokens trained on a second of the longest runs, all attempts at them taken together; their median."""
    longest = max((row["tokens_train"] or 0 for row in rows), default=0)
    found = [row["tokens_train"] / row["seconds"] for row in rows if row["seconds"] and row["tokens_train"] == longest]
    return f"{statistics.median(found):,.0f}" if found else numbers.DASH


def _best(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean test loss at the largest budget."""
    longest = max((row["tokens_train"] or 0 for row in rows), default=0)
    return numbers.loss(statistics.fmean(row["test_loss"] for row in rows if (row["tokens_train"] or 0) == longest))
