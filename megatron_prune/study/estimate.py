"""``study plan``: the cost of a study before anything runs, as a table of its cells.

Tokens, FLOPs (dense GEMMs: ``checkpoint.layout``), memory (of the fullest rank, by a dry run and the formula of
``preflight``), storage, and time (all FLOPs over a given speed, without start-up and data loading).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from megatron_prune import verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.study import commands, grid, jobs, questions
from megatron_prune.study.outlook import Outlook
from megatron_prune.study.prunings import (
    Places,
    Pruning,
    calibration_cell,
    calibration_tokens,
    learning_batch,
    links,
    parent_cell,
    parent_cells,
    prunings,
    reads_gradients,
    source_cell,
)
from megatron_prune.study.rank_memory import Verb, is_taught_online, memory
from megatron_prune.study.schema import StudyConfig
from megatron_prune.training import batch_flags, teacher_cache


class Prices(Protocol):
    """Seconds of a cell on one of ``gpus`` processes: ``Speed``, or ``throughput.Measured``."""

    @property
    def gpus(self) -> int: ...

    def seconds(self, estimate: Estimate, nproc: int) -> float | None: ...


def show(
    study: StudyConfig,
    places: Places,
    outlook: Outlook,
    trainers: Mapping[str, Verb],
    console: Console,
    speed: Prices | None,
) -> None:
    """Print the plan: memory by dry runs of the verbs that train, ``trainers`` by name; times by ``speed``."""
    launch = study.launch
    outlook, uncounted = with_questions(study, outlook)
    laid = outlook.estimated_grid(study)
    title = f"study {study.name}: {len(laid.cells)} training runs, {launch.nproc} process(es) each"
    sizes, unknown = memory(study, places, outlook, trainers)
    estimates = [replace(one, memory=sizes.get(one.cell)) for one in of_study(study, outlook)]
    console.print(_table(title, estimates, speed, launch.nproc))
    priced = _price_of_evaluation(study, outlook, estimates)
    for note in [*grid.notes(study), *outlook.assumed, *left_to_know(study, outlook), *uncounted, priced, *unknown]:
        console.print(note)
    for comparison in laid.comparisons:
        if comparison.not_run:
            console.print(f"not run: {comparison.setting} for {comparison.pruned}: {comparison.not_run}")


def _table(title: str, cells: Sequence[Estimate], speed: Prices | None, nproc: int) -> Table:
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


@dataclass(frozen=True)
class Estimate:
    """The cost of one cell; None if a search or an import must run first. Memory is per rank."""

    cell: str
    samples: str = ""
    steps: int | None = None
    tokens: int | None = None
    flops: int | None = None
    evaluation: int = 0  # FLOPs of evaluation, which accounts do not count
    parameters: int | None = None
    memory: int | None = None  # bytes, from ``memory``
    storage: float | None = None  # bytes that remain
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """FLOPs per second per GPU (or process), and the number of GPUs."""

    flops: float
    gpus: int

    @staticmethod
    def parse(throughput: str, peak_tflops: float, gpus: int, source: ModelShape | None, seq_length: int) -> Speed:
        """Parse ``40%`` of the peak, or tokens per second per GPU on the parent's shape (others scale by FLOPs)."""
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

    def seconds(self, estimate: Estimate, nproc: int) -> float | None:
        return None if estimate.flops is None else (estimate.flops + estimate.evaluation) / (self.flops * nproc)


def of_study(study: StudyConfig, outlook: Outlook) -> Iterator[Estimate]:
    """Every cell, in the order of running."""
    lay, seq_length = outlook.lay, outlook.lay.batch.seq_length
    retained = {"all": 1.0, "final": 1.0, "none": 0.0}[study.retention]

    def training(cell: str, samples: Any, shape: ModelShape | None, kept: float, after: tuple[str, ...]) -> Estimate:
        tokens = samples.steps * lay.batch.tokens
        if shape is None:
            return Estimate(cell, str(samples), samples.steps, tokens, after=after)
        saves = -(-samples.steps // (study.recipe.save_interval or samples.steps)) if study.retention == "all" else 1
        flops = shape.training_flops(seq_length) * samples.steps * lay.batch.samples
        stored = kept * saves * shape.parameters() * (14 if _half(study) else 12)
        return Estimate(
            cell, str(samples), samples.steps, tokens, flops, _evaluation(study, outlook, shape), shape.parameters(),
            storage=stored, after=after,
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
        flops = None
        if before is not None:
            one = before.training_flops if reads_gradients(link) else before.forward_flops
            flops = one(study.calibration_seq_length) * study.calibration.sequences
        if outlook.needs[link.name].statistics and name not in done:
            done.add(name)
            after = (source_cell(study, link),)
            yield Estimate(name, tokens=calibration_tokens(study), flops=flops, after=after)
        yield _pruning(study, outlook, link)
    yield from _teachings(study, outlook)
    for run in runs:
        if run.id not in between:
            shape = outlook.targets.get(run.source.name)
            free = shape is not None and commands.needs_no_pruning(study, run)
            made = training(run.id, run.samples, shape, retained, jobs.needed(study, run, run.source, free=free))
            if is_taught_online(run) and made.flops is not None:  # its parent's shape is known too
                made = replace(made, flops=made.flops + (outlook.teacher or 0) * run.samples.steps * lay.batch.samples)
            yield replace(made, evaluation=made.evaluation + _measuring(study, run, shape))


def _teachings(study: StudyConfig, outlook: Outlook) -> Iterator[Estimate]:
    """What teachers write: their forward pass once, and the bytes of the caches, which all runs share."""
    batch = outlook.lay.batch
    for made in outlook.estimated_grid(study).teachings:
        samples = made.samples.end - made.samples.start
        flops, stored = None, None
        if outlook.source is not None:
            settings = study.distillation
            each = teacher_cache.bytes_per_token(
                settings.top_k or 0, settings.dtype or verbs.TeachSettings.dtype, outlook.source.padded_vocab_size
            )
            flops, stored = (outlook.teacher or 0) * samples, float(each * samples * batch.seq_length)
        yield Estimate(
            made.id, str(made.samples), tokens=samples * batch.seq_length, flops=flops, storage=stored,
            after=(parent_cell(study, made.seed),),
        )  # fmt: skip


def _pruning(study: StudyConfig, outlook: Outlook, link: Pruning) -> Estimate:
    shape, needs = outlook.targets.get(link.name), outlook.needs[link.name]
    before = outlook.targets.get(link.base.name) if link.base else outlook.source
    consumed = outlook.consumed(study)
    own = consumed[link.name] - (consumed[link.base.name] if link.base else 0)
    after = [source_cell(study, link)]
    after += [calibration_cell(study, link)] if needs.statistics else []
    stored = None if shape is None else shape.parameters() * (2 if _half(study) else 4)
    flops: int | None = 0
    if needs.text:  # once through every block; a Hessian costs more
        flops = before.forward_flops(study.calibration_seq_length) * study.calibration.sequences if before else None
    elif needs.learning:
        flops = (
            before.training_flops(study.data.seq_length) * needs.learning // study.data.seq_length if before else None
        )
    elif needs.scores:
        flops = None  # the number of candidates is not known yet
    parameters = None if shape is None else shape.parameters()
    every: Any = link.method.settings.get("dynamic-batch-every")
    evaluation = _evaluation(study, outlook, shape)
    if every is not None and before is not None:
        steps = needs.learning // study.data.seq_length // learning_batch(study, link.method)
        samples: Any = link.method.settings.get("domain-samples", batch_flags.DEFAULT_SAMPLES)
        evaluation += _measured(study, steps, int(every), int(samples), before)
    return Estimate(
        link.cell, tokens=own, flops=flops, evaluation=evaluation, parameters=parameters,
        storage=stored, after=tuple(after),
    )  # fmt: skip


def _evaluation(study: StudyConfig, outlook: Outlook, shape: ModelShape | None) -> int:
    """FLOPs of a cell's evaluation on all corpora and tasks; 0 while the shape is not known."""
    if shape is None:
        return 0
    windows = study.evaluation.windows * len(commands.scored_corpora(study))
    tasks = sum(number * shape.forward_flops(length) for length, number in outlook.questions.items())
    return windows * shape.forward_flops(study.evaluation_seq_length) + tasks


def _measuring(study: StudyConfig, run: grid.TrainingCell, shape: ModelShape | None) -> int:
    """FLOPs of the losses that a run measures for dynamic batch loading."""
    dynamic = study.recipe.dynamic_batch
    if dynamic is None or run.follows is not None or shape is None:
        return 0
    return _measured(study, run.samples.steps, dynamic.every, dynamic.samples, shape)


def _measured(study: StudyConfig, steps: int, every: int, samples: int, shape: ModelShape) -> int:
    """FLOPs of the losses on every corpus, after each ``every`` steps but the last."""
    return (steps - 1) // every * samples * len(study.data.train) * shape.forward_flops(study.data.seq_length)


def left_to_know(study: StudyConfig, outlook: Outlook) -> list[str]:
    """Why cells or numbers are missing from the plan."""
    missing = []
    if outlook.source is None:
        missing.append("the parent's shape will be known after its import")
    elif len(outlook.targets) < len(outlook.needs):
        missing.append("shapes chosen by a search will be known after the search")
    flops = any(setting == "equal-flops" for entry in study.methods for setting, _ in study.compared(entry))
    if flops and len(outlook.spent) < len(prunings(study)):
        missing.append("scratch runs at equal FLOPs are estimates until the prunings' FLOPs are known")
    return missing


def with_questions(study: StudyConfig, outlook: Outlook) -> tuple[Outlook, list[str]]:
    """The outlook with the questions of the evaluation's tasks, or why they are not counted."""
    if not study.evaluation.tasks:
        return outlook, []
    try:
        return replace(outlook, questions=questions.lengths(study)), []
    except MegatronPruneError as error:
        return outlook, [f"the tasks of the evaluation are not in these FLOPs and times: {error}"]


def _price_of_evaluation(study: StudyConfig, outlook: Outlook, estimates: Sequence[Estimate]) -> str:
    """What evaluation costs next to training, over all cells."""
    whole = sum(one.evaluation for one in estimates)
    scored = f"{len(commands.scored_corpora(study))} corpora of {study.evaluation.windows:,} windows"
    if outlook.questions:
        scored += f", and {sum(outlook.questions.values()):,} sequences of the tasks"
    return f"evaluation: {whole:.3e} FLOPs, in the times, not in the column FLOPs: every model on {scored}"


def _half(study: StudyConfig) -> bool:
    return bool(study.recipe.arguments.get("bf16") or study.recipe.arguments.get("fp16"))


def makespan(estimates: Sequence[Estimate], seconds: dict[str, float], slots: int) -> float:
    """Total seconds with ``slots`` cells at a time, each after its dependencies, in the order given."""
    free = [0.0] * slots
    ended: dict[str, float] = {}
    for one in estimates:
        ready = max((ended.get(name, 0.0) for name in one.after), default=0.0)
        began = max(heapq.heappop(free), ready)
        ended[one.cell] = began + seconds.get(one.cell, 0.0)
        heapq.heappush(free, ended[one.cell])
    return max(ended.values(), default=0.0)
