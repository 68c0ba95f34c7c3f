"""The appendix tables of a report: runs, rates, prunings, accounts, matches, time, and runs that are not shown.

Runs have short names; the cell's full name is in the CSV files and shown on hover.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_prune.study.analysis.measures import Measure
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import label
from megatron_prune.study.report.tables import SETTINGS, exp, measured, of_measures, setting_name, subject
from megatron_prune.study.report.tabular import (
    DASH,
    Column,
    Row,
    Table,
    amount,
    count,
    flops,
    loss,
    number,
    perplexity,
    signed,
    words,
)


def every(found: Results) -> list[Table]:
    """All appendix tables that are not empty."""
    made = [
        rows(found),
        sweeps(found),
        prunings(found),
        tasks(found),
        scores(found),
        accounts(found),
        matches(found),
        seconds(found),
        left_out(found),
    ]
    return [table for table in made if table.rows]


def rows(found: Results) -> Table:
    """Both sides of every comparison."""
    sparse = {item.comparison.subject for item in found.compared if item.comparison.pruning.sparse}
    shown = []
    for row, gap in zip(found.rows, gaps(found), strict=True):
        setting = setting_name(row["setting"], row["against"], subject(row) in sparse)
        finished = row["status"] == "finished"
        shown.append({
            **row, "gap": gap, "shown_setting": setting, "first": row["arm"] == "pruned",
            "shown_method": label(*subject(row)) if row["method"] else "",
            "shown_arm": row["arm"] if finished else f"{row['arm']} ({row['status']})",
            "perplexity": None if row["test_loss"] is None else exp(row["test_loss"]),
        })  # fmt: skip
    columns = [
        words("setting", "shown_setting", data={"setting": "setting", "against": "against"}),
        words("method", "shown_method", data={name: name for name in ("method", "pattern", "ratio", "objective")}),
        words("arm", "shown_arm", hover="cell", data={"arm": "arm", "status": "status", "cell": "cell"}),
        number("seed", "seed", str), number("parameters", "params", count),
        *([number("not zero", "params_nonzero", count)] if sparse else []),
        number("first step", "loss_initial", loss), number("validation", "validation_loss", loss),
        number("test", "test_loss", loss), number("perplexity", "perplexity", perplexity),
        Column("gap", lambda row: "" if row["gap"] is None else signed(row["gap"], 4), {"gap": "gap"}),
    ]  # fmt: skip
    caption = (
        f"Losses in nats per token on {found.study.evaluation.windows:,} fixed windows of each corpus; the first "
        "step's on its own batch, before any update. The perplexity is the test loss's. The gap is scratch minus "
        f"pruned on test{', seed by seed' if len(found.study.seeds) > 1 else ''}. A run of two "
        "comparisons has a row in each."
    )
    return Table("rows", caption, columns, shown)


def gaps(found: Results) -> list[float | None]:
    """Scratch minus pruned on test, on the scratch row of every finished comparison."""
    values: list[float | None] = []
    pruned: Row = {}
    for row in found.rows:
        if row["arm"] == "pruned":
            pruned = row
        finished = row["arm"] == "scratch" and row["status"] == "finished" and pruned["status"] == "finished"
        values.append(row["test_loss"] - pruned["test_loss"] if finished else None)
    return values


def short_names(found: Results) -> dict[str, str]:
    """A short name for every cell, with only as much of budget, seed and rate as makes it unique.

    ``shortgpt 50%``, ``as shortgpt 50%, equal total``, ``dense, equal training``; cells whose short names collide keep
    their own.
    """
    study = found.study
    names: dict[str, str] = {}

    def mark(tokens: int | None, seed: int, record: Mapping[str, Any]) -> str:
        parts = [amount(tokens)] if tokens is not None and len(study.budgets) > 1 else []
        parts += [f"seed {seed}"] if len(study.seeds) > 1 else []
        parts += [f"lr {record['lr']:g}"] if len(study.recipe.rates) > 1 and record.get("lr") is not None else []
        return "".join(f", {part}" for part in parts)

    for item in found.compared:
        made = item.comparison
        pruning = label(*made.pruning.subject).replace("% removed", "%").replace(",", "")
        distilled = " distilled" * (made.objective == "distill")
        own = pruning + distilled
        of = f"as {own}"
        if made.pruning.sparse:
            of = f"dense{distilled}" if made.against == "dense" else f"masks of {own}"
        setting = SETTINGS[made.setting].replace(" tokens", "").lower()
        for _, pruned, scratch in made.runs:
            names.setdefault(pruned, own + mark(item.tokens, made.seed, found.records.get(pruned, {})))
            if scratch is not None:
                record = found.records.get(scratch, {})
                names.setdefault(scratch, f"{of}, {setting}{mark(item.tokens, made.seed, record)}")
        names.setdefault(made.pruning.cell, pruning + mark(None, made.seed, {}))
    for cell in found.records:
        names.setdefault(cell, cell)
    # A pruning and its retraining are in separate tables and may share a name.
    used = Counter((name, _kind(cell)) for cell, name in names.items())
    return {cell: name if used[name, _kind(cell)] == 1 else cell for cell, name in names.items()}


def _kind(cell: str) -> str:
    return cell.split("-")[0]


def accounts(found: Results) -> Table:
    """Every trained run once, with its history."""
    behind = {row["cell"]: row for row in found.rows if row["status"] == "finished"}
    short = short_names(found)
    shown = []
    for cell, row in behind.items():
        record = found.records[cell]
        first, end = record.get("range", (None, None))
        shown.append({
            **row, "run": short[cell], "first_sample": first, "end_sample": end, "steps": record.get("steps"),
            "tokens_train": record["tokens"], "flops_train": record["flops"],
            "flops_teacher": record.get("flops_teacher"),
        })  # fmt: skip

    def samples(row: Row) -> str:
        return DASH if row["first_sample"] is None else f"{row['first_sample']:,} to {row['end_sample']:,}"

    sparse = any(item.comparison.pruning.sparse for item in found.compared)
    columns = [
        words("arm", "arm"), words("run", "run", wrap=True, hover="cell", data={"cell": "cell"}),
        Column("samples", samples, {"first_sample": "first_sample", "end_sample": "end_sample"}),
        number("steps", "steps", count), number("tokens trained", "tokens_train", count),
        number("tokens behind", "tokens_total", count), number("FLOPs trained", "flops_train", flops),
        *([number("FLOPs of its teacher", "flops_teacher", flops)] if "distill" in found.study.objectives else []),
        number("FLOPs behind", "flops_total", flops),
        *([number("FLOPs of kept weights", "flops_train_theoretical", flops)] if sparse else []),
        number("loss spikes", "loss_spikes", count), number("losses not finite", "losses_not_finite", count),
        number("seconds", "seconds", lambda value: f"{value:,.1f}"),
    ]  # fmt: skip
    declared = bool(found.parent and found.parent["declared"])
    caption = (
        "Trained: by this run. Behind: everything that the model has seen, its parent and its pruning included"
        f"{'; the tokens of the parent are declared by its authors, not measured' * declared}. FLOPs: dense matrix "
        f"products that were executed{', masks or not; of kept weights: without the removed ones' * sparse}."
    )
    return Table("account", caption, columns, shown)


def matches(found: Results) -> Table:
    """The match of every comparison; its lines are in ``results.json`` and on the page."""
    shown = []
    for item in found.compared:
        made = item.comparison
        same = sum(line.verdict == "equal" for line in item.match)
        shown.append({
            "setting": setting_name(made.setting, made.against, made.pruning.sparse), "seed": made.seed,
            "method": label(*made.subject), "tokens": item.tokens, "status": item.status, "equal": same,
            "allowed": len(item.match) - same, "pruned": made.pruned, "scratch": made.scratch, "lines": item.match,
        })  # fmt: skip
    columns = [
        words("setting", "setting"), words("method", "method"), number("seed", "seed", str),
        number("tokens of retraining", "tokens", count), words("status", "status"),
        number("lines equal", "equal", count), number("different as allowed", "allowed", count),
    ]  # fmt: skip
    caption = "Two runs are compared only after their accounts have matched, line by line."
    return Table("matches", caption, columns, shown)


def prunings(found: Results) -> Table:
    short = short_names(found)
    shown = [
        {**record, "pruning": short[record["cell"]], "perplexity": exp(record["test_loss"])}
        for record in found.records.values()
        if record["kind"] == "pruning"
    ]
    columns = [
        words("pruning", "pruning", hover="cell", data={"cell": "cell"}), words("shape", "shape"),
        number("of linears removed", "removed_linears", lambda value: f"{value:.2%}"),
        number("of all removed", "removed_all", lambda value: f"{value:.2%}"), number("near-ties", "near_ties", count),
        number("validation", "validation_loss", loss), number("test", "test_loss", loss),
        number("perplexity", "perplexity", perplexity),
    ]  # fmt: skip
    caption = (
        "The losses are of the pruned checkpoint before any retraining, on the same windows; the perplexity is of test."
    )
    return Table("prunings", caption, columns, shown)


def tasks(found: Results) -> Table:
    """Every comparison on the single tasks of suites."""
    shown = {row["measure"] for row in measured(found).rows}
    return of_measures("tasks", [one for one in found.measured if one.measure.title not in shown])


def scores(found: Results) -> Table:
    """Every evaluated model on further corpora and tasks: the parent, starts before retraining, and trained runs."""
    short = short_names(found)
    measures = list({(one.measure.kind, one.measure.name): one.measure for one in found.measured}.values())
    shown = []
    for cell, record in found.records.items():
        if "corpora" in record or "tasks" in record:
            before = " before retraining" * (record["kind"] == "pruning")
            values = {f"{one.kind}:{one.name}": measured_value(one, record) for one in measures}
            shown.append({"cell": cell, "run": short[cell] + before, **values})
    columns = [words("model", "run", wrap=True, hover="cell", data={"cell": "cell"})]
    for one in measures:
        head = f"{one.name}{', perplexity' if one.kind == 'corpus' else ''}"
        columns.append(number(head, f"{one.kind}:{one.name}", perplexity if one.kind == "corpus" else accuracy))
    caption = "Perplexities, and accuracies in percent of the questions, of every model that was evaluated."
    return Table("scores", caption, columns, shown)


def measured_value(measure: Measure, record: Mapping[str, Any]) -> float:
    """A perplexity, or an accuracy."""
    if measure.kind == "corpus":
        return exp(record["corpora"][measure.name])
    return measure.accuracy(record)


def accuracy(value: float) -> str:
    return f"{100 * value:.1f}"


def left_out(found: Results) -> Table:
    """Finished runs in the folder that the study does not ask for."""
    shown = [
        {"cell": one.cell, "why": one.why, **{key: one.record.get(key) for key in ("validation_loss", "test_loss")}}
        for one in found.left_out
    ]
    columns = [words("cell", "cell", wrap=True), words("why", "why", wrap=True),
               number("validation", "validation_loss", loss), number("test", "test_loss", loss)]  # fmt: skip
    caption = "What was finished in the study's folder and has no place in the study as it is now."
    return Table("left-out", caption, columns, shown)


def seconds(found: Results) -> Table:
    short = short_names(found)
    shown = [
        {"cell": cell, "run": short[cell], "kind": record["kind"], "together": sum(record["seconds"].values()),
         "stages": ", ".join(f"{stage} {value:.1f}" for stage, value in record["seconds"].items())}
        for cell, record in found.records.items()
    ]  # fmt: skip
    columns = [
        words("kind", "kind"), words("cell", "run", wrap=True, hover="cell", data={"cell": "cell"}),
        words("stages", "stages", wrap=True), number("together", "together", lambda value: f"{value:.1f}"),
    ]  # fmt: skip
    return Table(
        "seconds", "Seconds of every stage, start-up included; cells may have run side by side.", columns, shown
    )


def sweeps(found: Results) -> Table:
    """Learning rates of every arm, with the chosen one."""
    shown = [
        {
            "arm": f"{one.arm}, {label(one.method, one.pattern, one.ratio, one.objective)}",
            "setting": setting_name(one.setting, one.against, one.sparse) if one.setting else "all",
            "budget": one.budget,
            "rates": ", ".join(
                f"{rate:g}: {DASH if value is None else loss(value)}" for rate, value in one.validation.items()
            ),
            "chosen": one.chosen,
            "edge": "" if one.edge is None else f"the {one.edge.end}: add {one.edge.add:g}",
        }
        for one in found.sweeps
    ]  # fmt: skip
    columns = [
        words("arm", "arm"), words("setting", "setting"), number("budget", "budget", count),
        words("rate: validation loss", "rates", wrap=True), number("chosen", "chosen", lambda value: f"{value:g}"),
        words("at an end", "edge"),
    ]  # fmt: skip
    caption = (
        "Mean validation loss at every rate. Each arm had the same rates, seeds and tokens; the lowest stands for it, "
        "and test losses had no say."
    )
    return Table("sweeps", caption, columns, shown)
