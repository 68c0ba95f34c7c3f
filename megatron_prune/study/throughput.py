"""How fast this machine trains a study's shapes: a few steps of each, as many runs side by side as the study has cells.

``study plan --throughput measured`` prices a study by it, and so do the examples' scripts that fit a study into hours.
The corpora must be there; nothing is kept.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.engine.launch import start
from megatron_prune.errors import RunError, UsageError
from megatron_prune.study import commands
from megatron_prune.study.estimate import Estimate
from megatron_prune.study.outlook import Outlook
from megatron_prune.study.prunings import Places, prunings
from megatron_prune.study.sample_ranges import Batch
from megatron_prune.study.schema import StudyConfig

STEPS, WARM_UP = 6, 2


@dataclass(frozen=True)
class Steps:
    """Seconds of a step when as many runs as the study has cells share the machine, and of the rest of a run."""

    step: float
    around: float


def time_steps(study: StudyConfig, begin: Sequence[str]) -> Steps:
    """The study's recipe on ``begin`` (flags of a shape, or ``--shape-from``), ``launch.parallel_cells`` runs at once:
    the median step from Megatron's log. RunError with the end of the log if a run fails."""
    launch = study.launch
    environment = commands.environment(study, launch.threads_per_process(launch.parallel_cells))
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as jobs:
        places = Places(Path(folder))
        samples = Batch(study.recipe.global_batch_size, study.data.seq_length).range(0, STEPS)
        argv = ["pretrain", *begin, *commands.layout(study), *commands.tokenizer(study)]
        argv += commands.recipe(study, places, samples, 1, study.recipe.rates[0], permute=True)
        argv += [*commands.flags(study.recipe.arguments), "--log-interval", "1"]
        logs = [Path(folder) / f"{run}.txt" for run in range(launch.parallel_cells)]
        began = time.monotonic()
        running = [jobs.enter_context(start(argv, nproc=launch.nproc, log=log, env=environment)) for log in logs]
        for job, log in zip(running, logs, strict=True):
            if job.wait():
                raise RunError(f"the timed run failed:\n{log.read_text()[-3000:]}")
            found = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log.read_text())
            times += [float(one) / 1000 for one in found[WARM_UP:]]
        wall = time.monotonic() - began
    step = statistics.median(times)
    return Steps(step, max(0.0, wall - STEPS * step))


@dataclass(frozen=True)
class Measured:
    """Prices of cells by timed steps: ``seconds_of_step`` by a step's FLOPs, ``around`` each run of steps."""

    seconds_of_step: Mapping[int, float]
    around: float
    gpus: int  # processes at once

    def seconds(self, estimate: Estimate, nproc: int) -> float | None:
        """Steps at the time of the shape that is nearest in FLOPs; evaluation and passes over text at its speed."""
        if estimate.flops is None:
            return None
        steps = estimate.steps or 1
        flops = estimate.flops / steps
        nearest = min(self.seconds_of_step, key=lambda known: abs(math.log(known / flops))) if flops else 0
        pace = self.seconds_of_step[nearest] / nearest if nearest else 0.0  # seconds of a FLOP
        return self.around + (estimate.flops + estimate.evaluation) * pace


def measure(study: StudyConfig, outlook: Outlook, gpus: int) -> Measured:
    """Time every shape of the study that is trained on: the parent's, and those of the known targets.

    Raises UsageError for a parent whose shape is not known, or whose flags no study says.
    """
    if outlook.source is None or study.parent.pretrain is None:
        raise UsageError(
            "--throughput", got="measured", expected="tokens per second and GPU, or an MFU such as 40%",
            why="only a parent that the study trains has flags to time",
        )  # fmt: skip
    batch, found, around = study.recipe.global_batch_size, {}, []
    shapes = dict.fromkeys([outlook.source, *(outlook.targets[one.name] for one in prunings(study)
                                              if one.name in outlook.targets)])  # fmt: skip
    for shape in shapes:
        timed = time_steps(study, commands.flags_of(study, shape))
        found[shape.training_flops(study.data.seq_length) * batch] = timed.step
        around.append(timed.around)
    return Measured(found, statistics.median(around), gpus)
