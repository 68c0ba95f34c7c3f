"""The report of a study: ``report/index.html`` in one file, ``results.json``, ``results.csv``, figures.

Every number on the page comes from ``Results``; formatting is all that happens here. The page holds
its figures and needs no network.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_prune import artifacts
from megatron_prune.report import curves, figures
from megatron_prune.study import config, grid, results
from megatron_prune.study.commands import Places
from megatron_prune.study.results import Results
from megatron_prune.study.verdicts import label

DASH = "–"


def write(found: Results, places: Places) -> Path:
    """Write the report's files; returns the page's path."""
    directory = places.root / "report"
    losses = {cell: places.losses(cell) for cell in found.records}
    if found.study.parent.load:
        losses["parent"] = places.parent(found.study) / "losses.csv"
    drawings = [drawing for drawing in (figures.final_losses(found), curves.loss_curves(found, losses)) if drawing]
    for drawing in drawings:
        drawing.write(directory / "figures")
    artifacts.write_json(directory / "results.json", results.to_json(found))
    artifacts.write_bytes(directory / "results.csv", table(found).encode())
    page = directory / "index.html"
    artifacts.write_bytes(page, render(found, drawings).encode())
    return page


def table(found: Results) -> str:
    """The rows as CSV; an unknown value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, results.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    return text.getvalue()


def render(found: Results, drawings: list[figures.Drawing]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_prune.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    parent = found.parent
    return environment.get_template("page.html.j2").render(
        name=found.study.name,
        summary=_summary(found),
        verdicts=found.verdicts,
        remarks=_remarks(found),
        figures=drawings,
        windows=f"{found.study.evaluation.windows:,}",
        several_seeds=len(found.study.seeds) > 1,
        sparse=any(method.pattern for method in found.study.methods),
        rows=_rows(found),
        unigram={name: f"{value:.3f}" for name, value in parent["unigram_loss"].items()} if parent else None,
        declared=bool(parent and parent["declared"]),
        runs=_runs(found),
        matches=_matches(found),
        prunings=_prunings(found),
        seconds=_seconds(found),
        configuration=yaml.safe_dump(config.resolved(found.study), sort_keys=False),
        versions=", ".join(f"{name} {version}" for name, version in artifacts.versions().items()),
    )


def _summary(found: Results) -> str:
    parent, study = found.parent, found.study
    if parent is None:
        return "The parent is not finished yet."
    tokens = "an unknown number of tokens" if parent["tokens"] is None else f"{parent['tokens']:,} tokens"
    seeds = "one seed" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
    declared = "declared to be " * parent["declared"]
    return (
        f"A parent of {parent['parameters']:,} parameters, {declared}trained on {tokens}, is pruned and trained on; "
        f"models of the same shapes are trained from random weights. {seeds.capitalize()}, "
        f"{study.recipe.global_batch_size} x {study.data.seq_length} tokens a step."
    )


def _remarks(found: Results) -> list[str]:
    """What has no verdict, and why; what of the study does not apply as it may seem to."""
    remarks = [f"{note}." for note in grid.notes(found.study)]
    for item in found.compared:
        made = item.comparison
        name = f"{_setting(made.setting, made.against, made.pruning.method.pattern)}, {label(*made.pruning.subject)}"
        name += f", seed {made.seed}"
        if made.not_run:
            remarks.append(f"{name}: not run, since {made.not_run}.")
        elif item.status == "pending":
            remarks.append(f"{name}: not finished.")
    return remarks


def _rows(found: Results) -> list[dict[str, Any]]:
    shown = []
    for row, gap in zip(found.rows, _gaps(found), strict=True):
        shown.append(
            {
                "cell": row["cell"],
                "arm": row["arm"],
                "setting": row["setting"],
                "against": row["against"],
                "shown_setting": _setting(row["setting"], row["against"], row["pattern"]),
                "method": label(row["method"], row["pattern"], row["ratio"]) if row["method"] else "",
                "status": row["status"],
                "seed": DASH if row["seed"] is None else row["seed"],
                "params": _count(row["params"]),
                "nonzero": _count(row["params_nonzero"]),
                "loss_initial": _loss(row["loss_initial"]),
                "validation_loss": _loss(row["validation_loss"]),
                "test_loss": _loss(row["test_loss"]),
                "gap": "" if gap is None else f"{gap:+.4f}",
                "winner": "" if not gap else "pruned" if gap > 0 else "scratch",
                "first": row["arm"] == "pruned",
            }
        )
    return shown


def _gaps(found: Results) -> list[float | None]:
    """Scratch minus pruned on test, on the scratch row of every finished comparison."""
    gaps: list[float | None] = []
    pruned: Mapping[str, Any] = {}
    for row in found.rows:
        if row["arm"] == "pruned":
            pruned = row
        finished = row["arm"] == "scratch" and row["status"] == "finished" and pruned["status"] == "finished"
        gaps.append(row["test_loss"] - pruned["test_loss"] if finished else None)
    return gaps


def _runs(found: Results) -> list[dict[str, Any]]:
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
                "range": DASH if first is None else f"{first:,} to {end:,}",
                "steps": _count(record.get("steps")),
                "tokens": _count(record["tokens"]),
                "tokens_total": _count(row["tokens_total"]),
                "flops": _flops(record["flops"]),
                "flops_total": _flops(row["flops_total"]),
                "flops_theoretical": _flops(row["flops_train_theoretical"]),
                "seconds": DASH if row["seconds"] is None else f"{row['seconds']:,.1f}",
            }
        )
    return shown


def _matches(found: Results) -> list[dict[str, Any]]:
    shown = []
    for item in found.compared:
        made = item.comparison
        same = sum(line.verdict == "equal" for line in item.match)
        note = f"{same} lines equal, {len(item.match) - same} as allowed" if item.match else item.status
        shown.append(
            {
                "setting": _setting(made.setting, made.against, made.pruning.method.pattern),
                "method": label(*made.pruning.subject),
                "seed": made.seed,
                "pruned": made.pruned,
                "scratch": made.scratch,
                "note": note,
                "lines": item.match,
            }
        )
    return shown


def _prunings(found: Results) -> list[dict[str, Any]]:
    return [
        {
            "cell": record["cell"],
            "shape": record["shape"],
            "removed_linears": f"{record['removed_linears']:.2%}",
            "removed_all": f"{record['removed_all']:.2%}",
            "near_ties": _count(record["near_ties"]),
            "validation_loss": _loss(record["validation_loss"]),
            "test_loss": _loss(record["test_loss"]),
        }
        for record in found.records.values()
        if record["kind"] == "pruning"
    ]


def _seconds(found: Results) -> list[dict[str, Any]]:
    return [
        {
            "cell": cell,
            "stages": ", ".join(f"{stage} {value:.1f}" for stage, value in record["seconds"].items()),
            "together": f"{sum(record['seconds'].values()):.1f}",
        }
        for cell, record in found.records.items()
    ]


def _setting(setting: str | None, against: str | None, pattern: str | None) -> str:
    """A comparison's setting for people; a dense scratch run is the rule where pruning made the shape smaller."""
    if setting is None:
        return ""
    return figures.SETTINGS[setting] + ", dense scratch" * (pattern is not None and against == "dense")


def _loss(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def _count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _flops(value: float | None) -> str:
    return DASH if value is None else f"{value:.3e}"
