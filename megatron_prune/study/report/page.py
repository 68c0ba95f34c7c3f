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
from megatron_prune.study import grid, schema
from megatron_prune.study.analysis import results
from megatron_prune.study.analysis import results as rows
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import label
from megatron_prune.study.pair import DIFFERS
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import bars, behind, budgets, curves, drawing, final, findings, numbers, ratios, tables

MOST_PENDING = 12  # named one by one


def write(found: Results, places: Places) -> Path:
    """Write the report's files; returns the page's path."""
    directory = places.root / "report"
    losses = {cell: places.losses(cell) for cell in found.records}
    if found.study.parent.load:
        losses["parent"] = places.beside_parent(found.study) / "losses.csv"
    made = (
        budgets.losses(found), bars.equal_total(found), budgets.gaps(found), ratios.gap_by_ratio(found),
        final.final_losses(found), curves.loss_curves(found, losses),
    )  # fmt: skip
    drawings = [figure for figure in made if figure]
    for figure in drawings:
        figure.write(directory / "figures")
    artifacts.write_json(directory / "results.json", results.to_json(found))
    artifacts.write_bytes(directory / "results.csv", table(found).encode())
    page = directory / "index.html"
    artifacts.write_bytes(page, render(found, drawings).encode())
    return page


def table(found: Results) -> str:
    """The rows as CSV; an unknown value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    return text.getvalue()


def render(found: Results, drawings: list[drawing.Drawing]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_prune.study.report", "."),
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
        sparse=any(method.sparse for method in found.study.methods),
        rows=tables.rows(found),
        table=findings.verdicts(found),
        trends=findings.trends(found),
        efficiency=tables.efficiency(found),
        family=max((verdict.family for verdict in found.verdicts), default=0),
        without=max((verdict.without for verdict in found.verdicts), default=0),
        one_parent=not found.study.parent_per_seed,
        bootstrapped=any(verdict.documents for verdict in found.verdicts),
        unigram=_unigram(parent),
        declared=bool(parent and parent["declared"]),
        sweeps=tables.sweeps(found),
        runs=tables.runs(found),
        matches=tables.matches(found),
        prunings=tables.prunings(found),
        seconds=tables.seconds(found),
        left_out=tables.left_out(found),
        configuration=yaml.safe_dump(schema.resolved(found.study), sort_keys=False),
        ran=found.ran,
    )


def _differences(found: Results) -> list[str]:
    """What compared runs were made with, where it was not the same."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for item in found.compared:
        for line in item.match:
            if line.verdict == DIFFERS:
                pair = f"{item.comparison.pruned} and {item.comparison.scratch}"
                seen.setdefault((line.field, str(line.pruned), str(line.scratch)), []).append(pair)
    return [
        f"Compared runs differ in {field}: {pruned} for pruned, {scratch} for scratch, in {len(pairs)} "
        f"comparison{'s' * (len(pairs) != 1)} ({pairs[0]}{', …' if len(pairs) > 1 else ''})."
        for (field, pruned, scratch), pairs in seen.items()
    ]


def _unigram(parent: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Nothing where the texts that were scored are not there any more."""
    losses = parent["unigram_loss"] if parent else {}
    return None if not losses or None in losses.values() else {name: f"{loss:.3f}" for name, loss in losses.items()}


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
    """What is to be known of the files and the parent; what has no verdict, and why; what of the study does not apply
    as it may seem to."""
    remarks = [f"Not believed: {said}." for said in found.disbelieved]
    if found.left_out:
        remarks.append(
            f"{len(found.left_out)} more finished in this folder and are not shown: the table “Not shown” has them, "
            "and comparisons between them count in the correction of p values."
        )
    remarks += [*behind.said(found), *_differences(found)]
    remarks += [f"{note}." for note in grid.notes(found.study)]
    pending = sum(item.status == "pending" for item in found.compared)
    if pending > MOST_PENDING:
        remarks.append(f"{pending} of {len(found.compared)} comparisons are not finished.")
    for item in found.compared:
        made = item.comparison
        setting = numbers.setting(made.setting, made.against, made.pruning.sparse)
        name = f"{setting}, {label(*made.pruning.subject)}, seed {made.seed}"
        if made.not_run:
            remarks.append(f"{name}: not run, since {made.not_run}.")
        elif item.status == "pending" and pending <= MOST_PENDING:
            remarks.append(f"{name}: not finished.")
    return remarks
