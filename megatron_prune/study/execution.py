"""One stage of a cell: whether it is done, and running it.

The files of a stage decide whether it is done, never an exit code. A ``Check`` is a name with arguments, so that it can
be stored in a cell's ``cell.json`` and evaluated in any process. Paths are relative to the directory that the study is
run from, like those in command lines.

Next to a cell's ``cell.json``: ``<stage>.log``, ``stages.json`` (seconds of every completed stage) and ``state.json``
(the runner's last state of the cell, for ``study status``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import Field

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import TRACKER_FILE
from megatron_prune.errors import EXIT_REFUSED, AccountError, MegatronPruneError, RunError
from megatron_prune.masks import MASKS, open_masks
from megatron_prune.structured import candidates as candidate_file
from megatron_prune.structured import plan as plan_file
from megatron_prune.structured import statistics as calibrate
from megatron_prune.study import custody
from megatron_prune.study.prunings import Places
from megatron_prune.study.sections import CORPORA
from megatron_prune.training import learned_file, teacher_cache
from megatron_prune.training import objective as objectives
from megatron_prune.training.account import read_account
from megatron_prune.untrusted import check

TAIL_LINES = 15
# Why a lock that no other process holds cannot be taken.
NO_LOCKS = (
    "its file system has no locks (Lustre has them when it is mounted with flock), and two runs could write the same "
    "files: put the study on another one"
)


@dataclass(frozen=True)
class Check:
    """The name of a function below, with its arguments."""

    name: str
    arguments: Mapping[str, Any]

    def __call__(self) -> bool:
        return CHECKS[self.name](**self.arguments)


def trained(
    account: str,
    start: int,
    end: int,
    steps: int,
    seed: int,
    permutation_seed: int | None,
    lr: float,
    objective: str = "lm",
) -> bool:
    """True if an account says that its run is complete.

    AccountError if it is another run than expected, or if the account contradicts itself or the losses next to it.
    """
    if not Path(account).is_file():
        return False
    found = read_account(Path(account))
    if found.get("complete") is not True:
        return False
    for name, asked, given in (
        ("range", [start, end], found.get("range")),
        ("steps", steps, found.get("steps")),
        ("seed", seed, found.get("seed")),
        ("permutation_seed", permutation_seed, found.get("permutation_seed")),
        ("lr", lr, found.get("arguments", {}).get("lr")),
        ("objective", objective, objectives.of(found)["name"]),
    ):
        if given != asked:
            raise AccountError(
                f"{account}: expected a finished run with {name} {asked}, got {given}: remove its folder, or restore "
                "what was changed"
            )
    custody.check_account(Path(account))
    return True


def learned(masks: str, **asked: Any) -> bool:
    """True if a run that learns masks has come to its end, as ``trained`` says, and its masks are there."""
    return trained(**asked) and _readable(learned_file.read, masks)


def evaluated(
    scores: str,
    windows: int,
    checkpoint: str,
    account: str | None = None,
    corpora: Sequence[str] = CORPORA,
    tasks: Sequence[str] = (),
) -> bool:
    """True if there are scores of all corpora, finite, on that many windows, with the text they are for, and of tasks.

    AccountError if they are not for the weights at ``checkpoint`` or those that ``account`` says were saved, or if they
    contradict themselves.
    """
    if not Path(scores).is_file():
        return False
    content = custody.read_scores(Path(scores))
    found, answered = content.get("corpora", {}), content.get("tasks", {})
    there = all(
        found.get(name, {}).get("windows") == windows
        and _is_number(found[name].get("loss"))
        and "fingerprint" in found[name]
        for name in corpora
    ) and set(tasks) <= set(answered.get("single", {}))
    if there:
        custody.check_scores(Path(scores), corpora)
        custody.check_weights(Path(scores), Path(account) if account else None, Path(checkpoint))
    return there


def calibrated(statistics: str) -> bool:
    """True if complete statistics exist."""
    return _readable(calibrate.read, statistics)


def asked(candidates: str) -> bool:
    """True if candidates exist."""
    return _readable(candidate_file.read, candidates)


def scored(statistics: str, candidates: str) -> bool:
    """True if statistics with a score for each of these candidates exist."""
    if not calibrated(statistics) or not asked(candidates):
        return False
    question, _ = candidate_file.read(candidates)
    return not question.unscored(calibrate.read(statistics))


def rescored(statistics: str, candidates: str) -> bool:
    """True if statistics with the loss of all candidates to be retrained exist."""
    if not scored(statistics, candidates):
        return False
    question, _ = candidate_file.read(candidates)
    return not question.unretrained(calibrate.read(statistics))


def planned(plan: str) -> bool:
    """True if a valid plan exists."""
    return _readable(plan_file.read, plan)


def applied(checkpoint: str, plan: str) -> bool:
    """True if a complete checkpoint of exactly that plan exists."""
    if not Path(checkpoint).is_dir() or not planned(plan):
        return False
    try:
        found = open_checkpoint(checkpoint)
        found.verify()
    except MegatronPruneError:
        return False
    return bool(found.pruning) and found.pruning[-1].get("plan") == plan_file.read(plan).hash


def sparsified(checkpoint: str, method: str, pattern: str) -> bool:
    """True if a complete checkpoint of such a pruning exists, with its masks."""
    if not Path(checkpoint).is_dir():
        return False
    try:
        found = open_checkpoint(checkpoint)
        found.verify()
        made = found.pruning[-1] if found.pruning else {}
        same = (made.get("method"), made.get("pattern")) == (method, pattern)
        return same and open_masks(Path(checkpoint) / MASKS).hash == made["masks"]
    except MegatronPruneError:
        return False


def taught(cache: str, samples: Sequence[int]) -> bool:
    """True if a complete cache of what a teacher says on these samples exists.

    AccountError if it is of other samples.
    """
    found = teacher_cache.read_manifest(Path(cache), teacher_cache.FLAG)
    if found is None or found[1] is None:  # its shards are still to come
        return False
    if list(found[0].range) != list(samples):
        asked, got = (":".join(map(str, each)) for each in (samples, found[0].range))
        raise AccountError(f"{cache}: expected what a teacher says on samples {asked}, got {got}: remove it")
    return True


def imported(checkpoint: str) -> bool:
    """True if a complete checkpoint exists."""
    return _readable(lambda path: open_checkpoint(path).verify(), checkpoint)


def _readable(read: Callable[[str], Any], path: str) -> bool:
    if not Path(path).exists():
        return False
    try:
        read(path)
    except MegatronPruneError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


CHECKS: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        trained,
        learned,
        evaluated,
        calibrated,
        asked,
        scored,
        rescored,
        planned,
        applied,
        sparsified,
        taught,
        imported,
    )
}


class CellRefused(RunError):
    """A stage whose command was refused and would be refused again."""


@dataclass(frozen=True)
class State:
    """The state of a cell: the ``failures`` of this runner's attempts, and its ``job`` in a queue."""

    state: Literal["waiting", "begun", "finished", "failed", "blocked"]
    failures: Sequence[str] = ()
    job: str | None = None
    queue: str | None = None  # Slurm's word for the state of that job


class _StateFile(TypedDict):
    state: Literal["waiting", "begun", "finished", "failed", "blocked"]
    failures: NotRequired[list[str]]
    job: NotRequired[str | None]
    queue: NotRequired[str | None]


class States:
    """The files with the progress of cells."""

    def __init__(self, places: Places):
        self.places = places

    def write(self, cell: str, state: State) -> None:
        artifacts.write_json(self.places.cell(cell) / "state.json", asdict(state))

    def read(self, cell: str) -> State | None:
        path = self.places.cell(cell) / "state.json"
        if not path.is_file():
            return None
        found = check(_StateFile, artifacts.read_json(path), str(path))
        return State(**{name: value for name, value in found.items() if name in _StateFile.__annotations__})  # type: ignore[arg-type]

    def seconds(self, cell: str) -> dict[str, float]:
        return seconds_of(self.places.cell(cell))


def seconds_of(directory: Path) -> dict[str, float]:
    """Seconds of a cell's completed stages. Killed attempts are not counted, since nothing timed them."""
    path = directory / "stages.json"
    return check(dict[str, float], artifacts.read_json(path), str(path)) if path.is_file() else {}


def reached(directory: Path) -> tuple[int, int]:
    """Progress of a cell: the number of completed stages, and of steps that its trainings have saved."""
    saved = 0
    for path in (*directory.glob("checkpoint"), *directory.glob("candidates/*/retrained")):
        tracker = path / TRACKER_FILE
        text = tracker.read_text().strip() if tracker.is_file() else ""
        saved += int(text) if text.isdecimal() else 0
    return len(seconds_of(directory)), saved


def execute(directory: Path, stage: str, done: Callable[[], bool], command: Callable[[Path], int]) -> None:
    """Run ``command(log)`` in the cell ``directory`` and store its seconds; RunError unless ``done`` afterwards."""
    began = time.monotonic()
    code = command(directory / f"{stage}.log")
    if not done():
        raise unfinished(directory, stage, code)
    seconds = seconds_of(directory) | {stage: round(time.monotonic() - began, 2)}
    artifacts.write_json(directory / "stages.json", seconds)


def unfinished(directory: Path, stage: str, code: int | None = None) -> RunError:
    """The error for a stage that ended without its artifacts saying that it succeeded."""
    log = directory / f"{stage}.log"
    kind = CellRefused if code == EXIT_REFUSED else RunError
    ended = "ended" if code is None else f"ended (exit code {code})"
    return kind(f"{directory.name}: {stage} {ended} without saying that it succeeded. The end of {log}:\n{_tail(log)}")


class _StageFile(TypedDict):
    stage: str
    nproc: int
    argv: list[str]
    done: dict[str, Any]


class About(TypedDict, total=False):
    """What a cell is, in its ``cell.json`` and its line in the ledger."""

    kind: str
    arm: str
    seed: int
    lr: float
    compared: list[dict[str, str | int | float | bool | None]]


class _CellFile(TypedDict):
    cell: str
    about: About
    stages: Annotated[list[_StageFile], Field(min_length=1)]


def has_begun(directory: Path) -> bool:
    """True once a stage or the job of a cell has written a log."""
    return any(directory.glob("*.log"))


def read_cell(path: Path) -> dict[str, Any]:
    """The content of a ``cell.json``. MegatronPruneError, with file and key, for one that is not as ``Cell.to_json``
    writes it."""
    return dict(check(_CellFile, artifacts.read_json(path), str(path)))


def described(directory: Path, stage: str) -> tuple[dict[str, Any], Check]:
    """A stage from a cell's ``cell.json``, and the check whether it is done."""
    for known in read_cell(directory / "cell.json")["stages"]:
        if known["stage"] == stage:
            arguments = dict(known["done"])
            return known, Check(arguments.pop("check"), arguments)
    raise RunError(f"{directory / 'cell.json'}: expected a stage called {stage}, got none")


def _tail(log: Path) -> str:
    if not log.is_file():
        return "(there is no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
