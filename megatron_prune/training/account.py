"""The account of a training run: which samples it consumed, how, and at what cost.

``losses.csv`` grows by one row per step (in an object store several at a time, and before every save).
``account.json`` describes the run from the first step on, and after the last step marks it as complete. Both are in
the save directory. A run that was killed and resumed keeps one account: rows after the checkpoint that it resumed from
are dropped and listed as replayed (in a store, those that had been stored).
"""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_type_hints

import torch
from pydantic import Field

from megatron_prune import storage
from megatron_prune.artifacts import device, read_json, versions, write_bytes, write_json
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.errors import AccountError, UsageError
from megatron_prune.training.argument_roles import diff_arguments, find_recipe_change, is_schedule
from megatron_prune.training.objective import LM
from megatron_prune.untrusted import Keys, check

ACCOUNT = "account.json"
LOSSES = "losses.csv"
COLUMNS = ("step", "samples", "loss", "learning_rate", "grad_norm")

# What must stay the same when a run resumes; all but the last two follow from the flags.
_IDENTITY = (
    "range", "permutation_seed", "global_batch_size", "seq_length", "steps", "seed", "batching", "objective", "masks",
    "stream",
)  # fmt: skip


@dataclass
class Account:
    """The content of ``account.json``. Tokens are those trained on: samples × sequence length."""

    start: str  # pruned | random | continued
    stream: dict[str, Any] | None
    range: list[int] | None
    permutation_seed: int | None
    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    steps: int
    seed: int
    parameters: int
    flops_executed: int
    flops_theoretical: int
    unique_tokens: int
    arguments: dict[str, Any]
    initial: dict[str, Any] | None
    lineage: list[dict[str, Any]]  # stages before this run, oldest first (training/lineage.py); none: random weights
    masks: str | None = None
    domains: list[list[int]] | None = None  # of a blend: the samples of each corpus, in its own order, [first, end)
    batching: dict[str, Any] | None = None  # what the flags say about a schedule of batches
    schedule: dict[str, Any] | None = None  # and what came of it (training/scheduled_batches.py)
    objective: dict[str, Any] = field(default_factory=lambda: dict(LM))  # training/objective.py
    flops_teacher: int = 0  # the teacher's forward pass over the run's samples: in the run, or earlier for a cache
    flops_recomputed: int = 0  # activations that the backward passes computed again; in no sum that is compared
    flops_replayed: int = 0  # of the steps in ``replayed``, with their teacher and recomputation; likewise
    complete: bool = False
    tokens: int = 0
    tokens_computed: int = 0  # including replayed steps once more
    replayed: list[list[int]] = field(default_factory=list)
    parameters_nonzero: int | None = None
    initial_loss: float | None = None
    final_loss: float | None = None
    final: dict[str, Any] | None = None  # iteration, fingerprint and full_hash of the weights that the run saved last
    wall_seconds: float = 0.0
    attempts: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)  # of the attempt that wrote it; attempts may differ
    version: int = 1

    def __post_init__(self) -> None:
        self.tokens = self.steps * self.global_batch_size * self.seq_length
        self.tokens_computed = self.tokens

    def adopt(self, save: Path) -> dict[str, Any] | None:
        """Take over the account of an earlier attempt at the same run from ``save``; return the arguments in it.

        Raises UsageError if the account there is of another run.
        """
        path = save / ACCOUNT
        if not path.exists():
            return None
        earlier = read_account(path)
        refuse_other_run(save, {name: getattr(self, name) for name in _IDENTITY})
        for name in ("start", "initial", "lineage", "attempts", "replayed"):
            setattr(self, name, earlier[name])
        began: dict[str, Any] = earlier["arguments"]
        return began

    def write(self, save: Path) -> None:
        """Replace ``account.json``."""
        write_json(save / ACCOUNT, asdict(self))


_Span = Annotated[list[int], Field(min_length=2, max_length=2)]


class Device(TypedDict):
    """What ``artifacts.device`` says."""

    kind: str
    name: str
    capability: str


class _AnyStage(TypedDict):
    run: str
    start: str | None
    end: str | None
    tokens: int
    flops: int


class _TrainedStage(_AnyStage):
    kind: Literal["trained"]
    complete: bool
    stream: dict[str, Any] | None
    range: _Span | None
    steps: int
    global_batch_size: int
    seq_length: int
    seed: int
    masks: str | None
    recipe: Any


class _PrunedStage(_AnyStage):
    kind: Literal["pruned"]
    method: str
    source: dict[str, Any]
    masks: NotRequired[str | None]
    learned: NotRequired[dict[str, Any]]


class _Weights(TypedDict, total=False):
    iteration: int | None
    fingerprint: str
    full_hash: str


class _Attempt(TypedDict, total=False):
    began: float
    seconds: float
    from_step: int
    world_size: int | None
    device: Device | None
    versions: dict[str, str]
    ended: str  # why it ended before its last step, where the run itself ended it
    changed: dict[str, Any]  # arguments that differ from the account's, which are those of the launch that began


# The types of ``account.json``: those of the fields above, and more precisely where readers look inside.
_AccountFile = TypedDict(
    "_AccountFile",
    {
        **get_type_hints(Account),  # type: ignore[misc]  # mypy wants the fields spelled out again
        "range": _Span | None,
        "replayed": list[_Span],
        "initial": _Weights | None,
        "final": _Weights | None,
        "attempts": list[_Attempt],
        "lineage": list[Annotated[_TrainedStage | _PrunedStage, Field(discriminator="kind")]],
    },
    total=False,
)


def read_account(path: Path) -> dict[str, Any]:
    """The content of an ``account.json``. AccountError, with file and key, for a value of another type; the same for a
    key that is looked up and is not there."""
    content = check(_AccountFile, read_json(path), str(path), AccountError)
    return Keys(content, str(path), AccountError)


def refuse_other_run(save: Path, wanted: dict[str, Any]) -> None:
    """Raise UsageError if ``save`` holds the account of a run in which one of ``wanted`` differs."""
    path = save / ACCOUNT
    if not path.exists():
        return
    held = read_account(path)
    for name, value in wanted.items():
        found, value = (_without_paths(one) for one in (held.get(name), value))
        if found != value:
            found, value = show_difference(found, value)
            raise UsageError(
                "--save", got=f"{save}, which holds a run with {name} {found}",
                expected=f"a new directory, or one that holds a run with {name} {value}",
                do="give another --save, or --start-over DIR to move that run and begin again",
            )  # fmt: skip


def refuse_other_recipe(save: Path, arguments: dict[str, Any]) -> None:
    """UsageError if the run in ``save`` began with another recipe than this launch's ``arguments``."""
    if not (save / ACCOUNT).exists():
        return
    began = read_account(save / ACCOUNT)["arguments"]
    name = find_recipe_change(began, arguments)
    if name is None:
        return
    do = "repeat the command that began the run, or give another --save to begin a new one"
    if is_schedule(name):
        do += "; --override-opt_param-scheduler changes the schedule, and comparisons then refuse the run"
    raise UsageError(
        f"--{name.replace('_', '-')}", got=arguments[name], expected=began.get(name),
        why=f"the run in {save} began with that", do=do,
    )  # fmt: skip


def total_flops(account: Mapping[str, Any]) -> int:
    """FLOPs that count in a comparison: those of the run's samples, once, and of a teacher's forward pass over them."""
    return int(account["flops_executed"]) + int(account.get("flops_teacher", 0))


def is_complete(save: Path) -> bool:
    """True if the account in ``save`` marks its run as complete."""
    return (save / ACCOUNT).exists() and bool(read_account(save / ACCOUNT).get("complete"))


def close(save: Path, checkpoint: Checkpoint) -> None:
    """Complete the account of a run that was killed between its last save and its last write of the account.

    ``checkpoint`` is that last save; its weights are streamed to count the nonzero ones and to compute their hash.
    """
    account = Account(**read_account(save / ACCOUNT))
    recorder = AccountRecorder(account, save)
    rows = _complete_rows(save / LOSSES)
    account.initial_loss, account.final_loss = (_finite(float(row[2])) for row in (rows[0], rows[-1]))
    recorder.end_killed_attempt()
    nonzero = sum(int(torch.count_nonzero(block)) for name in checkpoint.names for block in checkpoint.row_blocks(name))
    final = {
        "iteration": checkpoint.iteration,
        "fingerprint": checkpoint.fingerprint(),
        "full_hash": checkpoint.full_hash(),
    }
    recorder.finish(final=final, parameters_nonzero=nonzero)


class AccountRecorder:
    """Writes a run's losses and its account, on the one rank that has the loss."""

    def __init__(self, account: Account, save: Path, began: dict[str, Any] | None = None):
        self.account, self.save = account, save
        self._began = began  # the arguments of the run's first launch, if this one continues it
        self.began = time.time()
        self._table: storage.GrowingText | None = None

    def step(self, step: int, loss: float, learning_rate: float | None, grad_norm: float | None) -> None:
        """Record one finished step (counted from 1)."""
        table = self._table or self._begin(step)
        row = (step, step * self.account.global_batch_size, loss, learning_rate, grad_norm)
        csv.writer(table).writerow(["" if value is None else value for value in row])
        if step == 1:
            self.account.initial_loss = _finite(loss)
        self.account.final_loss = _finite(loss)

    def settle(self) -> None:
        """Return when every step so far is in the stored table."""
        if self._table is not None:
            self._table.settle()

    def _begin(self, first: int) -> storage.GrowingText:
        """Open the table at this attempt's first step; drop the rows that it will replay."""
        path, account = self.save / LOSSES, self.account
        kept: list[list[str]] = []
        if path.exists():
            rows = _complete_rows(path)
            kept = [row for row in rows if int(row[0]) < first]
            lost = [int(row[0]) for row in rows if int(row[0]) >= first]
            if lost:
                account.replayed.append([first, max(lost)])
            self.end_killed_attempt()
            if kept and kept[0][0] == "1":
                account.initial_loss = _finite(float(kept[0][2]))
        table = io.StringIO()
        csv.writer(table).writerows([COLUMNS, *kept])
        write_bytes(path, table.getvalue().encode())
        self._table = storage.GrowingText(path, table.getvalue())
        now = account.arguments
        attempt = {
            "began": self.began,
            "from_step": first,
            "world_size": now.get("world_size"),  # an elastic job may continue with fewer nodes
            "device": device(),
            "versions": versions(),
        }
        if self._began is not None and first > 1:
            account.arguments = self._began
            if changed := diff_arguments(self._began, now):
                attempt["changed"] = changed
        account.attempts.append(attempt)
        account.write(self.save)
        return self._table

    def end_killed_attempt(self) -> None:
        """If the previous attempt was killed, record its time, up to its last row."""
        last = self.account.attempts[-1] if self.account.attempts else None
        if last is not None and "seconds" not in last:
            last["seconds"] = round(max((self.save / LOSSES).stat().st_mtime - last["began"], 0.0), 3)

    def end_attempt(self, why: str) -> None:
        """Write that the run has ended this attempt, and why; the run is not complete."""
        if self._table is not None:
            self._table.close()
            self.account.attempts[-1] |= {"seconds": round(time.time() - self.began, 3), "ended": why}
            self.account.write(self.save)

    def finish(self, *, final: dict[str, Any] | None, parameters_nonzero: int) -> None:
        """Close the table and write the account's final state.

        ``final``: the weights that the run saved after its last step; None for a run that stopped before that.
        """
        account = self.account
        if self._table is not None:
            self._table.close()
            account.attempts[-1]["seconds"] = round(time.time() - self.began, 3)
        account.wall_seconds = round(sum(a.get("seconds", 0.0) for a in account.attempts), 3)
        replayed = sum(last - first + 1 for first, last in account.replayed)
        account.tokens_computed = (account.steps + replayed) * account.global_batch_size * account.seq_length
        once = account.flops_executed + account.flops_recomputed
        once += 0 if "cache" in account.objective else account.flops_teacher
        account.flops_replayed = once * replayed // account.steps if replayed else 0
        account.parameters_nonzero = parameters_nonzero
        account.final = final
        account.complete = final is not None
        account.write(self.save)


def _complete_rows(path: Path) -> list[list[str]]:
    """Rows of the table without its header; a last row that a kill cut short is dropped."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.reader(io.StringIO(whole)) if len(row) == len(COLUMNS)][1:]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _without_paths(value: Any) -> Any:
    """A stream without the paths of its corpora, whose content is compared: the data may have been moved."""
    if not isinstance(value, dict) or "blend" not in value:
        return value
    return {**value, "blend": [weight for weight, _ in value["blend"]]}


_SHOWN = 60  # characters


def show_difference(one: Any, other: Any) -> tuple[str, str]:
    """Both values as text: of mappings the keys that differ, of long texts what is around the first difference."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        one, other = ({key: value.get(key) for key in keys} for value in (one, other))
    texts = str(one), str(other)
    first = len(os.path.commonprefix(texts))
    start = max(0, first - _SHOWN // 3) if max(map(len, texts)) > _SHOWN else 0
    shown = [f"{'…' * bool(start)}{text[start:][:_SHOWN]}{'…' * (len(text) > start + _SHOWN)}" for text in texts]
    return shown[0], shown[1]
