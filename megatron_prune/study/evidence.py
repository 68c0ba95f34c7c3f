"""The content of a study's folder: the ledger, and records that are read from the artifacts each time.

ledger.jsonl has one line per finished cell, appended whole or not at all. A line is written by one ``write`` on a
descriptor that was opened for appending, and is on disk before the runner continues. If the process is killed while it
writes, only the last line can be incomplete: one that does not end in a newline is never read, and is removed before
the next line is appended. Any other line that is not a record is an error, since nothing else writes to the file.

The ledger is a log, not the source. A report shows the artifacts of the cells and names every cell whose ledger line
differs. A cell that was run again, or scored on further corpora or tasks, has several lines; the last one counts, and
the others remain as a trace. Runs in the folder that study.yaml no longer asks for are listed with the reason, and
comparisons between them stay in the family that p values are corrected over.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

from megatron_prune import artifacts
from megatron_prune.errors import MegatronPruneError, RunError
from megatron_prune.study import begun, custody, jobs
from megatron_prune.study.execution import About, Check, States, has_begun, read_cell
from megatron_prune.study.grid import GROUP
from megatron_prune.study.jobs import Cell
from megatron_prune.study.outlook import Outlook, look
from megatron_prune.study.prunings import Places, of_method, prunings
from megatron_prune.study.schema import StudyConfig
from megatron_prune.untrusted import check, explain, parse_json


class _Line(TypedDict, total=False):
    """A line of the ledger: what ``records`` makes of a cell, and ``line`` adds."""

    cell: Required[str]
    kind: str
    seconds: dict[str, float]
    about: About
    artifacts: dict[str, str]
    validation_loss: float
    test_loss: float
    tokens: int | None  # of a parent from elsewhere they are unknown
    flops: int | None
    parameters: int
    parameters_nonzero: int | None


class Ledger:
    """The records of a study's finished cells, by cell."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self) -> dict[str, dict[str, Any]]:
        """The last record of every cell, in the order in which the cells were first appended."""
        return {record["cell"]: record for record in self.lines()}

    def replaced(self) -> list[dict[str, Any]]:
        """Superseded records of cells that were run again."""
        lines = self.lines()
        last = {record["cell"]: number for number, record in enumerate(lines)}
        return [record for number, record in enumerate(lines) if number != last[record["cell"]]]

    def lines(self) -> list[dict[str, Any]]:
        """All whole records, in the order in which they were appended; a torn last line is left out."""
        whole, _ = self._split()
        records: list[dict[str, Any]] = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                origin = f"{self.path}, line {number}"
                records.append(dict(check(_Line, parse_json(line, origin), origin)))
            except MegatronPruneError as error:
                raise RunError(
                    f"{error}; expected a record of a cell; the file was changed by hand: remove it, and it is rebuilt "
                    "from the cells"
                ) from error
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a cell's record; a torn last line is removed first. What the disk refuses is tried again."""
        line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
        if failed := artifacts.failure(lambda: self._append(line)):
            raise RunError(
                f"{explain(failed, self.path, 'written')}; the record of {record['cell']} is in its own files: run the "
                "study again, and it is added"
            ) from failed

    def _append(self, line: bytes) -> None:
        whole, torn = self._split()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if torn:
                os.ftruncate(descriptor, len(whole))
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, "only part of a line was written", str(self.path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _split(self) -> tuple[bytes, bytes]:
        """The file up to its last newline, and what comes after it."""
        if not self.path.exists():
            return b"", b""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        return content[:end], content[end:]


Record = Mapping[str, Any]
MOST_UNLOGGED = 4  # named individually
TRAINED = ("training", "retraining")  # kinds of cells
NOT_COMPARED = {"seconds", "about", "artifacts", "unigram_loss"}  # keys of a line and a record
FILES = (
    "scores.json",
    "plan.json",
    "checkpoint/account.json",
    "checkpoint/losses.csv",
)  # files of a cell that are hashed


@dataclass(frozen=True)
class LeftOut:
    """A finished run of the folder that is not shown; ``record`` has its losses if they are known."""

    cell: str
    why: str
    record: Record


@dataclass(frozen=True)
class Evidence:
    """``records`` of the study's finished cells; ``disbelieved``: where the ledger differs; ``compared``: every
    comparison, as ``Comparison.group``, with both arms finished in this folder, shown or not."""

    outlook: Outlook
    records: Mapping[str, dict[str, Any]]
    disbelieved: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    compared: tuple[Record, ...]


def gather(study: StudyConfig, places: Places) -> Evidence:
    """Read a study's folder. AccountError if files of a cell or two cells contradict each other; UsageError
    if ``study`` would run a cell with other commands."""
    outlook, ledger = look(study, places), Ledger(places.ledger)
    known = jobs.parents if outlook.source is None else jobs.all_cells
    cells = {cell.id: cell for cell in known(study, places, outlook)}
    begun.refuse_other_commands(study, places, list(cells.values()))  # study.yaml must still describe what was run
    lines, states = ledger.read(), States(places)
    order = [*(cell for cell in lines if cell in cells), *(cell for cell in cells if cell not in lines)]
    found = {cell: record(cells[cell], states) for cell in order}
    records = {cell: made for cell, made in found.items() if made is not None}
    others = {name: described for name, described in _described(places) if name not in cells}
    left_out = list(_left_out(study, places, cells, others, ledger))
    trained = [cell for cell in records if cells[cell].kind in TRAINED]
    trained += [name for name in others if _is_trained(places, name, others[name])]
    custody.refuse_copies(
        [custody.TrainedRun.read(cell, places.account(cell), places.scores(cell)) for cell in trained],
        {cell: made["fingerprint"] for cell, made in records.items() if made["kind"] in ("parent", "pruning")},
    )
    return Evidence(
        outlook, records, (*_unlogged(places, lines, records), *_disbelieved(places, cells, lines, records)),
        tuple(left_out),
        tuple(_compared(places, set(trained), lines, cells)),
    )  # fmt: skip


def record(cell: Cell, states: States) -> dict[str, Any] | None:
    """The record of a cell from its artifacts; None if it is not finished."""
    if not cell.is_done():
        return None
    made: dict[str, Any] = json.loads(json.dumps(cell.record(states.seconds(cell.id))))  # as it reads back from a line
    return made


def line(places: Places, cell: Cell, made: Record) -> dict[str, Any]:
    """A record as the ledger keeps it: with a description of the run and the hashes of its artifacts."""
    return {**made, "about": {"kind": cell.kind, **cell.about}, "artifacts": hashes(places, cell.id)}


def hashes(places: Places, cell: str) -> dict[str, str]:
    """SHA-256 of the artifacts that a cell's numbers come from."""
    paths = {name: places.cell(cell) / name for name in FILES}
    return {name: artifacts.sha256_file(path) for name, path in paths.items() if path.is_file()}


def _unlogged(places: Places, lines: Mapping[str, Record], records: Mapping[str, Record]) -> Iterator[str]:
    """Finished cells that the ledger does not have: nothing says whether their files are as they were written."""
    names = [cell for cell in records if cell not in lines]
    unknown = "nothing says whether they are as they were written"
    if names and not places.ledger.exists():
        yield f"{places.ledger} is missing, with the lines of {len(names)} finished cells: {unknown}"
    elif names:
        more = f" and {len(names) - MOST_UNLOGGED} more" if len(names) > MOST_UNLOGGED else ""
        yield f"the ledger has no line for {', '.join(names[:MOST_UNLOGGED])}{more}: {unknown}"


def _disbelieved(
    places: Places, cells: Mapping[str, Cell], lines: Mapping[str, Record], records: Mapping[str, Record]
) -> Iterator[str]:
    for cell, said in lines.items():
        if cell not in cells:
            continue
        if cell not in records and _lacks_scores(places, cells[cell], said):
            continue
        if cell not in records:
            yield f"{cell}: the ledger has a line for it, but its artifacts are missing or incomplete"
            continue
        made = records[cell]
        pairs = {key: (said.get(key), made.get(key)) for key in sorted({*made, *said} - NOT_COMPARED)}
        differing = [f"{key} {a}, its artifacts {b}" for key, (a, b) in pairs.items() if a != b]
        now, then = hashes(places, cell), said.get("artifacts", {})
        changed = [name for name in FILES if now.get(name) != then.get(name)]
        if differing:
            yield f"{cell}: the ledger says {'; '.join(differing)}" + _since(changed)
        elif changed:
            yield f"{cell}: its numbers are those of the ledger{_since(changed)}"


def _lacks_scores(places: Places, cell: Cell, said: Record) -> bool:
    """Whether a cell is as its line says, and is not scored yet on what study.yaml has added since."""
    *others, last = cell.stages
    if last.done.name != "evaluated" or hashes(places, cell.id) != said.get("artifacts") or last.done():
        return False
    return all(stage.done() for stage in others)


def _since(changed: Sequence[str]) -> str:
    return f" ({', '.join(changed)} changed after the line was written)" if changed else ""


def _described(places: Places) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every cell in the folder with its cell.json."""
    for path in sorted(places.root.glob("cells/*/cell.json")):
        yield path.parent.name, read_cell(path)


def _left_out(
    study: StudyConfig, places: Places, cells: Mapping[str, Cell], others: Mapping[str, dict[str, Any]], ledger: Ledger
) -> Iterator[LeftOut]:
    lines = ledger.read()
    for name in [*others, *(name for name in lines if name not in cells and name not in others)]:
        described = others.get(name)
        finished, why = _finished(places.cell(name), described) if described else (False, "")
        if finished or why or name in lines:
            about = (described or {}).get("about") or lines.get(name, {}).get("about") or {}
            gone = "" if finished or why else "; its artifacts are gone, or not finished"
            yield LeftOut(name, _reason(study, about) + why + gone, _losses(places, name) or lines.get(name, {}))
    for replaced in ledger.replaced():
        if not grown(replaced, lines[replaced["cell"]]):
            yield LeftOut(replaced["cell"], "this cell was made again since", replaced)


def grown(earlier: Record, now: Record) -> bool:
    """Whether a later record of a cell says all that an earlier one says, and was scored on more."""
    return earlier.get("text") != now.get("text") and _says(now, earlier)


def _says(now: Any, earlier: Any) -> bool:
    if not isinstance(earlier, Mapping) or not isinstance(now, Mapping):
        return bool(earlier == now)
    apart = {*NOT_COMPARED, *(("tasks",) if "validation" in earlier else ())}  # ``text`` has all questions as one
    return all(key in apart or (key in now and _says(now[key], value)) for key, value in earlier.items())


def _finished(directory: Path, described: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a cell is finished according to its cell.json, and what is wrong with its files."""
    try:
        for stage in described["stages"]:
            arguments = dict(stage["done"])
            if not Check(arguments.pop("check"), arguments)():
                return False, ""
    except (MegatronPruneError, KeyError, TypeError) as error:
        return False, f"; its files are not whole ({error})" if has_begun(directory) else ""
    return True, ""


def _is_trained(places: Places, name: str, described: Mapping[str, Any]) -> bool:
    if described.get("about", {}).get("kind") not in TRAINED:
        return False
    return _finished(places.cell(name), described)[0]


def _losses(places: Places, cell: str) -> Record:
    try:
        corpora = custody.read_scores(places.scores(cell))["corpora"]
        return {f"{name}_loss": corpora[name]["loss"] for name in ("validation", "test")}
    except (MegatronPruneError, KeyError, TypeError):
        return {}


def _reason(study: StudyConfig, about: Mapping[str, Any]) -> str:
    """Why study.yaml no longer asks for a run."""
    groups = about.get("compared", [])
    if not groups:
        return "no run of study.yaml needs it now"
    subjects = {pruning.subject for pruning in prunings(study)}
    asked = {
        (pruning.subject, *compared)
        for entry in study.methods
        for pruning in of_method(study, entry)
        for training in study.trainings
        for compared in study.asked_of(entry, pruning.subject[2], *training, pruning.seed)
    }
    named = {(group["method"], group["pattern"], group["ratio"]) for group in groups}
    settings = {((g["method"], g["pattern"], g["ratio"]), g["setting"], g["against"]) for g in groups}
    methods = {(method, pattern) for method, pattern, _ in subjects}
    if not any(one[:2] in methods for one in named):
        subject = [f"method {groups[0]['method']}" + (f" {groups[0]['pattern']}" if groups[0]["pattern"] else "")]
    elif not named & subjects:
        subject = [f"ratio {groups[0]['ratio']}"]
    elif not settings & asked:
        subject = [f"setting {groups[0]['setting']} ({groups[0]['against']} scratch)"]
    else:
        subject = []
    checks = (
        (about["seed"] in study.seeds, f"seed {about['seed']}"),
        (any(group["budget"] in study.budgets for group in groups), f"budget {groups[0]['budget']:,}"),
        (
            any(group["objective"] in study.learned_from(group["budget"]) for group in groups),
            f"objective {groups[0]['objective']} at that budget",
        ),
        (about["lr"] in study.recipe.rates, f"learning rate {about['lr']:g}"),
    )
    missing = subject + [what for there, what in checks if not there]
    return f"study.yaml no longer has {', '.join(missing)}" if missing else "no run of study.yaml needs it now"


def _compared(
    places: Places, trained: set[str], lines: Mapping[str, Record], cells: Mapping[str, Cell]
) -> Iterator[Record]:
    """Comparisons with a finished pruned and scratch run, from what was recorded with the runs."""
    arms: dict[tuple[Any, ...], set[str]] = {}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    abouts = {name: described.get("about", {}) for name, described in _described(places)}
    for name in [*abouts, *(name for name in lines if name not in abouts)]:
        if name not in trained and name not in lines:
            continue
        for about in (abouts.get(name, {}), lines.get(name, {}).get("about", {})):
            for group in about.get("compared", []):
                if not {*GROUP, "in_family"} <= group.keys() or "arm" not in about:
                    raise MegatronPruneError(
                        f"{places.cell(name) / 'cell.json'} is damaged: expected {', '.join(GROUP)}, in_family and arm "
                        "of every comparison"
                    )
                key = tuple(group[part] for part in GROUP)
                arms.setdefault(key, set()).add(about["arm"])
                known = groups.setdefault(key, dict(group))
                known["in_family"] = known["in_family"] or group["in_family"]
    yield from (group for key, group in groups.items() if arms[key] == {"pruned", "scratch"})
