"""Has a loaded parent seen the text of the study? Its lineage says what it was trained on.

On the study's own stream the ranges decide (``ranges``). The same corpora as another stream are refused: samples of two
orders cannot be told apart by their numbers. Other corpora are compared document by document, where they can still be
read; where they cannot, ``parent.declared_unseen`` has to say why nothing of the study's text is in them. A parent
without a lineage (from elsewhere) is taken as it is, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.data import contamination, indexed
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study.budgets import SampleRange
from megatron_prune.study.grid import Pruning, links, parent_cell
from megatron_prune.study.schema import Study
from megatron_prune.training import data, lineage
from megatron_prune.training.lineage import Stage


def end_on_stream(study: Study, stages: Sequence[Stage]) -> int:
    """The first sample of the study's stream after all that ``stages`` took of it."""
    trainings = [stage for stage in lineage.trainings(stages) if stage["stream"] is not None]
    if not trainings:
        return 0
    own = stream_of(study)["id"]
    return max((stage["range"][1] for stage in trainings if stage["stream"]["id"] == own), default=0)


def check_unseen(study: Study, stages: Sequence[Stage]) -> None:
    """UsageError or DataError where a stage has seen text of the study, or may have and nobody says that it has not."""
    trainings = lineage.trainings(stages)
    if not trainings:
        return
    own = stream_of(study)
    compared: set[str] = set()
    for stage in trainings:
        stream = stage["stream"]
        if stream is None:
            _need_a_word(study, stage, "it was not trained on a token stream, so that nothing says on which samples")
            continue
        if stream["id"] == own["id"]:
            continue
        if set(stream["corpora"]) & set(own["corpora"]):
            data = study.data
            raise UsageError(
                "data",
                got=f"stream seed {data.stream_seed}, length {data.seq_length}, epochs {data.epochs}",
                expected=f"the stream of {stage['run']}: {stream['blend']}, seed {stream['seed']}, length "
                f"{stream['seq_length']}, epochs {stream['epochs']}",
                why="in another order the retraining range would overlap what the parent was trained on",
            )
        for (_, prefix), content in zip(stream["blend"], stream["corpora"], strict=True):
            if content not in compared:
                compared.add(content)
                _compare(study, stage, prefix, content)


def _compare(study: Study, stage: Stage, prefix: str, content: str) -> None:
    """The documents of one corpus of the parent against all corpora of the study."""
    wrong = ""
    if not all(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx")):
        wrong = f"its corpus {prefix} is not there any more"
    elif indexed.fingerprint(prefix) != content:
        wrong = f"{prefix} is another corpus now"
    if wrong:
        _need_a_word(study, stage, f"{wrong}, and what its documents are cannot be compared with data.train")
        return
    for name, corpora in _corpora(study).items():
        for own in corpora:
            if shared := contamination.shared_documents(prefix, own):
                row, twin = shared[0]
                raise DataError(
                    f"{len(shared)} document(s) of data.{name} {own} are in {prefix}, which {stage['run']}, a training "
                    f"behind the parent, read (document {twin} is its document {row}): take them out of data.{name}"
                )


def _corpora(study: Study) -> dict[str, list[str]]:
    held: dict[str, Any] = {name: [getattr(study.data, name)] for name in ("calibration", "validation", "test")}
    return {"train": [prefix for _, prefix in study.data.train], **held}


def _need_a_word(study: Study, stage: Stage, why: str) -> None:
    if study.parent.declared_unseen is None:
        raise UsageError(
            "parent.declared_unseen", got="nothing",
            expected="the reason why the parent has seen no text of the study, which the report prints",
            why=f"{stage['run']} trained the parent, and {why}",
        )  # fmt: skip


# Every run of a study against the stream, before the first of them is paid for, by the check that `pretrain` makes.
#
# Each cell's range must end before the stream does and be unseen by everything that the cell starts from: the parent's
# stages, and the retrainings between the links of its chain.


if TYPE_CHECKING:
    from megatron_prune.study.outlook import Outlook

Seen = list[dict[str, Any]]


def check(study: Study, outlook: Outlook) -> None:
    """DataError names a cell that `pretrain` would refuse, of several the one that ends last, and why."""
    stream = stream_of(study)
    for cell, samples, seen in sorted(_runs(study, outlook, stream), key=lambda run: -run[1].end):
        try:
            data.refuse_unfit(stream, samples.samples, seen, cell)
        except (UsageError, DataError) as error:
            raise DataError(
                f"data.train is not enough for {cell}, samples {samples}: {error}. Give more text, smaller budgets or "
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
