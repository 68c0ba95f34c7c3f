"""``Study.load(…).run()``: a study from Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_prune.api.made import _Shown
from megatron_prune.errors import UsageError

if TYPE_CHECKING:
    from megatron_prune.study import schema
    from megatron_prune.study.analysis.results import Results
    from megatron_prune.study.prunings import Places


@dataclass(frozen=True, repr=False)
class StudyResult(_Shown):
    """The result of a study of one parent: its report and conclusions; ``rows`` is the table of results."""

    name: str
    report: Path
    verdicts: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    unfinished: tuple[str, ...] = ()

    def _title(self) -> str:
        return f"study {self.name}: report in {self.report}"

    def _lines(self) -> Iterator[tuple[str, str]]:
        for verdict in self.verdicts:
            subject, _, words = verdict.partition(": ")
            yield subject, words
        for lacks in self.unfinished:
            subject, _, words = lacks.partition(": ")
            yield subject, words


@dataclass(frozen=True, repr=False)
class Study(_Shown):
    """A comparison described by a ``study.yaml``: one study per parent, usually one."""

    path: Path
    studies: tuple[schema.StudyConfig, ...]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ``study.yaml``, or the folder of a study that has begun. UsageError names the invalid key."""
        from megatron_prune.study import schema

        return cls(Path(path), tuple(schema.load_all(path)))

    def run(self, runs_dir: str | Path = "runs") -> StudyResult | tuple[StudyResult, ...]:
        """Run every unfinished cell and write the report; returns a tuple if there are several parents.

        Raises RunError if cells failed.
        """
        from megatron_prune.study.study_file import root_of

        results = tuple(_run(study, root_of(self.path, runs_dir, study.name)) for study in self.studies)
        return results[0] if len(results) == 1 else results

    def _title(self) -> str:
        return f"study {self.path}"

    def _lines(self) -> Iterator[tuple[str, str]]:
        for study in self.studies:
            methods = ", ".join(dict.fromkeys(method.name for method in study.methods))
            yield study.name, f"{methods}; budgets of {', '.join(f'{budget:,}' for budget in study.budgets)} tokens"


def _run(study: schema.StudyConfig, root: Path) -> StudyResult:
    from megatron_prune.study.prunings import Places

    places = Places(root)
    run_cells(study, places)
    measure_efficiency(study, places)
    found, report = write_report(study, places)
    verdicts = tuple(f"{verdict.subject}: {verdict.words}" for verdict in found.verdicts)
    return StudyResult(study.name, report, verdicts, found.rows, tuple(one.sentence for one in found.unfinished))


def run_cells(study: schema.StudyConfig, places: Places) -> None:
    """Run every unfinished cell, on this machine or through Slurm. RunError if cells failed."""
    from megatron_prune.study.run import scheduler
    from megatron_prune.study.run.local import Local
    from megatron_prune.study.run.slurm import Queue
    from megatron_prune.study.run.status import CellProgress

    with CellProgress() as progress:
        launcher = (Queue if study.launch.launcher == "slurm" else Local)(study, places, progress)
        scheduler.run(study, places, launcher=launcher, progress=progress)


def measure_efficiency(study: schema.StudyConfig, places: Places) -> None:
    """Measure what the models cost to run, if the study asks for it and that was not done: the parent, and one model of
    each pruning, of the first seed. Training does not change how long a model takes."""
    from megatron_prune import artifacts, verbs
    from megatron_prune.api import checkpoints
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.study.analysis.serving import MEASURED
    from megatron_prune.study.prunings import prunings

    if not study.evaluation.efficiency:
        return
    first = study.seeds[0]
    paths = [places.parent(study, first), *(places.checkpoint(p.cell) for p in prunings(study) if p.seed == first)]
    output = places.root / MEASURED
    known = {model["fingerprint"] for model in artifacts.read_json(output)["models"]} if output.is_file() else set()
    if {open_checkpoint(path).fingerprint() for path in paths} <= known:
        return
    words = tuple(dict.fromkeys(map(str, paths)))
    prompt = min(512, study.data.seq_length)
    checkpoints.run_benchmark(verbs.BenchmarkSettings(checkpoints=words, output=str(output), prompt=prompt))


def write_report(study: schema.StudyConfig, places: Places, *, verify: bool = False) -> tuple[Results, Path]:
    """The results of the finished cells and the page that shows them. UsageError for a study that never ran.

    AccountError if two runs that should match do not. ``verify``: read all weights, masks and corpora again; what is
    not as it was joins ``disbelieved``, and ``verified`` says how many were read.
    """
    from megatron_prune.study.analysis import results
    from megatron_prune.study.report import page
    from megatron_prune.study.verification import verify_files

    if not (places.root / "study.json").is_file():
        raise UsageError(
            "study report", expected="the folder of a study that has begun", got=places.root,
            do="start it with `study run`",
        )  # fmt: skip
    found = results.collect(places, study)
    if verify:
        read, wrong = verify_files(study, places, found.records)
        found = replace(found, disbelieved=(*found.disbelieved, *wrong), verified=read | {"changed": len(wrong)})
    return found, page.write(found, places)
