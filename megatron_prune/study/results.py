"""From the ledger to results: rows, matched comparisons and verdicts. Imports no Megatron.

A row is one side of one comparison: the pruned and the scratch arm of every method, pattern, ratio, budget,
setting, kind of scratch (``against``) and seed, and one row for the parent. A run that serves several
comparisons (a pruned run under both settings, a scratch run for two methods of one shape) has a row in each;
``cell`` tells. A gap is only computed after the accounts have matched (``match``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prune import artifacts
from megatron_prune.study import config, grid, match, verdicts
from megatron_prune.study.budgets import Lay, counted
from megatron_prune.study.commands import Places
from megatron_prune.study.ledger import Ledger
from megatron_prune.study.verdicts import Verdict

COLUMNS = (
    "study", "cell", "method", "pattern", "ratio", "ratio_of", "arm", "setting", "against", "seed", "status",
    "tokens_train", "tokens_total", "flops_total", "flops_train", "flops_train_theoretical", "params", "params_nonzero",
    "loss_initial", "validation_loss", "test_loss", "validation_loss_unretrained", "test_loss_unretrained",
    "tokens_parent", "tokens_pruning", "tokens_declared", "removed_linears", "removed_all", "shape",
    "seconds",
)  # fmt: skip
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """A comparison with what came of it: ``status`` is finished, pending or not run."""

    comparison: grid.Comparison
    tokens: int  # of the retraining
    status: str
    match: tuple[match.Line, ...] = ()

    @property
    def group(self) -> dict[str, Any]:
        """What is the same for all seeds."""
        made = self.comparison
        method, pattern, ratio = made.pruning.subject
        return {
            "method": method,
            "pattern": pattern,
            "ratio": ratio,
            "setting": made.setting,
            "against": made.against,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Results:
    """Everything that a report shows."""

    study: config.Study
    lay: Lay
    parent: Record | None
    records: Mapping[str, Record]
    compared: tuple[Compared, ...]
    rows: tuple[dict[str, Any], ...]
    verdicts: tuple[Verdict, ...]


def collect(places: Places) -> Results:
    """Read a study's folder. AccountError when two runs that should match do not."""
    study = config.from_mapping(artifacts.read_json(places.root / "study.json"), str(places.root / "study.json"))
    outlook = artifacts.read_json(places.root / "outlook.json")
    lay, consumed = Lay.from_json(outlook["lay"]), outlook["consumed"]
    records = Ledger(places.root / "ledger.jsonl").read()
    laid = grid.expand(study, lay, outlook["shapes"], consumed)
    accounts = _Accounts(study, places)
    compared = tuple(
        _compare(comparison, laid, lay, records, accounts, consumed.get(comparison.pruning.name, 0))
        for comparison in laid.comparisons
    )
    parent = records.get("parent")
    rows = [_parent_row(study, parent)] if parent else []
    for item in compared:
        rows += _rows(study, item, records, consumed.get(item.comparison.pruning.name, 0))
    return Results(study, lay, parent, records, compared, tuple(rows), tuple(_verdicts(compared, records)))


class _Accounts:
    """Accounts of finished runs, each read once."""

    def __init__(self, study: config.Study, places: Places):
        self.places = places
        path = places.parent(study) / "account.json"
        self.parent = artifacts.read_json(path) if study.parent.import_hf is None and path.is_file() else None
        self._read: dict[str, Any] = {}

    def of(self, cell: str) -> Any:
        if cell not in self._read:
            self._read[cell] = artifacts.read_json(self.places.account(cell))
        return self._read[cell]


def _compare(
    made: grid.Comparison,
    laid: grid.Grid,
    lay: Lay,
    records: Mapping[str, Record],
    accounts: _Accounts,
    consumed: int,
) -> Compared:
    tokens = next(cell.samples.steps for cell in laid.cells if cell.id == made.pruned) * lay.batch.tokens
    if made.scratch is None:
        return Compared(made, tokens, "not run" if made.pruned in records else "pending")
    if made.pruned not in records or made.scratch not in records:
        return Compared(made, tokens, "pending")
    runs = match.Runs(
        made.pruned,
        made.scratch,
        accounts.of(made.pruned),
        accounts.of(made.scratch),
        masks=records[made.pruning.cell].get("masks"),
        dense=made.against == "dense",
    )
    if made.setting == "equal-training":
        lines = match.equal_training(runs, accounts.parent)
    else:
        assert lay.parent_tokens is not None
        lines = match.equal_total(runs, accounts.parent, lay.parent_tokens, consumed, declared=accounts.parent is None)
    return Compared(made, tokens, "finished", tuple(lines))


def _parent_row(study: config.Study, parent: Record) -> dict[str, Any]:
    return _row(
        study,
        parent,
        "parent",
        "finished",
        seed=study.parent.pretrain.seed if study.parent.pretrain else None,
    ) | {
        "tokens_train": parent["tokens"],
        "tokens_total": parent["tokens"],
        "tokens_parent": parent["tokens"],
        "tokens_declared": parent["declared"],
        "flops_total": parent["flops"],
    }


def _rows(study: config.Study, item: Compared, records: Mapping[str, Record], consumed: int) -> list[dict[str, Any]]:
    made, parent = item.comparison, records.get("parent", {})
    pruning = records.get(made.pruning.cell, {})
    shared = {
        **{key: value for key, value in item.group.items() if key != "tokens"},
        "ratio_of": study.ratio_of if made.pruning.ratio is not None else None,
        "seed": made.seed,
        **{key: pruning.get(key) for key in ("removed_linears", "removed_all", "shape")},
    }
    pruned, scratch = records.get(made.pruned), records.get(made.scratch or "")
    rows = [_row(study, pruned, "pruned", "finished" if pruned else "pending", cell=made.pruned, **shared)]
    if pruned:
        trained = (parent.get("tokens") or 0) + pruned["tokens"]
        known = parent.get("tokens") is not None
        flops = [parent.get("flops"), pruning.get("flops"), pruned["flops"]]
        if consumed and made.pruning.method.pattern is None:  # a sparse pruning's own FLOPs have them
            flops.append(records.get(grid.calibration_cell(study, made.seed), {}).get("flops"))
        rows[0] |= {
            "tokens_train": pruned["tokens"],
            "tokens_total": trained + counted(consumed, trained) if known else None,
            "tokens_parent": parent.get("tokens"),
            "tokens_pruning": consumed,
            "tokens_declared": parent.get("declared"),
            "flops_total": None if None in flops else sum(flops),
            "validation_loss_unretrained": pruning.get("validation_loss"),
            "test_loss_unretrained": pruning.get("test_loss"),
        }
    status = "finished" if scratch else "not run" if made.scratch is None else "pending"
    row = _row(study, scratch, "scratch", status, cell=made.scratch, **shared)
    if scratch:
        row |= {
            "tokens_train": scratch["tokens"],
            "tokens_total": scratch["tokens"],
            "flops_total": scratch["flops"],
        }
        row |= {"tokens_parent": 0, "tokens_pruning": 0, "tokens_declared": False}
    return [*rows, row]


def _row(study: config.Study, record: Record | None, arm: str, status: str, **known: Any) -> dict[str, Any]:
    record = record or {}
    seconds = record.get("seconds", {}).get("pretrain")
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"study": study.name, "cell": record.get("cell"), "arm": arm, "status": status, "seconds": seconds}
    row |= {key: record.get(key) for key in ("loss_initial", "validation_loss", "test_loss")}
    row |= {"params": record.get("parameters"), "params_nonzero": record.get("parameters_nonzero")}
    row |= {"flops_train": record.get("flops"), "flops_train_theoretical": record.get("flops_theoretical")}
    return row | known


def _verdicts(compared: tuple[Compared, ...], records: Mapping[str, Record]) -> list[Verdict]:
    """One verdict a group (see ``Compared.group``) of which some seeds have finished, in the study's order."""
    groups: dict[tuple[Any, ...], list[Compared]] = {}
    for item in compared:
        if item.status == "finished":
            groups.setdefault(tuple(item.group.values()), []).append(item)
    return [
        verdicts.judge(
            **items[0].group,
            pruned=[records[item.comparison.pruned] for item in items],
            scratch=[records[item.comparison.scratch or ""] for item in items],
        )
        for items in groups.values()
    ]


def to_json(results: Results) -> dict[str, Any]:
    """``results.json``: rows, verdicts, matches and seconds."""
    return {
        "version": 1,
        "study": results.study.name,
        "about": "One row a side of a comparison, and one for the parent; cell names the run behind a row. "
        "Losses are mean nats per predicted token on fixed windows.",
        "columns": list(COLUMNS),
        "rows": list(results.rows),
        "verdicts": [
            asdict(verdict) | {"words": f"{verdict.subject}: {verdict.words}"} for verdict in results.verdicts
        ],
        "comparisons": [
            {
                **item.group,
                "seed": item.comparison.seed,
                "pruned": item.comparison.pruned,
                "scratch": item.comparison.scratch,
                "status": item.status,
                "not_run": item.comparison.not_run or None,
                "match": [asdict(line) for line in item.match],
            }
            for item in results.compared
        ],
        "unigram_loss": results.parent["unigram_loss"] if results.parent else None,
        "stages": {cell: record["seconds"] for cell, record in results.records.items()},
    }
