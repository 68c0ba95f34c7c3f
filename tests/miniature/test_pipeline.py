"""The miniature from its plan to its report, with made-up losses: every claim is answered."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune import artifacts
from megatron_prune.study import schema
from megatron_prune.study.analysis import results
from megatron_prune.study.report import page
from tests.miniature.test_miniature import plan
from tests.study import made_up, simulated

pytestmark = pytest.mark.slow  # a hundred cells


def corpus(prefix: Path, tokens: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(tokens // 1000):
        builder.add_document(torch.from_numpy(generator.integers(0, 1000, 1000)), [1000])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_every_claim_is_answered_in_the_report(tmp_path: Path) -> None:
    content = plan.cut(plan.read(seeds=2, scale=0.005), len(plan.CUTS))
    lengths = {"train": 420_000, "calibration": 50_000, "validation": 20_000, "test": 20_000}
    prefixes = {name: corpus(tmp_path / name, length, seed) for seed, (name, length) in enumerate(lengths.items())}
    content["data"] = {"seq_length": 256, **prefixes, "train": [prefixes["train"]]}
    for name in (
        "attention-dropout",
        "hidden-dropout",
        "max-position-embeddings",
    ):  # made-up runs have no checkpoint to restore these from
        del content["parent"]["pretrain"]["arguments"][name]
    study = schema.from_mapping(content)
    places = made_up.run(study, tmp_path / "runs", simulated.Launcher())
    found = results.collect(places)
    assert not found.left_out and not found.disbelieved
    labels = {question.label for question in study.compare}
    assert {contrast.asked.label for contrast in found.contrasts} == labels and len(labels) == 12
    assert all(contrast.gap.seeds == 2 and contrast.corrected is not None for contrast in found.contrasts)
    claimed = ("shortgpt", "minitron-width", "sparsegpt")
    subjects = [verdict.subject for verdict in found.verdicts if "equal training" in verdict.subject]
    assert all(any(subject.startswith(name) for subject in subjects) for name in claimed)
    page.write(found, places)
    written = artifacts.read_json(places.root / "report" / "results.json")
    assert len(written["compare"]) == len(found.contrasts)
    rows = list(csv.DictReader((places.root / "report" / "results.csv").open()))
    assert {row["seed"] for row in rows if row["arm"] == "scratch"} == {"1", "2"}
    assert all(row["status"] == "finished" for row in rows)
