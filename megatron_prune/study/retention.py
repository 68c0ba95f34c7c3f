"""Which checkpoints of the compared runs stay on the disk (``retention`` in study.yaml).

``all`` keeps every save. ``final`` keeps the last save of each run. ``none`` keeps no weights of a run once its line
is in the ledger: its account, losses and scores stay. Parents and pruned starts always stay, since a study that grows
starts new runs from them. Nothing is removed before a cell's line is written, and a removal that was cut short is
finished when the study is next run.
"""

from __future__ import annotations

import shutil

from megatron_prune.checkpoint.tracker import TRACKER_FILE
from megatron_prune.masks import MASKS
from megatron_prune.study.config import Study
from megatron_prune.study.places import Places
from megatron_prune.study.stages import Cell


def apply(study: Study, places: Places, cell: Cell) -> None:
    """Remove what ``retention`` does not keep of a cell that is finished."""
    if cell.kind != "training" or study.retention == "all":
        return
    checkpoint = places.checkpoint(cell.id)
    saves = sorted(checkpoint.glob("iter_*"))
    removed = saves if study.retention == "none" else saves[:-1]
    if study.retention == "none":
        (checkpoint / TRACKER_FILE).unlink(missing_ok=True)
        removed = [*saves, checkpoint / MASKS]
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path)
