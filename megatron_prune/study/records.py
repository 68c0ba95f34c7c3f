"""The record of a finished cell, read from the files of its stages.

A record holds numbers that a rerun reproduces; the others are separate, under ``seconds``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.data import indexed
from megatron_prune.errors import AccountError
from megatron_prune.masks import open_masks
from megatron_prune.structured import plan, statistics
from megatron_prune.study import custody
from megatron_prune.study.grid import Teaching, TrainingCell, shape_tag
from megatron_prune.study.prunings import Places, Pruning, calibration_cell, parent_cell
from megatron_prune.study.sample_ranges import Lay
from megatron_prune.study.schema import StudyConfig
from megatron_prune.study.sections import CORPORA
from megatron_prune.training import lineage, objective, teacher_cache
from megatron_prune.training.account import ACCOUNT, read_account

Record = dict[str, Any]
SHOWN_OF_A_STAGE = ("kind", "method", "tokens", "flops", "range", "start", "end")
TEXT = ("fingerprint", "windows", "seq_length")  # of a corpus: they identify the predicted tokens


def parent(study: StudyConfig, places: Places, seed: int, lay: Lay, seconds: Mapping[str, float]) -> Record:
    """A parent with the history of all its stages: trained here or elsewhere, or only declared."""
    cell = parent_cell(study, seed)
    scores = custody.read_scores(places.scores(cell))
    record: Record = {"cell": cell, "kind": "parent", **_evaluated(scores), "seconds": dict(seconds)}
    if study.parent.pretrain is not None:
        record["anomalies"] = count(places.losses(cell))
        record["seconds"] |= _training_seconds(read_account(places.account(cell)))
    checkpoint = open_checkpoint(places.parent(study, seed))
    stages = lineage.of(checkpoint)
    account = checkpoint.root / ACCOUNT
    if account.is_file():
        record |= _run(read_account(account))
    else:
        record |= {"parameters": scores["parameters"], "parameters_nonzero": scores["parameters_nonzero"]}
        record |= {"loss_initial": None}
    known = lineage.begins_at_random(stages)
    record |= {
        "tokens": lay.parent_tokens,
        "flops": lineage.flops(stages) if known else None,
        "declared": not known,
        "stages": [{key: stage.get(key) for key in SHOWN_OF_A_STAGE} for stage in stages],
    }
    record["unigram_loss"] = {name: _unigram_loss(study, name, record["text"][name]["fingerprint"]) for name in CORPORA}
    return record


def _unigram_loss(study: StudyConfig, name: str, scored: str) -> float | None:
    """None if the scored text no longer exists."""
    prefix = getattr(study.data, name)
    if not Path(f"{prefix}.bin").is_file() or indexed.fingerprint(prefix) != scored:
        return None
    return unigram_loss(prefix, study.evaluation_seq_length * study.evaluation.windows)


def calibration(study: StudyConfig, places: Places, made_for: Pruning, seconds: Mapping[str, float]) -> Record:
    """Statistics and their cost."""
    cell = calibration_cell(study, made_for)
    found = statistics.read(places.statistics(cell))
    return {
        "cell": cell,
        "kind": "calibration",
        "tokens": found.tokens,
        "flops": calibration_flops(places.statistics(cell)),
        "statistics": found.hash,
        "seconds": dict(seconds),
    }


def calibration_flops(path: Path) -> int:
    """FLOPs of statistics."""
    return int(statistics.read(path).provenance()["flops"])


def pruning_flops(places: Places, chosen: Pruning) -> int | None:
    """FLOPs of a pruning beyond its calibration; None before it is made."""
    if chosen.method.pattern is None:
        if not places.plan(chosen).is_file():
            return None
        spent = plan.read(places.plan(chosen)).calibration or {}
        if chosen.method.tokens:  # what is behind the masks is the pruning's own, and no calibration's
            return int(spent["flops"])
        return int(sum(spent.get(part, {}).get("flops", 0) for part in ("scoring", "retraining")))
    if find_iteration(places.checkpoint(chosen.cell)) is None:
        return None
    return int(open_checkpoint(places.checkpoint(chosen.cell)).pruning[-1]["flops"])


def pruning(places: Places, chosen: Pruning, seconds: Mapping[str, float]) -> Record:
    """A plan, its checkpoint, and the checkpoint's losses before any retraining."""
    made = plan.read(places.plan(chosen))
    source = made.parent
    if chosen.method.tokens:  # the plan is for what was trained under the masks
        source = open_checkpoint(places.checkpoint(chosen.cell)).pruning[-1]["parent"]["fingerprint"]
    return _pruning(places, chosen, asdict(made.target), seconds) | {
        "plan": made.hash,
        "made_of": source,
        "statistics": None if chosen.method.tokens else made.statistics,  # masks are no calibration's
        "removed_linears": made.removed_linears,
        "removed_all": made.removed_all,
        "near_ties": len(made.near_ties),
        "flops": pruning_flops(places, chosen),
        **_chained(places, chosen),
    }


def sparse_pruning(places: Places, chosen: Pruning, seconds: Mapping[str, float]) -> Record:
    """A checkpoint with masks, and its losses before any retraining."""
    made = open_checkpoint(places.checkpoint(chosen.cell)).pruning[-1]
    return _pruning(places, chosen, made["target"], seconds) | {
        "masks": made["masks"],
        "made_of": made["parent"]["fingerprint"],
        "statistics": None,  # it reads the text itself
        "removed_linears": made["removed_linears"],
        "removed_all": made["removed_all"],
        "near_ties": None,  # not listed for masks: there would be too many
        "flops": pruning_flops(places, chosen),
        **_chained(places, chosen),
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
        **_evaluated(custody.read_scores(places.scores(chosen.cell))),
        "seconds": dict(seconds),
    }


def _chained(places: Places, chosen: Pruning) -> Record:
    """What is left of the chain's original parent after a link; empty for a pruning of the parent itself."""
    if chosen.base is None:
        return {}
    masks = open_masks(places.masks(chosen)) if chosen.sparse else None
    removed = masks.removed if masks else 0
    first, last = (open_checkpoint(places.checkpoint(link.cell)).pruning[-1] for link in (chosen.links[0], chosen))
    before, after = ModelShape.read(first["source"]), ModelShape.read(last["target"])
    return {
        "base": chosen.base.cell,
        "masks": masks.hash if masks else None,
        "removed_linears": 1 - (after.linear_parameters() - removed) / before.linear_parameters(),
        "removed_all": 1 - (after.parameters() - removed) / before.parameters(),
    }


def teaching(places: Places, made: Teaching, seconds: Mapping[str, float]) -> Record:
    """What a teacher says, and what it cost once for all runs that read it."""
    found = teacher_cache.read_manifest(places.taught(made.id), teacher_cache.FLAG)
    assert found is not None  # the cell is done
    taught = found[0]
    return {
        "cell": made.id,
        "kind": "teaching",
        "made_of": taught.teacher["fingerprint"],
        "tokens": taught.tokens,
        "top_k": taught.k,
        **taught.described(),
        "seconds": dict(seconds),
    }


def training(places: Places, cell: TrainingCell, seconds: Mapping[str, float]) -> Record:
    """A trained and evaluated run."""
    account = read_account(places.account(cell.id))
    scores = custody.read_scores(places.scores(cell.id))
    if scores["masks"] != account["masks"]:
        held = f"under masks {account['masks'] or 'none'}", f"with masks {scores['masks'] or 'none'}"
        raise AccountError(f"{cell.id}: it was trained {held[0]}, but evaluated {held[1]}")
    return {
        "cell": cell.id,
        "kind": cell.kind,
        "seed": cell.seed,
        "lr": cell.lr,
        **_run(account),
        **_evaluated(scores),
        "made_of": (account["initial"] or {}).get("fingerprint"),
        "anomalies": count(places.losses(cell.id)),
        "seconds": {**seconds, **_training_seconds(account)},
    }


def _training_seconds(account: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of all attempts, including killed ones and repeated steps; the stage's own are of its last attempt."""
    return {"pretrain": account["wall_seconds"]}


def _run(account: Mapping[str, Any]) -> Record:
    asked = objective.of(account)
    return {
        "objective": objective.words(asked),
        "teacher": asked.get("teacher"),
        "flops_teacher": account.get("flops_teacher", 0),
        "start": account["start"],
        "range": account["range"],
        "steps": account["steps"],
        "tokens": account["tokens"],
        "unique_tokens": account["unique_tokens"],
        "flops": account["flops_executed"],
        "flops_theoretical": account["flops_theoretical"],
        "parameters": account["parameters"],
        "parameters_nonzero": account["parameters_nonzero"],
        "loss_initial": account["initial_loss"],
        "loss_final": account["final_loss"],
    }


def _evaluated(scores: Mapping[str, Any]) -> Record:
    """Losses and tasks' results, with the weights and the text they are for."""
    corpora = scores["corpora"]
    record = {
        **{f"{name}_loss": corpora[name]["loss"] for name in CORPORA},
        "fingerprint": scores["checkpoint"]["fingerprint"],
        "text": {name: {key: corpus[key] for key in TEXT} for name, corpus in corpora.items()},
    }
    if more := {name: corpus["loss"] for name, corpus in corpora.items() if name not in CORPORA}:
        record["corpora"] = more
    if tasks := scores.get("tasks"):
        record["tasks"] = tasks["results"]
        record["text"]["tasks"] = asked_of(tasks)
    return record


def asked_of(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the questions that a model was asked, and how: of the same form as a corpus's ``TEXT``."""
    results, questions = tasks["results"], tasks["questions"]
    same = {
        "questions": {name: own["fingerprint"] for name, own in questions.items()},
        "versions": {name: [own["version"], own["num_fewshot"]] for name, own in results.items()},
        **{key: tasks[key] for key in ("lm_eval", "limit", "longest")},
        "tokenizer": tasks["tokenizer"]["fingerprint"],
    }
    number = sum(results[name]["samples"] for name in questions)
    return {"fingerprint": artifacts.sha256_json(same), "windows": number, "seq_length": tasks["longest"]}


def unigram_loss(prefix: str, count: int) -> float:
    """Entropy in nats of the corpus's tokens 1 … ``count``, the ones that evaluation predicts.

    No model that ignores context can have a lower loss on them.
    """
    corpus = indexed.open_indexed(prefix)
    tokens = np.memmap(f"{prefix}.bin", dtype=corpus.index.dtype, mode="r")[1 : count + 1]
    counts = np.bincount(np.asarray(tokens, dtype=np.int64))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


# Loss spikes and losses that are not finite.
#
# Megatron stops a run at the first loss or gradient that is not finite; the runner restarts it from its last save, and
# the cell fails after ``launch.retries``. Spikes are only counted: no batch is skipped and the run is not rolled back.
# The recipe has the flags behind this, and ``match`` compares all of them.


WINDOW, DEVIATIONS, LEAST = 64, 10.0, 0.1
CHUNK = 4096  # steps whose windows are processed together


def count(losses: Path) -> dict[str, int]:
    """Steps of a ``losses.csv`` whose loss was not finite, and spikes.

    A spike is a loss above the median of the ``WINDOW`` steps before it by ``DEVIATIONS`` times their median absolute
    deviation, and by at least ``LEAST`` nats. None are counted in the first quarter of a window.
    """
    values = np.array([float(row["loss"]) for row in custody.read_losses(losses)])
    finite = np.where(np.isfinite(values), values, np.nan)
    padded = np.concatenate([np.full(WINDOW, np.nan), finite])
    spikes = 0
    for start in range(0, len(values), CHUNK):
        own = finite[start : start + CHUNK]
        before = np.lib.stride_tricks.sliding_window_view(padded[start : start + len(own) + WINDOW - 1], WINDOW)
        enough = np.isfinite(own) & (np.isfinite(before).sum(axis=1) >= WINDOW // 4)
        whole = np.isfinite(before).all(axis=1)
        for rows, median in ((enough & whole, np.median), (enough & ~whole, np.nanmedian)):  # the former is faster
            middle = median(before[rows], axis=1)
            spread = median(np.abs(before[rows] - middle[:, None]), axis=1)
            spikes += int((own[rows] - middle > np.maximum(DEVIATIONS * spread, LEAST)).sum())
    return {"not_finite": int(np.isnan(finite).sum()), "spikes": spikes}
