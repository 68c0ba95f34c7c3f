"""SmolLM2-135M pruned in depth and width: kept units against transformers and on five layouts, and losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune import artifacts
from megatron_prune.errors import EXIT_NEEDS_SCORES
from megatron_prune.methods.options import MinitronWidthOptions, NoOptions
from megatron_prune.settings import Settings
from megatron_prune.structured import apply, candidates, plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidate import with_scores
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics
from tests import reference
from tests.calibration.test_calibrate import hf_statistics
from tests.training.small import layout

pytestmark = pytest.mark.slow  # the model of test_import, at up to six ranks

SEQUENCES, LENGTH = 4, 96
LAYOUTS = {"tp1": (1, 1, 1), "tp3": (3, 1, 3), "pp2": (1, 2, 2), "dp2": (1, 1, 2), "tp3pp2": (3, 2, 6)}
CUTS: dict[str, tuple[str, Settings, dict[str, int]]] = {
    "3 of 30 layers": ("shortgpt", NoOptions(), {"num_layers": 27}),
    "half the layers": ("shortgpt", NoOptions(), {"num_layers": 15}),
    "a quarter of the FFN": ("minitron-width", MinitronWidthOptions(), {"ffn_hidden_size": 1152}),
    "about half in width": (
        "minitron-width", MinitronWidthOptions(),
        {"hidden_size": 448, "ffn_hidden_size": 1024, "num_attention_heads": 6},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(job, checkpoint, corpus, tmp_path_factory) -> dict[str, Statistics]:
    folder, found = tmp_path_factory.mktemp("statistics"), {}
    for name, (tp, pp, nproc) in LAYOUTS.items():
        output = folder / f"{name}.safetensors"
        argv = ["calibrate", "--load", checkpoint, "--calibration-data-path", corpus,
                "--calibration-sequences", SEQUENCES, "--calibration-seq-length", LENGTH]  # fmt: skip
        job([*argv, "--output", output, *layout(tp, pp)], nproc=nproc).ok()
        found[name] = statistics_file.read(output)
    return found


@pytest.fixture(scope="module")
def oracle(source, corpus) -> dict[str, np.ndarray]:
    """Statistics of transformers' model in float64, by plain torch."""
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16).astype(np.int64)
    windows = np.stack([tokens[k * LENGTH : (k + 1) * LENGTH + 1] for k in range(SEQUENCES)])
    return hf_statistics(source, windows)[0]


def made(found: Statistics, cut: str) -> plan.PruningPlan:
    method, settings, sizes = CUTS[cut]
    target = replace(found.shape, **sizes)  # type: ignore[arg-type]
    question = Question(method, settings, found.shape, (target,), found.parent)
    return plan.make(question, ratio=None, ratio_of="linears", statistics=found)


def units(of: plan.PruningPlan) -> dict[tuple[str, int | None], set[int]]:
    """Kept indices by unit and layer."""
    kept: dict[tuple[str, int | None], set[int]] = {("layer", None): set(of.kept_layers)}
    if of.kept_hidden is not None:
        kept["hidden", None] = set(of.kept_hidden)
    for unit, rows in (("head", of.kept_heads), ("ffn", of.kept_ffn)):
        kept |= {(unit, layer): set(row) for layer, row in zip(of.kept_layers, rows or (), strict=False)}
    return kept


def near(plans: Iterable[plan.PruningPlan]) -> set[tuple[str, int | None, int]]:
    """Units that the plans list as near-ties."""
    ties = [tie for one in plans for tie in one.near_ties]
    return {(tie.unit, tie.layer, unit) for tie in ties for unit in (tie.kept, tie.removed, *tie.others)}


@pytest.mark.parametrize("cut", CUTS)
def test_every_layout_keeps_the_same_but_for_listed_near_ties(calibrated, cut):
    plans = {name: made(found, cut) for name, found in calibrated.items()}
    allowed, expected = near(plans.values()), units(plans["tp1"])
    assert len(allowed) < 40  # of 47,000 channels
    for name, one in plans.items():
        found = units(one)
        assert found.keys() == expected.keys()
        differing = {(*where, unit) for where in found for unit in found[where] ^ expected[where]}
        assert differing <= allowed, (name, differing - allowed)


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_kept_agrees_with_plain_torch_statistics_of_transformers(calibrated, oracle, cut):
    one = made(calibrated["tp1"], cut)
    shape, target = one.source, one.target

    def top(scores: np.ndarray, count: int) -> set[int]:
        return set(np.argsort(-scores, kind="stable")[:count].tolist())

    expected = {("layer", None): top(oracle["block_influence"], target.num_layers)}
    score = {site: np.sqrt(oracle[f"{site}.sum_abs_mean_sq"]) for site in
             ("attention", "mlp", "input_layernorm", "pre_mlp_layernorm")}  # fmt: skip
    if target.hidden_size < shape.hidden_size:
        hidden = (score["input_layernorm"] + score["pre_mlp_layernorm"]).sum(0)
        expected["hidden", None] = top(hidden, target.hidden_size)
    if target.ffn_hidden_size < shape.ffn_hidden_size:
        expected |= {("ffn", i): top(score["mlp"][i], target.ffn_hidden_size) for i in range(30)}
    if target.num_attention_heads < shape.num_attention_heads:
        heads = np.linalg.norm(score["attention"].reshape(30, 9, 64), axis=2)  # [L, H]
        for i in range(30):
            expected["head", i] = {3 * g + h for g in range(3) for h in top(heads[i, 3 * g : 3 * g + 3], 2)}
    found, allowed = units(one), near([one])
    assert found.keys() == expected.keys()
    differing = {(*where, unit) for where in found for unit in found[where] ^ expected[where]}
    assert differing <= allowed, differing - allowed


def evaluated(
    job, checkpoint: Path, corpus: Path, output: Path, windows: int = SEQUENCES, length: int = LENGTH
) -> float:
    argv = ["evaluate", "--load", checkpoint, "--data-path", corpus, "--labels", "text"]
    job([*argv, "--seq-length", length, "--windows", windows, "--output", output]).ok()
    return artifacts.read_json(output)["corpora"]["text"]["loss"]


def transformers_loss(model: Any, corpus: Path, kept: Iterable[int], windows: int, length: int) -> float:
    """Mean loss of transformers' model with only these layers."""
    layers = model.model.layers
    try:
        model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
        return float(np.mean(reference.window_losses(model, corpus, length, windows)))
    finally:
        model.model.layers = layers


def test_the_mildly_pruned_model_still_reads_and_is_transformers_without_those_layers(
    job, calibrated, checkpoint, corpus, model, tmp_path
):
    """3 of 30 layers and a quarter of the FFN: the useful points without retraining."""
    dense = np.mean(reference.window_losses(model, corpus, LENGTH, SEQUENCES))
    losses = {}
    for cut in ("3 of 30 layers", "a quarter of the FFN"):
        one = made(calibrated["tp1"], cut)
        apply.apply_plan(checkpoint, one, tmp_path / cut)
        losses[cut] = evaluated(job, tmp_path / cut, corpus, tmp_path / "scores.json")
        assert dense < losses[cut] < dense + 1.0
    kept = made(calibrated["tp1"], "3 of 30 layers").kept_layers
    expected = transformers_loss(model, corpus, kept, SEQUENCES, LENGTH)
    assert losses["3 of 30 layers"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "choice",
    [
        ["--method", "minitron-depth", "--target-num-layers", "27"],
        ["--method", "minitron-width", "--search", "ffn", "heads", "--ratio", "0.1", "--max-candidates", "2"],
    ],
)
def test_scores_of_candidates_are_those_of_applied_checkpoints(job, checkpoint, corpus, tmp_path, choice):
    windows, length = 2, 64
    statistics, load = tmp_path / "s.safetensors", ["--load", checkpoint]
    text = ["--calibration-sequences", windows, "--calibration-seq-length", length]
    job(["calibrate", *load, "--calibration-data-path", corpus, *text, "--output", statistics]).ok()
    argv = ["plan", "--load", checkpoint, "--statistics", statistics, *choice, "--output", tmp_path / "plan.json"]
    assert job(argv).returncode == EXIT_NEEDS_SCORES
    job(["calibrate", *load, "--score", tmp_path / "candidates.json", "--statistics", statistics]).ok()
    found = statistics_file.read(statistics)
    offered = candidates.read(tmp_path / "candidates.json")[0].candidates(found)
    assert len(offered) == (28 if "minitron-depth" in choice else 2)
    for number in (0, len(offered) - 1):
        candidate, kept = offered[number], offered[number].selection
        one = plan.PruningPlan(
            str(choice[1]), {}, None, None, "linears", found.shape, candidate.target, found.parent,
            kept.layers, kept.hidden, kept.heads, kept.ffn,
        )  # fmt: skip
        apply.apply_plan(checkpoint, one, tmp_path / f"cut-{number}")
        loss = evaluated(job, tmp_path / f"cut-{number}", corpus, tmp_path / "scores.json", windows, length)
        assert found.scores[kept.key].loss == pytest.approx(loss, abs=1e-4), candidate.label


def test_depth_scores_and_their_choice_are_the_same_on_every_layout(job, checkpoint, corpus, model, tmp_path):
    """minitron-depth, 3 of 30 layers, four of the 28 starts."""
    windows, length, starts = 2, 64, (0, 9, 18, 27)
    statistics, load = tmp_path / "s.safetensors", ["--load", checkpoint]
    text = ["--calibration-sequences", windows, "--calibration-seq-length", length]
    job(["calibrate", *load, "--calibration-data-path", corpus, *text, "--output", statistics]).ok()
    choice = ["--method", "minitron-depth", "--target-num-layers", 27, "--output", tmp_path / "plan.json"]
    assert job(["plan", "--load", checkpoint, "--statistics", statistics, *choice]).returncode == EXIT_NEEDS_SCORES
    question, _ = candidates.read(tmp_path / "candidates.json")
    found = statistics_file.read(statistics)
    offered = question.candidates(found)
    others = [candidate for start, candidate in enumerate(offered) if start not in starts]
    with_scores(found, others, [99.0] * len(others)).write(statistics)  # candidates with a score are not run

    losses, chosen = {}, {}
    for name, (tp, pp, nproc) in LAYOUTS.items():
        output = tmp_path / f"{name}.safetensors"
        words = ["--score", tmp_path / "candidates.json", "--statistics", statistics, "--output", output]
        printed = job(["calibrate", *load, *words, *layout(tp, pp)], nproc=nproc).ok().output
        assert f"scored {len(starts)} candidates" in printed
        scored = statistics_file.read(output)
        losses[name] = [scored.scores[offered[start].selection.key].loss for start in starts]
        chosen[name] = plan.make(question, ratio=None, ratio_of="linears", statistics=scored).chosen
    for name in LAYOUTS:
        assert losses[name] == pytest.approx(losses["tp1"], rel=1e-5), name
        assert chosen[name] == chosen["tp1"] == starts[int(np.argmin(losses["tp1"]))], name
    for start in (9, 18):
        kept = [layer for layer in range(30) if not start <= layer < start + 3]
        expected = transformers_loss(model, corpus, kept, windows, length)
        assert losses["tp1"][starts.index(start)] == pytest.approx(expected, abs=1e-4)


def train_and_return(argv: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``pretrain`` in this rank; tokens and labels [1, S] of every training micro-batch."""
    from megatron_prune.__main__ import main
    from megatron_prune.engine import forward

    original, seen = forward.get_batch, []

    def recording(iterator: Any, vp_stage: int | None) -> dict[str, Any]:
        batch = original(iterator, vp_stage)
        seen.append((batch["tokens"].clone(), batch["labels"].clone()))
        return batch

    forward.get_batch = recording
    try:
        assert main(["pretrain", *argv]) == 0
    finally:
        forward.get_batch = original
    return seen


def test_the_first_retraining_step_has_the_parents_loss(distributed, model, checkpoint, corpus, tmp_path):
    """Nothing removed (plans that do so are refused): what retraining starts from is transformers' model."""
    argv = ["--pretrained-checkpoint", checkpoint, "--train-data-path", corpus,
            "--stream-range", "0:2", "--seq-length", LENGTH, "--global-batch-size", 2, "--micro-batch-size", 1,
            "--lr", 1e-5, "--num-workers", 0, "--eval-iters", 0, "--save", tmp_path / "run"]  # fmt: skip
    (batches,) = distributed(train_and_return, 1, [str(word) for word in argv])
    assert len(batches) == 2
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(tokens).logits[0], labels[0]).item() for tokens, labels in batches
        ]
    account = artifacts.read_json(tmp_path / "run" / "account.json")
    assert account["start"] == "continued" and account["steps"] == 1
    assert account["initial_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
