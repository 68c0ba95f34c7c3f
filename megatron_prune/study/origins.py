"""What a pruned run rests on: its pruning, and the parent and the statistics that this was made of.

A cell that was removed and made anew leaves those that rest on it as they are. The ledger has the fingerprint of
every checkpoint and the hash of all statistics, so that such a mixture is seen and no verdict is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_prune.errors import AccountError
from megatron_prune.study.config import Study
from megatron_prune.study.prunings import Pruning, calibration_cell, source_cell



def refuse_others(study: Study, pruning: Pruning, records: Mapping[str, Record]) -> None:
    """AccountError where a pruning, or one that it starts from, was made of other weights or statistics than the
    ledger has of the cells that it rests on. What has no line yet is not looked at."""
    for link in pruning.links:
        for own, what, made_of, cell, key in _rests_on(study, link, records):
            found = records.get(cell)
            if found is not None and found[key] != made_of:
                raise AccountError(
                    f"{own} was made of other {what} than {cell} has now ({made_of} against {found[key]}): "
                    f"remove {own} and what rests on it, with their lines, to have them made again"
                )


def _rests_on(study: Study, link: Pruning, records: Mapping[str, Record]) -> Iterator[tuple[str, str, str, str, str]]:
    """(a cell, what of another it was made of, that as it was then, the other cell, its key in the ledger)."""
    between = link.retraining_cell
    if link.base is not None and between is not None and between in records:
        own = records[between]
        yield between, "weights", own["made_of"], link.base.cell, "fingerprint"
    if link.cell in records:
        own = records[link.cell]
        yield link.cell, "weights", own["made_of"], source_cell(study, link), "fingerprint"
        if own["statistics"] is not None:
            yield link.cell, "statistics", own["statistics"], calibration_cell(study, link), "statistics"
