"""Rows of a report: one side of one comparison each, and one for every parent, with everything that lies behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_prune.study.budgets import counted
from megatron_prune.study.config import Study
from megatron_prune.study.prunings import Pruning, flops_of, parent_cell, parent_cells

COLUMNS = (
    "study", "cell", "method", "pattern", "ratio", "ratio_of", "arm", "setting", "against", "seed", "status",
    "tokens_train", "tokens_total", "flops_total", "flops_train", "flops_train_theoretical", "params", "params_nonzero",
    "loss_initial", "validation_loss", "test_loss", "validation_loss_unretrained", "test_loss_unretrained",
    "tokens_parent", "tokens_pruning", "tokens_declared", "removed_linears", "removed_all", "shape",
    "seconds", "lr", "flops_pruning", "loss_spikes", "losses_not_finite",
)  # fmt: skip


def of_parents(study: Study, records: Mapping[str, Record]) -> Iterator[dict[str, Any]]:
    """The parents that are finished."""
    first = study.parent.pretrain.seed if study.parent.pretrain else None
    for cell, seed in parent_cells(study):
        if parent := records.get(cell):
            yield _row(study, parent, "parent", "finished", seed=None if first is None else first + seed) | {
                "tokens_train": parent["tokens"],
                "tokens_total": parent["tokens"],
                "tokens_parent": parent["tokens"],
                "tokens_declared": parent["declared"],
                "flops_total": parent["flops"],
            }


def of_comparison(
    study: Study, item: Compared, records: Mapping[str, Record], consumed: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The pruned side and the scratch side."""
    made = item.comparison
    pruning = records.get(made.pruning.cell, {})
    shared = {
        **{key: value for key, value in item.group.items() if key in COLUMNS},
        "ratio_of": study.ratio_of if made.pruning.ratio is not None else None,
        "seed": made.seed,
        **{key: pruning.get(key) for key in ("removed_linears", "removed_all", "shape")},
    }
    pruned, scratch = records.get(made.pruned), records.get(made.scratch or "")
    rows = [_row(study, pruned, "pruned", "finished" if pruned else "pending", cell=made.pruned, **shared)]
    if pruned:
        parent = records.get(parent_cell(study, made.seed), {})
        rows[0] |= _behind(study, made.pruning, parent, pruned, records, consumed)
    status = "finished" if scratch else "not run" if made.not_run else "pending"
    row = _row(study, scratch, "scratch", status, cell=made.scratch, **shared)
    if scratch:
        row |= {
            "tokens_train": scratch["tokens"],
            "tokens_total": scratch["tokens"],
            "flops_total": scratch["flops"],
        }
        row |= {"tokens_parent": 0, "tokens_pruning": 0, "flops_pruning": 0, "tokens_declared": False}
    return [*rows, row]


def _behind(
    study: Study,
    pruning: Pruning,
    parent: Record,
    pruned: Record,
    records: Mapping[str, Record],
    consumed: Mapping[str, int],
) -> dict[str, Any]:
    """Tokens and FLOPs of the whole pruned arm: the parent's, the pruning's (with retrainings between links) and its
    own."""
    record, spent = records.get(pruning.cell, {}), spent_on(study, pruning, records, consumed)
    tokens, known = consumed.get(pruning.name, 0), parent.get("tokens") is not None
    trained = (parent.get("tokens") or 0) + pruned["tokens"] + pruning.trained
    cells = [link.retraining_cell for link in pruning.links if link.retraining_cell]
    between = [records.get(cell, {}).get("flops") for cell in cells]
    spent = None if spent is None or None in between else spent + sum(flops for flops in between if flops)
    flops = [parent.get("flops"), spent, pruned["flops"]]
    return {
        "tokens_train": pruned["tokens"],
        "tokens_total": trained + counted(tokens, trained) if known else None,
        "tokens_parent": parent.get("tokens"),
        "tokens_pruning": tokens + pruning.trained,
        "tokens_declared": parent.get("declared"),
        "flops_pruning": spent,
        "flops_total": None if None in flops else sum(part for part in flops if part is not None),
        "validation_loss_unretrained": record.get("validation_loss"),
        "test_loss_unretrained": record.get("test_loss"),
    }


def spent_on(study: Study, pruning: Pruning, records: Mapping[str, Record], consumed: Mapping[str, int]) -> int | None:
    """FLOPs of a pruning and of those that it starts from, with their calibrations; None before they are finished."""
    spent: list[int | None] = []
    for link in pruning.links:
        own = consumed.get(link.name, 0) - (consumed.get(link.base.name, 0) if link.base else 0)
        # A sparse pruning reads text by itself: its own FLOPs have it.
        statistics = own > 0 and link.method.pattern is None
        spent.append(flops_of(records, study, link, statistics=statistics))
    return None if None in spent else sum(part for part in spent if part is not None)


def _row(study: Study, record: Record | None, arm: str, status: str, **known: Any) -> dict[str, Any]:
    record = record or {}
    seconds = record.get("seconds", {}).get("pretrain")
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"study": study.name, "cell": record.get("cell"), "arm": arm, "status": status, "seconds": seconds}
    row |= {key: record.get(key) for key in ("loss_initial", "validation_loss", "test_loss", "lr")}
    row |= {"params": record.get("parameters"), "params_nonzero": record.get("parameters_nonzero")}
    row |= {"flops_train": record.get("flops"), "flops_train_theoretical": record.get("flops_theoretical")}
    happened = record.get("anomalies", {})
    row |= {"loss_spikes": happened.get("spikes"), "losses_not_finite": happened.get("not_finite")}
    return row | known
