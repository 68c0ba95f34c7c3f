"""Every run of a study against the stream, before the first of them is paid for, by the check that `pretrain` makes.

Each cell's range must end before the stream does and be unseen by everything that the cell starts from: the parent's
stages, and the retrainings between the links of its chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import DataError, UsageError
from megatron_prune.study.budgets import SampleRange
from megatron_prune.study.config import Study
from megatron_prune.study.prunings import Pruning, links, parent_cell
from megatron_prune.training import data, lineage

if TYPE_CHECKING:
    from megatron_prune.study.preflight import Outlook

Seen = list[dict[str, Any]]


def check(study: Study, outlook: Outlook) -> None:
    """DataError names a cell that `pretrain` would refuse, of several the one that ends last, and why."""
    stream = stream_of(study)
    for cell, samples, seen in sorted(_runs(study, outlook, stream), key=lambda run: -run[1].end):
        try:
            data.refuse_unfit(stream, samples.samples, seen, cell)
        except (UsageError, DataError) as error:
            raise DataError(
                f"data.train does not do for {cell}, samples {samples}: {error}. Give more text, smaller budgets or "
                "other data.epochs"
            ) from error


def stream_of(study: Study) -> dict[str, Any]:
    """What every account of the study will say of its stream."""
    made = study.data
    return data.described(made.blend, made.seq_length, made.stream_seed, made.epochs)


def _runs(study: Study, outlook: Outlook, stream: dict[str, Any]) -> Iterator[tuple[str, SampleRange, Seen]]:
    """Every cell that trains, with its samples and what is behind its weights."""
    lay, before = outlook.lay, lineage.trainings(outlook.stages)
    if study.parent.pretrain is not None:
        samples = lay.batch.range(0, lay.parent_end // lay.batch.samples)
        yield parent_cell(study, study.seeds[0]), samples, []
        before = [{"run": "parent", "stream": stream, "range": list(samples.samples)}]
    for pruning in links(study):
        retraining = outlook.needs[pruning.name].retraining
        if retraining:
            samples = lay.retrain(retraining.tokens, pruning.trained)
            yield f"methods.{pruning.method.tag}'s candidates", samples, _behind(pruning, outlook, stream, before)
    for cell in outlook.estimated_grid(study).cells:
        yield cell.id, cell.samples, [] if cell.kind == "scratch" else _behind(cell.source, outlook, stream, before)


def _behind(pruning: Pruning, outlook: Outlook, stream: dict[str, Any], before: Sequence[dict[str, Any]]) -> Seen:
    """The parent's trainings, and the retrainings between the links of a pruning."""
    made = [
        {"run": link.retraining_cell, "stream": stream, "range": list(retrained.samples)}
        for link in pruning.links
        if link.base is not None and link.retrained
        for retrained in [outlook.lay.retrain(link.retrained, link.base.trained)]
    ]
    return [*before, *made]
