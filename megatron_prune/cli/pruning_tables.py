"""What a pruning removes, as printed tables: of a plan (shapes, FLOPs, candidates, near-ties) and of masks."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prune import methods, screen
from megatron_prune.checkpoint.layout import HeterogeneousShape
from megatron_prune.methods import options
from megatron_prune.methods.base import DIMENSIONS
from megatron_prune.methods.ranking import Accuracy
from megatron_prune.structured.candidate import numbers_in_words
from megatron_prune.structured.judge import Scored, loss_text
from megatron_prune.structured.limits import in_words
from megatron_prune.structured.plan import PruningPlan
from megatron_prune.verbs import MODULES

SEQUENCE_LENGTH = 2048  # of the FLOPs in the table
LINES = 20  # of a search's candidates
_IN_LAYERS = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")  # in which layers may differ


def show_plan(made: PruningPlan, console: Console | None = None) -> None:
    """Print the plan as a table: shape, parameters and FLOPs before and after, and near-ties."""
    console = console or screen.console(width=110, highlight=False)
    source, target = made.source, made.target
    table = Table(title=f"{made.method}: plan for parent {made.parent[:16]}")
    for column in ("", "before", "after", "removed"):
        table.add_column(column, justify="left" if not column else "right")

    def row(label: str, before: int, after: int) -> None:
        table.add_row(label, f"{before:,}", f"{after:,}", f"{1 - after / before:.2%}" if after != before else "–")

    for field in DIMENSIONS:
        label, before = field.replace("_", " "), getattr(source, field)
        if field in _IN_LAYERS and any(isinstance(shape, HeterogeneousShape) for shape in (source, target)):
            means = [sum(getattr(layer, field) for layer in s.by_layer()) / s.num_layers for s in (source, target)]
            ranges = (source.range_of(field), target.range_of(field))
            table.add_row(f"{label}, by layer", *ranges, f"{1 - means[1] / means[0]:.2%}")
        else:
            row(label, before, getattr(target, field))
    table.add_section()
    row("linear weights", source.linear_parameters(), target.linear_parameters())
    row("all parameters", source.parameters(), target.parameters())
    row(
        f"forward FLOPs at {SEQUENCE_LENGTH}",
        source.forward_flops(SEQUENCE_LENGTH),
        target.forward_flops(SEQUENCE_LENGTH),
    )
    console.print(table)
    if isinstance(target, HeterogeneousShape):
        _show_layers(made, console)
    if target.num_layers < source.num_layers:
        gone = sorted(set(range(source.num_layers)) - set(made.kept_layers))
        console.print(f"removed layers: {', '.join(map(str, gone))}")
    asked = "" if made.ratio is None else f" (asked for: {made.ratio:.2%} of {made.ratio_of})"
    console.print(f"removed: {made.removed_linears:.2%} of linears, {made.removed_all:.2%} of all{asked}")
    if (time := made.latency) is not None:
        at = f"{time.device}, batch {time.batch}, prompt {time.prompt}; table {time.table[:16]}"
        console.print(f"predicted: {in_words(time.decode)} per step, prefill {in_words(time.prefill)} ({at})")
    if made.candidates:
        _show_candidates(made, console)
    if not made.near_ties:
        console.print("near-ties: none")
        return
    ties = Table(title=f"near-ties: {len(made.near_ties)} cuts that rounding could move (scores within 1e-5)")
    for column in ("unit", "layer", "group", "kept", "removed", "kept score", "removed score", "others"):
        ties.add_column(column, justify="right")
    for tie in made.near_ties[:20]:
        ties.add_row(
            tie.unit,
            *("–" if n is None else str(n) for n in (tie.layer, tie.group)),
            str(tie.kept),
            str(tie.removed),
            f"{tie.kept_score:.8g}",
            f"{tie.removed_score:.8g}",
            str(len(tie.others)),
        )
    console.print(ties)
    if len(made.near_ties) > 20:
        console.print(f"… and {len(made.near_ties) - 20} more, all in the plan")


def _show_layers(made: PruningPlan, console: Console) -> None:
    """The sizes of layers that differ; consecutive layers of one shape are one row."""
    table = Table(title="layers")
    for column in ("of the parent", *(size.replace("_", " ") for size in _IN_LAYERS)):
        table.add_column(column, justify="right")
    layers = list(zip(made.kept_layers, made.target.by_layer(), strict=True))
    for shape, run in itertools.groupby(layers, key=lambda one: one[1]):
        numbers = [number for number, _ in run]
        table.add_row(numbers_in_words(numbers), *(str(getattr(shape, size) or "none") for size in _IN_LAYERS))
    console.print(table)


def _show_candidates(made: PruningPlan, console: Console) -> None:
    """The candidates, best first: by the deciding metric, then by loss. Those without a finite loss are last."""
    method = methods.get(made.method)
    own = options.STRUCTURED[made.method].read(made.settings)
    search, task = method.search(own), method.task(own)
    # Tell the reader that shapes beyond the limit were not considered.
    searched = search is not None and not search.shapes
    full = search is not None and searched and len(made.candidates) == search.max_candidates
    halved = len({row.windows for row in made.candidates}) > 1
    limit = " (as many as --max-candidates allows)" if full else ""
    spent = made.calibration or {}
    by = "the loss without what they remove"
    if task:
        dense = Accuracy(**spent["scoring"]["task"]["dense"])
        by = f"{task.metric} on {task.path} ({dense.examples} examples; dense {dense.share:.4f})"
    if after := spent.get("retraining"):
        by = f"the loss of the best {after['candidates']} after {after['tokens'] // after['candidates']:,} tokens"
    table = Table(title=f"candidates: {len(made.candidates)}{limit}, by {by}")
    table.add_column("")
    table.add_column("candidate", no_wrap=True)
    columns = [task.metric] if task else ["retrained"] if after else []
    for column in ("parameters", *columns, *(["windows"] if halved else []), "loss", "above the best"):
        table.add_column(column, justify="right")

    def rank(item: tuple[int, Scored]) -> tuple[float, ...]:
        index, row = item
        after = row.retrained_loss
        lost = not math.isfinite(row.loss)
        return (-row.windows, lost, -(row.accuracy or 0.0), after is None, after or 0.0, row.loss, index)

    ranked = sorted(enumerate(made.candidates), key=rank)
    # Losses compare on the same windows. The best by loss is in all rounds of a search.
    best = dict(min((row for row in made.candidates), key=lambda row: (-row.windows, row.loss)).rounds or ())
    best.setdefault(0, min(row.loss for row in made.candidates))
    for index, row in ranked[:LINES] if searched else ranked:
        mark = "chosen" if index == made.chosen else ""
        decided = [f"{row.accuracy:.4f}"] if row.accuracy is not None else []
        if after:
            decided = ["–" if row.retrained_loss is None else loss_text(row.retrained_loss)]
        windows = [str(row.windows)] if halved else []
        losses = loss_text(row.loss), f"{row.loss - best[row.windows]:.5f}" if math.isfinite(row.loss) else "–"
        table.add_row(mark, row.candidate, f"{row.parameters:,}", *decided, *windows, *losses)
    console.print(table)
    if searched and len(ranked) > LINES:
        console.print(f"… and {len(ranked) - LINES} more, all in the plan")


def show_sparsity(table: dict[str, Any]) -> None:
    """Print what was removed, summed over layers."""
    sums: dict[str, list[Any]] = defaultdict(lambda: [0, 0, []])
    for row in table["matrices"]:
        found = sums[row["matrix"]]
        found[0] += row["removed"]
        found[1] += row["rows"] * row["inputs"]
        found[2] += [row["error"]] if row["error"] is not None else []
    printed = Table(title=f"{table['method']}, {table['pattern']}")
    for column in ("matrix", "weights", "removed", "relative error (mean, most)"):
        printed.add_column(column, justify="left" if column == "matrix" else "right")
    for name, (removed, size, errors) in sums.items():
        error = f"{sum(errors) / len(errors):.4f}, {max(errors):.4f}" if errors else "–"
        printed.add_row(name, f"{size:,}", f"{removed / size:.2%}", error)
    console = screen.console(width=110, highlight=False)
    console.print(printed)
    if "layer_ratios" in table:
        _show_layer_ratios(table["layer_ratios"], console)
    if searched := table.get("search"):
        console.print(
            f"search: loss {searched['loss']:.4f} on the calibration text, {searched['uniform']:.4f} with equal ratios "
            f"(masks of the dense model; {searched['generation']} generations)"
        )


def _show_layer_ratios(rows: list[dict[str, Any]], console: Console) -> None:
    """Print each layer's ratios, and the share of outliers where that decided them."""
    modules, counted = [m for m in MODULES if any(m in row["ratios"] for row in rows)], "outliers" in rows[0]
    printed = Table(title="ratios by layer")
    for column in ("layer", *(["outliers"] if counted else []), *modules):
        printed.add_column(column, justify="right")
    for row in rows:
        decided, ratios = [f"{row['outliers']:.4%}"] if counted else [], row["ratios"]
        printed.add_row(str(row["layer"]), *decided, *(f"{ratios[m]:.2%}" if m in ratios else "–" for m in modules))
    console.print(printed)
