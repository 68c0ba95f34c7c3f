"""``study plan``: every cell with what it will take, as a table."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.study import grid
from megatron_prune.study.commands import CORPORA
from megatron_prune.study.grid import calibration_cell, calibration_tokens, links, parent_cells, prunings, source_cell
from megatron_prune.study.outlook import Outlook
from megatron_prune.study.schema import Study


def show(
    study: Study, outlook: Outlook, console: Console, throughput: str | None, gpus: int | None, peak_tflops: float
) -> None:
    """Print the plan; with times where a ``throughput`` is stated (``outlay.Speed``)."""
    launch = study.launch
    gpus = launch.nproc * launch.parallel_cells if gpus is None else gpus
    if gpus < launch.nproc:
        raise UsageError("--gpus", got=gpus, expected=f"at least {launch.nproc}, the processes of launch.nproc")
    speed = None
    if throughput is not None:
        speed = Speed.parse(throughput, peak_tflops, gpus, outlook.source, study.data.seq_length)
    laid = outlook.estimated_grid(study)
    title = f"study {study.name}: {len(laid.cells)} training runs, {launch.nproc} process(es) each"
    console.print(_table(title, list(of_study(study, outlook)), speed, launch.nproc))
    for note in [*grid.notes(study), *left_to_know(study, outlook)]:
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
        _time(makespan(cells, seconds, speed.gpus // nproc) if speed else None),
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


# What a study will take: tokens, FLOPs, memory, storage and time of every cell, before anything runs.
#
# FLOPs are dense GEMMs (``checkpoint.layout``). Memory is that of the fullest pipeline stage: bytes a parameter for
# weights, gradients and Adam, and activations with flash attention and without recomputation by the formula that
# Megatron's ``theoretical_memory_usage`` takes from arXiv:2205.05198, table 2; for a real check there is the verb
# ``preflight``. Times are FLOPs, those of evaluation too, over a stated speed: no start-up, no data.


@dataclass(frozen=True)
class Outlay:
    """One cell; None where a search or an import has to be run before it can be known. Memory is of one rank."""

    cell: str
    samples: str = ""
    steps: int | None = None
    tokens: int | None = None
    flops: int | None = None
    evaluation: int = 0  # FLOPs more, which no account counts
    parameters: int | None = None
    memory: float | None = None  # bytes
    storage: float | None = None  # bytes, of what stays
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """FLOPs a second of one GPU (or process), and how many there are."""

    flops: float
    gpus: int

    @staticmethod
    def parse(throughput: str, peak_tflops: float, gpus: int, source: ModelShape | None, seq_length: int) -> Speed:
        """``40%`` of the peak, or tokens a second of one GPU on the parent's shape (others by their FLOPs)."""
        found = re.fullmatch(r"([0-9.]+)\s*(%?)", throughput)
        value = float(found[1]) if found and found[1].count(".") < 2 else 0
        if not value or (found and found[2] and value > 100):
            raise UsageError(
                "--throughput", got=throughput, expected="tokens per second and GPU, or an MFU such as 40%"
            )
        if found and found[2]:
            return Speed(value / 100 * peak_tflops * 1e12, gpus)
        if source is None:
            raise UsageError("--throughput", got=throughput, expected="an MFU such as 40%",
                             why="the parent's shape is not known before it is imported")  # fmt: skip
        return Speed(value * source.training_flops(seq_length) / seq_length, gpus)

    def seconds(self, outlay: Outlay, nproc: int) -> float | None:
        return None if outlay.flops is None else (outlay.flops + outlay.evaluation) / (self.flops * nproc)


def of_study(study: Study, outlook: Outlook) -> Iterator[Outlay]:
    """Every cell in the order in which they are run."""
    lay, seq_length = outlook.lay, outlook.lay.batch.seq_length
    retained = {"all": 1.0, "final": 1.0, "none": 0.0}[study.retention]

    def training(cell: str, samples: Any, shape: ModelShape | None, kept: float, after: tuple[str, ...]) -> Outlay:
        tokens = samples.steps * lay.batch.tokens
        if shape is None:
            return Outlay(cell, str(samples), samples.steps, tokens, after=after)
        saves = -(-samples.steps // (study.recipe.save_interval or samples.steps)) if study.retention == "all" else 1
        flops = shape.training_flops(seq_length) * samples.steps * lay.batch.samples
        storage = kept * saves * shape.parameters() * (14 if _half(study) else 12)
        return Outlay(
            cell, str(samples), samples.steps, tokens, flops, _evaluation(study, shape), shape.parameters(),
            memory(study, shape), storage, after,
        )  # fmt: skip

    for cell, _ in parent_cells(study):
        if study.parent.pretrain is not None:
            samples = lay.batch.range(0, lay.parent_end // lay.batch.samples)
            yield training(cell, samples, outlook.source, 1, ())
    runs = outlook.estimated_grid(study).cells
    between = {run.id: run for run in runs if run.kind == "retrained"}
    done = set()
    for link in links(study):
        if link.retraining_cell in between and link.retraining_cell not in done:
            run = between[link.retraining_cell]
            done.add(run.id)
            yield training(run.id, run.samples, outlook.targets.get(run.source.name), 1, (run.source.cell,))
        name = calibration_cell(study, link)
        before = outlook.targets.get(link.base.name) if link.base else outlook.source
        forward = before.forward_flops(study.calibration_seq_length) * study.calibration.sequences if before else None
        if outlook.needs[link.name].statistics and name not in done:
            done.add(name)
            after = (source_cell(study, link),)
            yield Outlay(name, tokens=calibration_tokens(study), flops=forward, after=after)
        yield _pruning(study, outlook, link)
    for run in runs:
        if run.id not in between:
            shape = outlook.targets.get(run.source.name)
            yield training(run.id, run.samples, shape, retained, (run.source.cell,))


def _pruning(study: Study, outlook: Outlook, link: Any) -> Outlay:
    shape, needs = outlook.targets.get(link.name), outlook.needs[link.name]
    before = outlook.targets.get(link.base.name) if link.base else outlook.source
    consumed = outlook.consumed(study)
    own = consumed[link.name] - (consumed[link.base.name] if link.base else 0)
    after = [source_cell(study, link)]
    after += [calibration_cell(study, link)] if needs.statistics else []
    storage = None if shape is None else shape.parameters() * (2 if _half(study) else 4)
    flops: int | None = 0
    if needs.text:  # once through every block; a Hessian costs more
        flops = before.forward_flops(study.calibration_seq_length) * study.calibration.sequences if before else None
    elif needs.scores:
        flops = None  # how many candidates there are is known when they are named
    parameters = None if shape is None else shape.parameters()
    return Outlay(
        link.cell, tokens=own, flops=flops, evaluation=_evaluation(study, shape), parameters=parameters,
        storage=storage, after=tuple(after),
    )  # fmt: skip


def _evaluation(study: Study, shape: ModelShape | None) -> int:
    """FLOPs of a cell's evaluation on all corpora; 0 while the shape is not known."""
    windows = study.evaluation.windows * len(CORPORA)
    return windows * shape.forward_flops(study.evaluation_seq_length) if shape else 0


def left_to_know(study: Study, outlook: Outlook) -> list[str]:
    """Why cells, or numbers, are missing from the plan."""
    missing = []
    if outlook.source is None:
        missing.append("the parent's shape is known when it has been imported")
    elif len(outlook.targets) < len(outlook.needs):
        missing.append("shapes that a search chooses are known when it has been run")
    flops = any(setting == "equal-flops" for entry in study.methods for setting, _ in study.compared(entry))
    if flops and len(outlook.spent) < len(prunings(study)):
        missing.append("scratch runs at equal FLOPs are estimates until the prunings have said what they spent")
    return missing


def memory(study: Study, shape: ModelShape) -> float:
    """Bytes of the fullest rank while it trains ``shape``."""
    launch, recipe = study.launch, study.recipe
    tp, pp, dp = launch.tensor_parallel, launch.pipeline_parallel, launch.data_parallel
    distributed = bool(recipe.arguments.get("use-distributed-optimizer"))
    bytes_each = (6 + 12 / dp if distributed else 18) if _half(study) else (8 + 8 / dp if distributed else 16)
    embeddings = shape.hidden_size * shape.padded_vocab_size * (1 if shape.tied else 2)
    blocks = (shape.parameters() - embeddings) / pp
    held = blocks + embeddings / (2 if pp > 1 and not shape.tied else 1)
    tokens = study.data.seq_length * recipe.micro_batch_size
    activations = tokens * shape.hidden_size * (18 + 4 * shape.ffn_hidden_size / shape.hidden_size) * shape.num_layers
    activations += tokens * (8 + shape.hidden_size) * pp
    if pp == 1:
        activations += 4 * tokens * (shape.hidden_size + shape.padded_vocab_size)
    return (held * bytes_each + activations) / tp


def _half(study: Study) -> bool:
    return bool(study.recipe.arguments.get("bf16") or study.recipe.arguments.get("fp16"))


def makespan(outlays: Sequence[Outlay], seconds: dict[str, float], slots: int) -> float:
    """Seconds from begin to end with ``slots`` cells at a time, each after what it needs, in the order given."""
    free = [0.0] * slots
    ended: dict[str, float] = {}
    for outlay in outlays:
        ready = max((ended.get(name, 0.0) for name in outlay.after), default=0.0)
        began = max(heapq.heappop(free), ready)
        ended[outlay.cell] = began + seconds.get(outlay.cell, 0.0)
        heapq.heappush(free, ended[outlay.cell])
    return max(ended.values(), default=0.0)
