"""Do the files of a run belong together, and are two runs really different?

    training ──▶ checkpoint/iter_N ──▶ account.json  "final": fingerprint and full_hash of the weights that it saved
                        │                                ║ the same
                        └──▶ evaluation ──▶ scores.json  "checkpoint": those of the weights that it scored

If these disagree, an AccountError names the cell: a checkpoint, an account or scores were copied from another cell.
Each file must also be consistent: losses.csv with the account next to it, a loss with the mean of its windows. Two runs
that differ in anything that determines a run cannot end with the same weights or losses; if they do, one is a copy.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.data.schedule import FILE, Schedule
from megatron_prune.errors import AccountError
from megatron_prune.training import objective
from megatron_prune.training.account import COLUMNS, Device, read_account
from megatron_prune.training.argument_roles import ALLOWED
from megatron_prune.untrusted import Keys, check, reason

WEIGHTS = ("fingerprint", "full_hash")
TWICE = ("seed", "global_batch_size", "micro_batch_size", "seq_length")  # in an account and among its arguments
CLOSE = 1e-6  # nats per window between two runs; different seeds differ by thousands of times as much


class _Corpus(TypedDict):
    windows: int
    loss: float
    seq_length: NotRequired[int]
    fingerprint: NotRequired[str]
    window_losses: NotRequired[list[float]]


class _Metric(TypedDict):
    value: float


class _TaskResult(TypedDict):
    metrics: dict[str, _Metric]
    samples: int


class _Questions(TypedDict):
    fingerprint: str
    scores: dict[str, list[float]]


class _Answers(TypedDict):
    results: dict[str, _TaskResult]
    questions: dict[str, _Questions]


class _Scored(TypedDict, total=False):
    fingerprint: str
    full_hash: str


class _ScoresFile(TypedDict, total=False):
    checkpoint: _Scored
    corpora: dict[str, _Corpus]
    tasks: _Answers
    parameters: int
    parameters_nonzero: int
    masks: str | None
    versions: dict[str, str]
    device: Device | None


def read_scores(path: Path) -> dict[str, Any]:
    """The content of a ``scores.json``. AccountError, with file and key, for a value of another type; the same for a
    key that is looked up and is not there, in the file or in one of its corpora."""
    content: Mapping[str, Any] = check(_ScoresFile, artifacts.read_json(path), str(path), AccountError)
    corpora = content.get("corpora", {}).items()
    named = {name: Keys(corpus, f"{path}: {name}", AccountError) for name, corpus in corpora}
    return Keys({**content, "corpora": named} if named else content, str(path), AccountError)


def check_account(path: Path) -> None:
    """AccountError if a complete account contradicts itself or the losses next to it."""
    account = read_account(path)
    for name in TWICE:
        given = account["arguments"].get(name)
        if given not in (None, account[name]):
            raise AccountError(
                f"{path}: {name}: expected {given}, as in its arguments, got {account[name]}; restore the file"
            )
    if account["range"] is None:
        raise AccountError(
            f"{path}: range: expected the first and the last sample, got none, as of a run without --stream-range; "
            "restore the file"
        )
    first, end = account["range"]
    samples, length = account["steps"] * account["global_batch_size"], account["seq_length"]
    for name, found, follows in (
        ("range", end - first, samples),
        ("tokens", account["tokens"], samples * length),
    ):
        if found != follows:
            raise AccountError(
                f"{path}: {name}: expected {follows:,} by its {account['steps']} steps of "
                f"{account['global_batch_size']} x {length}, got {found:,}"
            )
    _check_schedule(path, account)
    losses = path.parent / "losses.csv"
    rows = read_losses(losses)
    batch = account["global_batch_size"]
    if len(rows) != account["steps"] or any(
        (row["step"], row["samples"]) != (str(step), str(step * batch)) for step, row in enumerate(rows, 1)
    ):
        raise AccountError(
            f"{losses}: expected a row for each of the {account['steps']} steps of {path.name}, got {len(rows)} rows"
        )
    for name, row in (("initial_loss", rows[0]), ("final_loss", rows[-1])):
        loss = float(row["loss"])
        if (loss if math.isfinite(loss) else None) != account[name]:
            raise AccountError(
                f"{path}: {name}: expected {loss}, as in {losses.name}, got {account[name]}; restore the file"
            )


def _check_schedule(path: Path, account: Mapping[str, Any]) -> None:
    """AccountError if a schedule of batches in an account is not the one in the file next to it."""
    if (said := account.get("schedule")) is None:
        return
    held = Schedule.read(path.parent / FILE)
    for name, found, follows in (
        ("schedule", said["hash"], held.hash),
        ("blocks of the schedule", said["blocks"], held.to_json()["blocks"]),
        ("domains", account["domains"], held.domains),
    ):
        if found != follows:
            raise AccountError(f"{path}: {name}: expected {follows}, by the {FILE} next to it, got {found}")


def check_scores(path: Path, corpora: Sequence[str]) -> None:
    """AccountError if a loss is not the mean of its windows, or a task's result not that of its questions."""
    scores = read_scores(path)
    for name in corpora:
        corpus = scores["corpora"][name]
        windows = corpus.get("window_losses") or []
        if len(windows) != corpus["windows"]:
            raise AccountError(
                f"{path}: {name}: expected the losses of {corpus['windows']} windows, got {len(windows)}; restore the "
                "file"
            )
        mean = sum(windows) / len(windows)
        if not math.isclose(mean, corpus["loss"], rel_tol=1e-12):
            raise AccountError(
                f"{path}: the loss of {name}: expected {mean}, the mean of its windows, got {corpus['loss']}; restore "
                "the file"
            )
    tasks = scores.get("tasks", {})
    for name, questions in tasks.get("questions", {}).items():
        result = tasks["results"][name]
        for metric, own in questions["scores"].items():
            mean, value = sum(own) / max(len(own), 1), result["metrics"][metric]["value"]
            if len(own) != result["samples"] or not math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
                raise AccountError(
                    f"{path}: {metric} of {name} is {value} on {result['samples']} questions, the mean of its "
                    f"{len(own)} questions {mean}"
                )


def check_weights(scores: Path, account: Path | None, checkpoint: Path) -> None:
    """AccountError if scores are not for the weights that training saved (``account``; None if nothing was trained), or
    not for those on disk (if ``retention`` kept any)."""
    scored = read_scores(scores).get("checkpoint", {})
    if account is not None:
        saved = read_account(account).get("final")
        if not saved:
            raise AccountError(
                f"{account}: expected the fingerprint of the weights that were saved, got none: restore it, or train "
                "again"
            )
        _same(scores, scored, account, saved, WEIGHTS)
    if checkpoint.is_dir() and find_iteration(checkpoint) is not None or (checkpoint / ".metadata").is_file():
        held = {"fingerprint": open_checkpoint(checkpoint).fingerprint()}
        _same(scores, scored, checkpoint, held, ("fingerprint",))


def _same(scores: Path, scored: Mapping[str, Any], other: Path, held: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if scored.get(key) is None or scored[key] != held.get(key):
            raise AccountError(
                f"{scores} is of weights with {key} {scored.get(key)}, {other} has {held.get(key)}: restore what was "
                f"changed, or remove {scores.name} to have these weights evaluated"
            )


@dataclass(frozen=True)
class TrainedRun:
    """A trained and evaluated run, from its files."""

    cell: str
    account: Mapping[str, Any]
    scores: Mapping[str, Any]
    losses: tuple[str, ...]  # of every step, as written

    @staticmethod
    def read(cell: str, account: Path, scores: Path) -> TrainedRun:
        """Read a cell's files; ``losses.csv`` is next to the account."""
        losses = tuple(row["loss"] for row in read_losses(account.parent / "losses.csv"))
        return TrainedRun(cell, read_account(account), read_scores(scores), losses)

    @property
    def training(self) -> dict[str, Any]:
        """What determines a training's result, without paths and progress: runs that share it may be equal."""
        account = self.account
        keys = ("start", "stream", "range", "permutation_seed", "seed", "steps", "seq_length", "parameters", "masks")
        arguments = {name: value for name, value in account["arguments"].items() if name not in ALLOWED}
        initial = (account["initial"] or {}).get("fingerprint")
        asked = {"initial": initial, "objective": objective.settings(objective.of(account))}
        return {key: account[key] for key in keys} | asked | arguments


def refuse_copies(runs: Sequence[TrainedRun], untrained: Mapping[str, str]) -> None:
    """AccountError if two different runs have the same weights, or the same losses at every step or on every window.

    ``untrained``: fingerprints of the parents and pruned checkpoints, by cell; no run ends with these.
    """
    starts = {fingerprint: cell for cell, fingerprint in untrained.items()}
    for run in runs:
        if source := starts.get(run.account["final"]["fingerprint"]):
            raise AccountError(f"{run.cell} ended with the same weights as {source} (fingerprint): one is a copy")
    for what, key in (
        ("the same weights (fingerprint)", lambda run: run.account["final"]["fingerprint"]),
        ("the same weights (full_hash)", lambda run: run.account["final"]["full_hash"]),
        ("losses of training that are equal to the last digit", lambda run: run.losses),
    ):
        _refuse_equal(runs, what, key)
    for corpus in ("validation", "test"):
        windows = {run.cell: np.array(run.scores["corpora"][corpus]["window_losses"]) for run in runs}
        for one, other in combinations(runs, 2):
            a, b = windows[one.cell], windows[other.cell]
            if a.shape == b.shape and np.abs(a - b).max() < CLOSE:
                _refuse_pair(one, other, f"the same {corpus} loss on every window")


def _refuse_equal(runs: Sequence[TrainedRun], what: str, key: Callable[[TrainedRun], Hashable]) -> None:
    known: dict[Hashable, TrainedRun] = {}
    for run in runs:
        _refuse_pair(known.setdefault(key(run), run), run, what)


def _refuse_pair(one: TrainedRun, other: TrainedRun, what: str) -> None:
    """AccountError unless their accounts say that they are one training under two names."""
    one, other = sorted((one, other), key=lambda run: run.cell)
    ours, theirs = one.training, other.training
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if (a := ours.get(name)) != (b := theirs.get(name)):
            raise AccountError(
                f"{one.cell} and {other.cell} have {what}, but are different runs by their accounts "
                f"({name}: {a} against {b}): one of them is a copy of the other"
            )


def read_losses(losses: Path) -> list[dict[str, str]]:
    """The rows of a ``losses.csv``; AccountError if it is missing, or is no table of steps and losses."""
    if not losses.is_file():
        raise AccountError(f"{losses} is missing: expected the losses next to their account")
    try:
        with open(losses, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        for row in rows:
            _ = int(row["step"]), int(row["samples"]), float(row["loss"])
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise AccountError(
            f"{losses} is damaged: expected {','.join(COLUMNS[:3])} in every row: {reason(error)}; restore the file"
        ) from error
    return rows
