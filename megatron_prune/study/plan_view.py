"""``study plan``: every cell with what it will take, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_prune.errors import UsageError
from megatron_prune.study import grid, outlay
from megatron_prune.study.config import Study
from megatron_prune.study.outlay import Outlay, Speed
from megatron_prune.study.preflight import Outlook


def show(
    study: Study, outlook: Outlook, console: Console, throughput: str | None, gpus: int | None, peak_tflops: float
) -> None:
    """Print the plan; with times where a ``throughput`` is stated (``outlay.Speed``)."""
    launch = study.launch
    gpus = launch.nproc * launch.parallel_cells if gpus is None else gpus
    if gpus < launch.nproc:
        raise UsageError("--gpus", given=gpus, allowed=f"at least launch.nproc = {launch.nproc}")
    speed = None
    if throughput is not None:
        speed = Speed.parse(throughput, peak_tflops, gpus, outlook.source, study.data.seq_length)
    laid = outlook.estimated_grid(study)
    title = f"study {study.name}: {len(laid.cells)} training runs, {launch.nproc} process(es) each"
    console.print(_table(title, list(outlay.of_study(study, outlook)), speed, launch.nproc))
    for note in [*grid.notes(study), *outlay.left_to_know(study, outlook)]:
        console.print(note)
    for comparison in laid.comparisons:
        if comparison.not_run:
            console.print(f"not run: {comparison.setting} for {comparison.pruned}: {comparison.not_run}")


def _table(title: str, cells: Sequence[Outlay], speed: Speed | None, nproc: int) -> Table:
    table = Table(title=title)
    for column in "cell samples steps tokens FLOPs parameters memory storage time".split():
        table.add_column(column, justify="left" if column == "cell" else "right", no_wrap=True)
    seconds: dict[str, float] = {}
    for one in cells:
        took = speed.seconds(one, nproc) if speed else None
        seconds |= {one.cell: took} if took is not None else {}
        flops = "not known yet" if one.flops is None else f"{one.flops:.3e}" if one.flops else ""
        table.add_row(
            one.cell, one.samples, _count(one.steps), _count(one.tokens), flops, _count(one.parameters),
            _size(one.memory), _size(one.storage), _time(took),
        )  # fmt: skip
    table.add_section()
    table.add_row(
        f"together on {speed.gpus} GPUs" if speed else "together",
        "",
        "",
        _count(sum(one.tokens or 0 for one in cells)),
        f"{sum(one.flops or 0 for one in cells):.3e}",
        "",
        _size(max(one.memory or 0 for one in cells)),
        _size(sum(one.storage or 0 for one in cells)),
        _time(outlay.makespan(cells, seconds, speed.gpus // nproc) if speed else None),
    )
    return table


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _size(value: float | None) -> str:
    if not value:
        return ""
    return f"{value / 1e9:,.1f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
