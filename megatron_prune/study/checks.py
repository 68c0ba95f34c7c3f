"""Is a stage done? What it wrote says so, never an exit code (DESIGN §5).

A ``Check`` is a name and its arguments, so that it can lie in a cell's cell.json and be asked from any process.
Paths are relative to the directory that the study is run from, as those in command lines are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import AccountError, MegatronPruneError
from megatron_prune.masks import MASKS, open_masks
from megatron_prune.structured import candidates as candidate_file
from megatron_prune.structured import plan as plan_file
from megatron_prune.structured import statistics as calibrate
from megatron_prune.study import custody
from megatron_prune.study.commands import CORPORA


@dataclass(frozen=True)
class Check:
    """One of the functions below, by its name, with its arguments."""

    name: str
    arguments: Mapping[str, Any]

    def __call__(self) -> bool:
        return CHECKS[self.name](**self.arguments)


def trained(account: str, start: int, end: int, steps: int, seed: int, permutation_seed: int | None, lr: float) -> bool:
    """True if an account says that a run has come to its end.

    AccountError where that was another run than is asked for: it would never become this one. And where the account
    contradicts itself, or the losses beside it.
    """
    if not Path(account).is_file():
        return False
    found = artifacts.read_json(account)
    if found.get("complete") is not True:
        return False
    for name, asked, given in (
        ("range", [start, end], found.get("range")),
        ("steps", steps, found.get("steps")),
        ("seed", seed, found.get("seed")),
        ("permutation_seed", permutation_seed, found.get("permutation_seed")),
        ("lr", lr, found.get("arguments", {}).get("lr")),
    ):
        if given != asked:
            raise AccountError(
                f"{account}: expected a finished run with {name} {asked}, got {given}: remove its folder, or restore "
                "what was changed"
            )
    custody.check_account(Path(account))
    return True


def evaluated(scores: str, windows: int, checkpoint: str, account: str | None = None) -> bool:
    """True if scores of both corpora on that many windows are there, are numbers, and say of which text they are.

    AccountError where they are not of the weights that lie at ``checkpoint`` or that ``account`` says were saved, or
    contradict themselves.
    """
    if not Path(scores).is_file():
        return False
    corpora = artifacts.read_json(scores).get("corpora", {})
    there = all(
        corpora.get(name, {}).get("windows") == windows
        and _is_number(corpora[name].get("loss"))
        and "fingerprint" in corpora[name]
        for name in CORPORA
    )
    if there:
        custody.check_scores(Path(scores), CORPORA)
        custody.check_weights(Path(scores), Path(account) if account else None, Path(checkpoint))
    return there


def calibrated(statistics: str) -> bool:
    """True if statistics are there and whole."""
    return _readable(calibrate.read, statistics)


def asked(candidates: str) -> bool:
    """True if candidates are there."""
    return _readable(candidate_file.read, candidates)


def scored(statistics: str, candidates: str) -> bool:
    """True if statistics with a score for each of these candidates are there."""
    if not calibrated(statistics) or not asked(candidates):
        return False
    question, _ = candidate_file.read(candidates)
    return not question.unscored(calibrate.read(statistics))


def rescored(statistics: str, candidates: str) -> bool:
    """True if statistics with the loss of all candidates that are to be retrained are there."""
    if not scored(statistics, candidates):
        return False
    question, _ = candidate_file.read(candidates)
    return not question.unretrained(calibrate.read(statistics))


def planned(plan: str) -> bool:
    """True if a plan is there and valid."""
    return _readable(plan_file.read, plan)


def applied(checkpoint: str, plan: str) -> bool:
    """True if a whole checkpoint of exactly that plan is there."""
    if not Path(checkpoint).is_dir() or not planned(plan):
        return False
    try:
        found = open_checkpoint(checkpoint)
        found.verify()
    except MegatronPruneError:
        return False
    return bool(found.pruning) and found.pruning[-1].get("plan") == plan_file.read(plan).hash


def sparsified(checkpoint: str, method: str, pattern: str) -> bool:
    """True if a whole checkpoint is there that such a pruning made, with its masks."""
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


def imported(checkpoint: str) -> bool:
    """True if a whole checkpoint is there."""
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
    for check in (trained, evaluated, calibrated, asked, scored, rescored, planned, applied, sparsified, imported)
}
