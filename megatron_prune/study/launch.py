"""How a study's runs are put on machines, and where they report to: sections of study.yaml."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError
from megatron_prune.study.values import STRICT, Flags, Positive

# Options of sbatch that a job's script sets, or that would make it another job.
OF_THE_SCRIPT = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "output", "chdir", "open-mode", "dependency",
    "kill-on-invalid-dep", "array", "parsable", "wrap", "wait", "test-only",
)  # fmt: skip
TIMES = ("time", "time-min", "begin", "deadline")


@dataclass(frozen=True, config=STRICT)
class Slurm:
    """What the launcher ``slurm`` needs to know of a cluster.

    ``options`` are written as ``#SBATCH --key=value`` (partition, account, time, gres, …), ``setup`` as lines of
    shell before the first command (modules, the environment). ``ranks_per_node``: processes (GPUs) of one node.
    """

    ranks_per_node: Positive | None = None  # None: all of launch.nproc
    options: Flags = dataclasses.field(default_factory=dict)
    setup: list[str] = dataclasses.field(default_factory=list)
    poll_seconds: Annotated[float, Field(gt=0)] = 30.0  # between looks at the queue
    most_jobs: Positive | None = None  # in the queue at once; None: all that may be

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            _check_option(name, value)


def _check_option(name: str, value: Any) -> None:
    """UsageError for an option of sbatch that the script sets itself, or that would not mean what is written."""
    allowed = why = ""
    if name in OF_THE_SCRIPT:
        allowed = "options that a job's script does not set itself"
    elif name.startswith("container-"):
        allowed = (
            "no container here: name one in each command of your own, or install the environment (launch.slurm.setup)"
        )
        why = "sbatch would put the job's script itself in it, which calls srun and scontrol"
    elif name in TIMES and not isinstance(value, str):
        allowed, why = 'a time in quotes, as "24:00:00"', "YAML reads 24:00:00 as 86400, Slurm that as minutes"
    elif value is None or value is False:
        allowed, why = "true for a flag without a value", "an option that is not wanted is left out"
    elif name == "signal" and not re.fullmatch(r"B:USR1@\d+", str(value)):
        allowed, why = "B:USR1@SECONDS", "the script tells its training to save so long before the time limit"
    elif isinstance(value, list):
        allowed = 'text as sbatch takes it, as "a,b"'
    elif isinstance(value, str) and not (value and value.isprintable() and not set("'\"\\") & set(value)):
        allowed = "text on one line, without quotes and backslashes"
    if allowed:
        raise UsageError(f"launch.slurm.options.{name}", given=repr(value), allowed=allowed, why=why)


@dataclass(frozen=True, config=STRICT)
class Launch:
    """Processes of one run, runs at a time, and what starts them: this machine or a cluster's queue.

    ``retries``: how often a stage that failed is run again, from its last save, before its cell is marked as failed;
    attempts that got further are not counted.
    ``parallel_cells`` bounds the runs on this machine; under Slurm the queue decides.
    """

    launcher: Literal["local", "slurm"] = "local"
    nproc: Positive = 1
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    parallel_cells: Positive = 1
    threads: Positive | None = None  # CPU threads of a process; None: the cores, shared evenly
    retries: Annotated[int, Field(ge=0)] = 1
    slurm: Slurm | None = None

    def __post_init__(self) -> None:
        if self.nproc % (self.tensor_parallel * self.pipeline_parallel):
            raise UsageError(
                "launch.nproc",
                given=self.nproc,
                allowed=f"a multiple of tensor_parallel x pipeline_parallel = "
                f"{self.tensor_parallel * self.pipeline_parallel}",
            )
        if self.slurm is not None and self.launcher != "slurm":
            raise UsageError("launch.slurm", given="set", allowed="only with launcher: slurm")
        if self.launcher == "slurm" and self.parallel_cells > 1:
            raise UsageError("launch.parallel_cells", given=self.parallel_cells, allowed="only with launcher: local")
        if self.nproc % self.ranks_per_node:
            raise UsageError("launch.nproc", given=self.nproc, allowed=f"whole nodes of {self.ranks_per_node} ranks")

    @property
    def data_parallel(self) -> int:
        return self.nproc // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def ranks_per_node(self) -> int:
        per_node = self.slurm.ranks_per_node if self.slurm else None
        return min(per_node or self.nproc, self.nproc)

    def threads_per_process(self, cells: int) -> int:
        """Threads for each process while up to ``cells`` runs share the machine."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // (cells * self.nproc))


@dataclass(frozen=True, config=STRICT)
class Tracking:
    """Where trainings report to while they run, through Megatron's own writers; runs are grouped by study.

    W&B groups by ``WANDB_RUN_GROUP``, which is the study's name; a run is called as its cell.
    """

    tensorboard: bool = False  # under the study's folder, tensorboard/<cell>
    wandb_project: str | None = None
    wandb_entity: str | None = None

    def __post_init__(self) -> None:
        if self.wandb_entity and not self.wandb_project:
            raise UsageError("tracking.wandb_entity", given=self.wandb_entity, allowed="only with wandb_project")
