"""``megatron-prune check-contamination``: find documents that the corpora of different stages share."""

from __future__ import annotations

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser

STAGES = ("train", "calibration", "validation", "test")


def parser() -> Parser:
    return Parser(
        "check-contamination",
        "Finds documents, equal or nearly so, that the corpora of different stages share, and exits with code 2 "
        "if two stages share more than allowed. Corpora are given by their prefixes, all with one tokenizer.",
        verbs.CheckContaminationSettings,
        example="megatron-prune check-contamination --train data/train --test data/test --json shared.json",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.CheckContaminationSettings.of(parser().read(argv)[0])
    from megatron_prune import artifacts
    from megatron_prune.data import contamination

    report = contamination.compare_stages(
        {stage: list(getattr(asked, stage)) for stage in STAGES if getattr(asked, stage)},
        similarity=asked.similarity,
        max_duplicates=asked.max_duplicates,
        max_near_duplicates=asked.max_near_duplicates,
    )
    if asked.json:
        artifacts.write_json(asked.json, report)
    for found in report["pairs"]:
        print(contamination.line(found))
    contamination.refuse(report)
    return 0
