"""What a pruned run rests on: its pruning, and the parent and the statistics that this was made of.

A cell that was removed and made anew leaves those that rest on it as they are. The ledger has the fingerprint of
every checkpoint and the hash of all statistics, so that such a mixture is seen and no verdict is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_prune.errors import AccountError
from megatron_prune.study.config import Study
from megatron_prune.study.prunings import Pruning, calibration_cell, parent_cell

Record = Mapping[str, Any]


def source_cell(study: Study, pruning: Pruning) -> str:
    """The cell whose checkpoint a pruning starts from: its parent's, or that of the link before it."""
    return pruning.base.cell if pruning.base else parent_cell(study, pruning.seed)


def refuse_others(study: Study, pruning: Pruning, records: Mapping[str, Record]) -> None:
    """AccountError where a pruning, or one that it starts from, was made of other weights or statistics than the
    ledger has of the cells that it rests on. What has no line yet is not looked at."""
    for link in pruning.links:
        own = records.get(link.cell)
        if own is None:
            continue
        for what, made_of, cell, key in _rests_on(study, link, own):
            found = records.get(cell)
            if found is not None and found[key] != made_of:
                raise AccountError(
                    f"{link.cell} was made of other {what} than {cell} has now ({made_of} against {found[key]}): "
                    f"remove {link.cell} and what rests on it, with their lines, to have them made again"
                )


def _rests_on(study: Study, link: Pruning, own: Record) -> Iterator[tuple[str, str, str, str]]:
    yield "weights", own["made_of"], source_cell(study, link), "fingerprint"
    if own["statistics"] is not None:
        yield "statistics", own["statistics"], calibration_cell(study, link), "statistics"
