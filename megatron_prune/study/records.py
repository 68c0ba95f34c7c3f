"""What a finished cell is worth: one record for the ledger, read from the files that its stages left.

A record holds numbers that a rerun reproduces, and apart from them, under ``seconds``, what it does
not. A stage has succeeded when its own artifact says so; exit codes are not asked (DESIGN §5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune import artifacts, candidates, plan
from megatron_prune.calibrate import statistics
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import indexed
from megatron_prune.errors import MegatronPruneError
from megatron_prune.masks import MASKS, open_masks
from megatron_prune.study.budgets import SampleRange
from megatron_prune.study.commands import CORPORA, Places
from megatron_prune.study.config import Study
from megatron_prune.study.grid import Pruning, TrainingCell, calibration_cell, shape_tag

Record = dict[str, Any]


def trained(path: Path, samples: SampleRange) -> bool:
    """True if an account says that exactly this range was trained on, to its end."""
    if not path.is_file():
        return False
    account = artifacts.read_json(path)
    return (
        account.get("complete") is True
        and account.get("range") == [samples.start, samples.end]
        and account.get("steps") == samples.steps
    )


def evaluated(path: Path, windows: int) -> bool:
    """True if scores of both corpora on that many windows are there, and are numbers."""
    if not path.is_file():
        return False
    corpora = artifacts.read_json(path).get("corpora", {})
    return all(
        corpora.get(name, {}).get("windows") == windows and _is_number(corpora[name].get("loss")) for name in CORPORA
    )


def calibrated(path: Path) -> bool:
    """True if statistics are there and whole."""
    return path.is_file() and _readable(statistics.read, path)


def asked(path: Path) -> bool:
    """True if candidates are there."""
    return path.is_file() and _readable(candidates.read, path)


def scored(path: Path, asked_by: Path) -> bool:
    """True if statistics with a score for each of these candidates are there."""
    if not calibrated(path):
        return False
    question, _ = candidates.read(asked_by)
    found = statistics.read(path)
    return not question.unscored(found)


def rescored(path: Path, asked_by: Path) -> bool:
    """True if statistics with the loss of all candidates that are to be retrained are there."""
    question, _ = candidates.read(asked_by)
    return scored(path, asked_by) and not question.unretrained(statistics.read(path))


def planned(path: Path) -> bool:
    """True if a plan is there and valid."""
    return path.is_file() and _readable(plan.read, path)


def applied(checkpoint: Path, plan_path: Path) -> bool:
    """True if a whole checkpoint of exactly that plan is there."""
    if not checkpoint.is_dir() or not planned(plan_path):
        return False
    try:
        found = open_checkpoint(checkpoint)
        found.verify()
    except MegatronPruneError:
        return False
    return bool(found.pruning) and found.pruning[-1].get("plan") == plan.read(plan_path).hash


def sparsified(checkpoint: Path, chosen: Pruning) -> bool:
    """True if a whole checkpoint is there that such a pruning made, with its masks."""
    if not checkpoint.is_dir():
        return False
    try:
        found = open_checkpoint(checkpoint)
        found.verify()
        made = found.pruning[-1] if found.pruning else {}
        asked = made.get("method"), made.get("pattern")
        return (
            asked == (chosen.method.name, chosen.method.pattern)
            and open_masks(checkpoint / MASKS).hash == made["masks"]
        )
    except MegatronPruneError:
        return False


def imported(checkpoint: Path) -> bool:
    """True if a whole checkpoint is there."""
    return checkpoint.is_dir() and _readable(lambda path: open_checkpoint(path).verify(), checkpoint)


def _readable(read: Any, path: Path) -> bool:
    try:
        read(path)
    except MegatronPruneError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def parent(study: Study, places: Places, account: Mapping[str, Any] | None, seconds: Mapping[str, float]) -> Record:
    """The parent: trained here or elsewhere (``account``), or only declared."""
    scores = artifacts.read_json(places.scores("parent"))
    record: Record = {"cell": "parent", "kind": "parent", **_losses(scores), "seconds": dict(seconds)}
    if account is not None:
        record |= _run(account) | {"declared": False}
    else:
        record |= {
            "tokens": study.parent.declared_tokens,
            "declared": True,
            "flops": None,
            "parameters": scores["parameters"],
            "parameters_nonzero": scores["parameters_nonzero"],
            "loss_initial": None,
        }
    record["unigram_loss"] = {
        name: unigram_loss(getattr(study.data, name), study.evaluation_seq_length * study.evaluation.windows)
        for name in CORPORA
    }
    return record


def calibration(study: Study, places: Places, seed: int, seconds: Mapping[str, float]) -> Record:
    """Statistics and what they cost."""
    cell = calibration_cell(study, seed)
    found = statistics.read(places.statistics(cell))
    return {
        "cell": cell,
        "kind": "calibration",
        "tokens": found.tokens,
        "flops": found.provenance()["flops"],
        "statistics": found.hash,
        "seconds": dict(seconds),
    }


def pruning(places: Places, chosen: Pruning, seconds: Mapping[str, float]) -> Record:
    """A plan, its checkpoint, and the losses of that before any retraining."""
    made = plan.read(places.plan(chosen))
    spent = made.calibration or {}
    return _pruning(places, chosen, asdict(made.target), seconds) | {
        "plan": made.hash,
        "removed_linears": made.removed_linears,
        "removed_all": made.removed_all,
        "near_ties": len(made.near_ties),
        "flops": sum(spent.get(part, {}).get("flops", 0) for part in ("scoring", "retraining")),  # beyond calibration
    }


def sparse_pruning(places: Places, chosen: Pruning, seconds: Mapping[str, float]) -> Record:
    """A checkpoint with masks, and its losses before any retraining."""
    made = open_checkpoint(places.checkpoint(chosen.cell)).pruning[-1]
    return _pruning(places, chosen, made["target"], seconds) | {
        "masks": made["masks"],
        "removed_linears": made["removed_linears"],
        "removed_all": made["removed_all"],
        "near_ties": None,  # masks are too many for a list of them
        "flops": made["flops"],
    }


def _pruning(places: Places, chosen: Pruning, target: Record, seconds: Mapping[str, float]) -> Record:
    return {
        "cell": chosen.cell,
        "kind": "pruning",
        "method": chosen.method.title,
        "pattern": chosen.method.pattern,
        "ratio": chosen.ratio,
        "seed": chosen.seed,
        "target": target,
        "shape": shape_tag(target),
        **_losses(artifacts.read_json(places.scores(chosen.cell))),
        "seconds": dict(seconds),
    }


def training(places: Places, cell: TrainingCell, seconds: Mapping[str, float]) -> Record:
    """A trained and evaluated run."""
    account = artifacts.read_json(places.account(cell.id))
    scores = artifacts.read_json(places.scores(cell.id))
    return {
        "cell": cell.id,
        "kind": cell.kind,
        "seed": cell.seed,
        **_run(account),
        **_losses(scores),
        "seconds": dict(seconds),
    }


def _run(account: Mapping[str, Any]) -> Record:
    return {
        "start": account["start"],
        "range": account["range"],
        "steps": account["steps"],
        "tokens": account["tokens"],
        "unique_tokens": account["unique_tokens"],
        "replayed": account["replayed"],
        "flops": account["flops_executed"],
        "flops_theoretical": account["flops_theoretical"],
        "parameters": account["parameters"],
        "parameters_nonzero": account["parameters_nonzero"],
        "loss_initial": account["initial_loss"],
        "loss_final": account["final_loss"],
    }


def _losses(scores: Mapping[str, Any]) -> Record:
    return {f"{name}_loss": scores["corpora"][name]["loss"] for name in CORPORA}


def unigram_loss(prefix: str, count: int) -> float:
    """Entropy in nats of the corpus's tokens 1 … ``count``, those that evaluation predicts.

    No model that ignores context can have a lower loss on them.
    """
    corpus = indexed.open_indexed(prefix)
    tokens = np.memmap(f"{prefix}.bin", dtype=corpus.index.dtype, mode="r")[1 : count + 1]
    counts = np.bincount(np.asarray(tokens, dtype=np.int64))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
