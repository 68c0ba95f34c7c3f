"""Cells as Slurm jobs: one script per cell, written next to its cell.json and submitted with its dependencies.

    cells/<cell>/job.sh ── sbatch --dependency=afterok:… ──▶ queue ── squeue ──▶ the runner checks the artifacts

The scripts can be read and submitted by hand (``study plan --scripts`` only writes them). The runner may be killed and
restarted: it finds its jobs in the queue by name and submits none twice. It ignores the jobs' exit codes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_prune import artifacts
from megatron_prune.errors import MegatronPruneError, RunError, UsageError
from megatron_prune.study.begun import first_other_word
from megatron_prune.study.commands import SAVES_WHEN_TOLD, Command, environment
from megatron_prune.study.execution import NO_LOCKS, State, States, has_begun
from megatron_prune.study.jobs import Cell
from megatron_prune.study.prunings import Places
from megatron_prune.study.run.status import CellProgress
from megatron_prune.study.schema import Slurm, StudyConfig

NODE = Path(__file__).parents[2] / "launch" / "node.sh"
GONE_LOOKS = 2  # polls without a job before it counts as ended, since its files may appear later


class NoAnswer(RunError):
    """A Slurm program failed in a way that may be temporary: too many jobs, or no answer from the controller."""


class Queue:
    """A launcher that runs cells as jobs. Slurm holds back jobs that depend on others."""

    orders = True

    def __init__(self, study: StudyConfig, places: Places, progress: CellProgress):
        self.study, self.places, self.progress = study, places, progress
        self.slurm = study.launch.slurm or Slurm()
        self.states = States(places)
        self.jobs: dict[str, str] = {}  # job by cell, for awaited cells
        self.missed: dict[str, int] = {}
        self.refused, self.refused_last = False, ""  # whether a job was refused since the last poll, and the message
        self._found: dict[str, str] | None = None

    @property
    def found(self) -> dict[str, str]:
        """Jobs of an earlier runner in the queue, by name."""
        if self._found is None:
            self._found = {name: job for job, name, _ in _queue(strict=True)}
        return self._found

    def check(self, cell: Cell) -> None:
        """UsageError for a cell pending in the queue with another script; a begun cell keeps its commands."""
        job, path = self.found.get(job_name(self.study, self.places, cell.id)), self.places.cell(cell.id) / "job.sh"
        if job is None or not path.is_file() or has_begun(path.parent):
            return
        earlier, now = path.read_text(), script(self.study, self.places, cell)
        if earlier != now:
            differs = first_other_word(earlier.split(), now.split()) or "another script"
            raise UsageError(
                f"study {self.study.name}", got=f"{cell.id} with {differs}",
                expected=f"the script of job {job} while that job waits in the queue",
                do=f"cancel it with `scancel {job}`, or restore study.yaml",
            )  # fmt: skip

    def room(self) -> bool:
        return not self.refused and len(self.jobs) < (self.slurm.most_jobs or math.inf)

    def begin(self, cell: Cell, after: Sequence[str]) -> bool:
        try:
            adopted = self.found.pop(job_name(self.study, self.places, cell.id), None)
            job = adopted or _submit(write_script(self.study, self.places, cell), [self.jobs[name] for name in after])
        except NoAnswer as error:
            if str(error) != self.refused_last:
                self.progress.refused(cell.id, str(error))
            self.refused, self.refused_last = True, str(error)
            self._found = None  # it may have been accepted anyway: check before submitting again
            return False
        self.refused_last = ""
        self.jobs[cell.id], self.missed[cell.id] = job, 0
        self._tell(cell.id, "submitted")
        self.progress.queued(cell.id, job, adopted=adopted is not None)
        return True

    def ended(self) -> Mapping[str, MegatronPruneError | None]:
        while True:
            time.sleep(self.slurm.poll_seconds)
            queue = {job: state for job, _, state in _queue()}
            for cell, job in self.jobs.items():
                self.missed[cell] = 0 if job in queue else self.missed[cell] + 1
                if job in queue:
                    self._tell(cell, queue[job])
            gone = [cell for cell, times in self.missed.items() if times >= GONE_LOOKS]
            for cell in gone:
                del self.jobs[cell], self.missed[cell]
            if gone or self.refused:
                self.refused = False
                return dict.fromkeys(gone)

    def _tell(self, cell: str, queue: str) -> None:
        """Store the job's state for ``study status`` if it has changed."""
        known = self.states.read(cell) or State("begun")
        if (known.job, known.queue) != (self.jobs[cell], queue):
            self.states.write(cell, State("begun", known.failures, self.jobs[cell], queue))


def job_name(study: StudyConfig, places: Places, cell: str) -> str:
    """A cell's name in the queue, unique to this study's path, so that a runner finds it again."""
    place = hashlib.sha256(str(places.root.resolve()).encode()).hexdigest()[:6]
    return f"{study.name}@{place}/{cell}"


def write_script(study: StudyConfig, places: Places, cell: Cell) -> Path:
    """``job.sh`` of a cell, ready for ``sbatch``."""
    path = places.cell(cell.id) / "job.sh"
    artifacts.write_bytes(path, script(study, places, cell).encode())
    return path


def script(study: StudyConfig, places: Places, cell: Cell) -> str:
    """The text of ``job.sh``."""
    directory, launch = places.cell(cell.id), study.launch
    slurm = launch.slurm or Slurm()
    nodes = launch.nproc // launch.ranks_per_node
    directives: dict[str, Any] = {"job-name": job_name(study, places, cell.id), "nodes": nodes, "ntasks-per-node": 1}
    directives |= {"output": f"{directory.absolute()}/slurm-%j.log", "open-mode": "append", "signal": "B:USR1@600"}
    directives |= ({} if "no-requeue" in slurm.options else {"requeue": True}) | slurm.options
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_prune.study.run", "."), undefined=jinja2.StrictUndefined,
        trim_blocks=False, keep_trailing_newline=True,
    ).get_template("job.sh.j2")  # fmt: skip
    return template.render(
        directives=[(key, "" if value is True else f"={shlex.quote(str(value))}") for key, value in directives.items()],
        cell=cell.id,
        no_locks=NO_LOCKS,
        study=study.name,
        after=", ".join(cell.after) or "nothing",
        script=shlex.quote(str(directory / "job.sh")),
        directory=shlex.quote(os.getcwd()),
        cell_directory=shlex.quote(str(directory)),
        setup=slurm.setup or [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"],
        environment=[(k, shlex.quote(v)) for k, v in environment(study, launch.threads).items()],
        nodes=nodes,
        per_node=launch.ranks_per_node,
        saves_when_told=SAVES_WHEN_TOLD,
        stages=[(stage.command.stage, " ".join(_words(stage.command, launch.ranks_per_node))) for stage in cell.stages],
    )


def _words(command: Command, per_node: int) -> Iterator[str]:
    """The words of a command in a script: torchrun on every node of the job, or one process on the first."""
    if command.nproc == 1 and SAVES_WHEN_TOLD not in command.argv:
        yield "python -m megatron_prune"
    else:
        if (nodes := command.nproc // per_node) > 1:
            yield f"srun --nodes {nodes} --ntasks {nodes} --ntasks-per-node 1"
        yield f"bash {shlex.quote(str(NODE))}"
    yield shlex.join(command.argv)


def _submit(script: Path, after: Sequence[str]) -> str:
    words = ["sbatch", "--parsable"]
    if after:  # dependents of a failed job leave the queue, so that the runner notices
        words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    return _ask([*words, str(script)]).strip().split(";")[0]


def _queue(*, strict: bool = False) -> list[tuple[str, str, str]]:
    """This user's jobs: id, name, state. If the queue does not answer, retry later, unless ``strict``."""
    while True:
        try:
            lines = _ask(["squeue", "--me", "--noheader", "--format=%i %T %j"]).splitlines()
        except RunError:
            if strict:
                raise
            time.sleep(5)
            continue
        # The name comes last: it can hold any character, job numbers and states hold no space.
        found = [line.strip().split(" ", 2) for line in lines]
        return [(words[0], words[2] if len(words) > 2 else "", words[1]) for words in found if len(words) > 1]


def _ask(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise RunError(
            f"launcher slurm: expected {words[0]} on this machine, got none: run the study on a login node"
        ) from error
    if done.returncode:
        wrong = re.search("invalid|unrecognized", done.stderr, re.IGNORECASE)  # a wrong option: waiting does not help
        kind = RunError if wrong else NoAnswer
        raise kind(f"{shlex.join(words)} exited with code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
