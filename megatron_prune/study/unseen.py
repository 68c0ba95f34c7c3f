"""Has a loaded parent seen the text of the study? Its lineage says what it was trained on.

On the study's own stream the ranges decide (``ranges``). The same corpora as another stream are refused: samples of two
orders cannot be told apart by their numbers. Other corpora are compared document by document, where they can still be
read; where they cannot, ``parent.declared_unseen`` has to say why nothing of the study's text is in them. A parent
without a lineage (from elsewhere) is taken as it is, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prune.data import heldout, identity
from megatron_prune.errors import DataError, UsageError
from megatron_prune.study.config import Study
from megatron_prune.study.ranges import stream_of
from megatron_prune.training import lineage
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
                given=f"stream seed {data.stream_seed}, length {data.seq_length}, epochs {data.epochs}",
                allowed=f"the stream of {stage['run']}: {stream['blend']}, seed {stream['seed']}, length "
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
    elif identity.fingerprint(prefix) != content:
        wrong = f"{prefix} is another corpus now"
    if wrong:
        _need_a_word(study, stage, f"{wrong}, and what its documents are cannot be compared with data.train")
        return
    for name, corpora in _corpora(study).items():
        for own in corpora:
            if shared := heldout.shared_documents(prefix, own):
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
            "parent.declared_unseen", given="nothing",
            allowed="the reason why the parent has seen no text of the study, which the report prints",
            why=f"{stage['run']} is behind the parent, and {why}",
        )  # fmt: skip
