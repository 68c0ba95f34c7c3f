"""Scores of candidates: against transformers and against checkpoints that are actually cut, at every layout."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import EXIT_NEEDS_SCORES
from megatron_prune.structured import apply, candidates, plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidate import Candidate
from megatron_prune.structured.statistics import Statistics
from tests.calibration.verbs import Verbs

SEQUENCES, LENGTH, LAYERS = 5, 64, 4
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp1": (1, []),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, []),
    "tp2pp2": (4, [*TP2, *PP2]),
}
TEXT = ["--calibration-sequences", str(SEQUENCES), "--calibration-seq-length", str(LENGTH)]


def hf_loss(model: Any, corpus: Path) -> float:
    """Mean loss on the first windows of the corpus, read without our reader."""
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16).astype(np.int64)
    losses = []
    with torch.no_grad():
        for k in range(SEQUENCES):
            window = torch.from_numpy(tokens[k * LENGTH : (k + 1) * LENGTH + 1])
            losses.append(torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:]).item())
    return sum(losses) / len(losses)


def hf_without(folder: Path, removed: range) -> Any:
    """transformers' model in float64 with these layers deleted."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in removed)
    return model


@pytest.fixture
def verbs(job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path) -> Verbs:
    return Verbs(job, tiny_parent, tiny_corpus, tmp_path, TEXT, ["--divisible-by", "4"])


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in ("tp2", "pp2") else []) for name in LAYOUTS]
)
def test_depth_scores_are_the_losses_without_those_layers(
    verbs: Verbs, tiny_hf: Callable[..., Path], tiny_corpus: Path, layout: str
) -> None:
    verbs.calibrate()
    asked = verbs.make("--method", "minitron-depth", "--target-num-layers", "2")
    assert asked.returncode == EXIT_NEEDS_SCORES and "3 candidates have no score yet" in asked.output
    assert not verbs.plan.exists()
    nproc, flags = LAYOUTS[layout]
    tensors = verbs.statistics.read_bytes()
    verbs.score(*flags, nproc=nproc).ok()
    assert verbs.statistics.read_bytes() == tensors

    expected = [
        hf_loss(hf_without(tiny_hf("llama-gqa", layers=LAYERS), range(i, i + 2)), tiny_corpus) for i in range(3)
    ]
    found = {s.candidate: s.loss for s in statistics_file.read(verbs.statistics).scores.values()}
    assert list(found) == [f"without layers {i}-{i + 1}" for i in range(3)]
    assert list(found.values()) == pytest.approx(expected, rel=2e-6)

    shown = verbs.make("--method", "minitron-depth", "--ratio", "0.5").ok().output
    made = plan.read(verbs.plan)
    best = int(np.argmin(expected))
    assert made.kept_layers == tuple(i for i in range(LAYERS) if i not in (best, best + 1))
    assert made.chosen == best and [row.loss for row in made.candidates] == list(found.values())
    assert f"without layers {best}-{best + 1}" in shown and "candidates: 3" in shown


def count_blocks(argv: list[str]) -> int:
    """``calibrate`` in this rank; how often a block was run."""
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch.nn.modules.module import register_module_forward_hook

    from megatron_prune.__main__ import main

    calls = 0

    def count(module: torch.nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += isinstance(module, TransformerLayer)

    handle = register_module_forward_hook(count)
    try:
        assert main(["calibrate", *argv]) == 0
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("stages", [1, 2])
def test_depth_candidates_share_what_is_before_their_first_removed_layer(
    verbs: Verbs, distributed: Callable[..., list[int]], tmp_path: Path, stages: int
) -> None:
    verbs.calibrate()
    kept = LAYERS - 1
    verbs.make("--method", "minitron-depth", "--target-num-layers", kept)
    words = [*verbs.load, "--score", tmp_path / "candidates.json", "--statistics", verbs.statistics]
    words += ["--pipeline-model-parallel-size", stages]
    calls = sum(distributed(count_blocks, stages, [str(word) for word in words]))
    assert len(statistics_file.read(verbs.statistics).scores) == kept + 1
    apart = (kept + 1) * kept  # every candidate by itself
    # Shared: once up to the last start's first removed layer, then each start s has the kept - s layers after it.
    shared = (kept + 1) + kept * (kept + 1) // 2
    assert shared < apart and calls == SEQUENCES * (shared if stages == 1 else apart)


AXES = ["hidden", "ffn", "heads", "groups"]
SEARCH = ["--method", "minitron-width", "--search", *AXES, "--ratio", "0.4", "--tolerance", "0.1"]


def applied_losses(verbs: Verbs, found: Statistics, offered: list[Candidate]) -> list[float]:
    """Losses of checkpoints that are actually cut, by ``evaluate`` on the same windows."""
    parent, losses = open_checkpoint(verbs.parent), []
    for number, candidate in enumerate(offered):
        kept = candidate.selection
        made = plan.PruningPlan(
            "minitron-width", {}, None, None, "linears", parent.shape, candidate.target, found.parent,
            kept.layers, kept.hidden, kept.heads, kept.ffn,
        )  # fmt: skip
        save, scores = verbs.folder / f"cut-{number}", verbs.folder / f"cut-{number}.json"
        apply.apply_plan(verbs.parent, made, save)
        text = ["--data-path", verbs.corpus, "--seq-length", LENGTH, "--windows", SEQUENCES]
        verbs.job(["evaluate", "--load", save, *text, "--output", scores]).ok()
        (corpus,) = artifacts.read_json(scores)["corpora"].values()
        losses.append(corpus["loss"])
    return losses


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ("llama-gqa", ["tp1", "tp2pp2"]),
        pytest.param("llama-gqa", ["tp2", "pp2", "dp2"], marks=pytest.mark.slow),
        pytest.param("llama-mha-tied", ["tp1", "tp2", "pp2"], marks=pytest.mark.slow),
        ("llama-gqa-tied-rope", ["tp2pp2"]),
    ],
)
def test_width_scores_are_those_of_checkpoints_that_are_cut(
    job: Callable[..., Any],
    tiny_hf: Callable[..., Path],
    tiny_corpus: Path,
    tmp_path: Path,
    model: str,
    layouts: list[str],
) -> None:
    import_hf(tiny_hf(model, layers=2), tmp_path / "parent")
    verbs = Verbs(job, tmp_path / "parent", tiny_corpus, tmp_path, TEXT, ["--divisible-by", "4"])
    verbs.calibrate()
    choice = [*SEARCH, "--max-candidates", 7, "--tensor-model-parallel-size", 2]
    assert verbs.make(*choice).returncode == EXIT_NEEDS_SCORES
    question, _ = candidates.read(tmp_path / "candidates.json")
    unscored = statistics_file.read(verbs.statistics)
    offered = question.candidates(unscored)
    assert len(offered) == 7 and len({c.target.num_attention_heads for c in offered}) > 1
    assert all(c.selection.hidden is not None for c in offered[:3])
    expected = applied_losses(verbs, unscored, offered)

    for layout in layouts:
        nproc, flags = LAYOUTS[layout]
        output = tmp_path / f"{layout}.safetensors"
        verbs.score(*flags, "--output", output, nproc=nproc).ok()
        found = statistics_file.read(output)
        scores = [found.scores[c.selection.key] for c in offered]
        assert [score.loss for score in scores] == pytest.approx(expected, abs=2e-5)
        assert [score.candidate for score in scores] == [c.label for c in offered]
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in unscored.tensors.items())
    assert not statistics_file.read(verbs.statistics).scores  # --output left it alone
    assert max(expected) - min(expected) > 1e-3, "candidates that cost the same show nothing"

    verbs.statistics = output
    shown = verbs.make(*choice).ok().output
    made = plan.read(verbs.plan)
    best = int(np.argmin(expected))
    assert (made.chosen, made.target) == (best, offered[best].target)
    assert made.kept_ffn == offered[best].selection.ffn and "candidates: 7" in shown


def test_given_shapes_are_scored_like_a_searchs(verbs: Verbs, tmp_path: Path) -> None:
    verbs.calibrate()
    choice = ["--method", "minitron-width", "--target-shapes", "48/12/180", "72/6/96"]
    assert verbs.make(*choice).returncode == EXIT_NEEDS_SCORES
    question, _ = candidates.read(tmp_path / "candidates.json")
    unscored = statistics_file.read(verbs.statistics)
    offered = question.candidates(unscored)
    expected = applied_losses(verbs, unscored, offered)
    verbs.score(*TP2, nproc=2).ok()
    shown = verbs.make(*choice).ok().output
    made = plan.read(verbs.plan)
    assert [row.loss for row in made.candidates] == pytest.approx(expected, abs=2e-5)
    assert made.chosen == int(np.argmin(expected)) and made.target == offered[made.chosen].target
    assert (made.ratio, made.settings["target_shapes"]) == (None, ["48/12/180", "72/6/96"])
    assert [(s.hidden_size, s.num_attention_heads, s.ffn_hidden_size) for s in question.targets] == [
        (48, 12, 180), (72, 6, 96),
    ]  # fmt: skip
    assert "candidates: 2, by the loss" in shown


def test_sizes_of_layers_are_searched_as_they_are_cut(
    verbs: Verbs, tmp_path: Path, tiny_hf: Callable[..., Path]
) -> None:
    """``flap --allocation search``: the losses, with means in place of what goes, are those of the cut checkpoints."""
    verbs.calibrate()
    choice = ["--method", "flap", "--ratio", 0.4, "--allocation", "search", "--search-generations", 3, "--seed", 5]
    choice += ["--tensor-model-parallel-size", 2]
    losses: dict[str, float] = {}
    for layout in ("tp2pp2", "dp2"):
        assert verbs.make(*choice).returncode == EXIT_NEEDS_SCORES
        nproc, flags = LAYOUTS[layout]
        before, verbs.statistics = verbs.statistics, tmp_path / f"{layout}.safetensors"
        asked = ["--score", tmp_path / "candidates.json", "--statistics", before, "--output", verbs.statistics]
        verbs.job(["calibrate", *verbs.load, *asked, *flags], nproc=nproc).ok()
        scores = statistics_file.read(verbs.statistics).scores
        assert len(scores) > 20 and losses.keys() <= scores.keys()
        for key, loss in losses.items():  # the first rounds are the same everywhere
            assert scores[key].loss == pytest.approx(loss, abs=2e-5)
        losses, shown = {key: one.loss for key, one in scores.items()}, verbs.make(*choice).ok().output
        verbs.statistics = before
    made = plan.read(verbs.plan)
    assert made.chosen is not None and made.compensation is not None and "candidates: " in shown
    apply.apply_plan(verbs.parent, made, tmp_path / "cut")
    text = ["--data-path", verbs.corpus, "--seq-length", LENGTH, "--windows", SEQUENCES]
    verbs.job(["evaluate", "--load", tmp_path / "cut", *text, "--output", tmp_path / "cut.json"]).ok()
    (corpus,) = artifacts.read_json(tmp_path / "cut.json")["corpora"].values()
    best = made.candidates[made.chosen]
    assert best.loss == pytest.approx(corpus["loss"], abs=2e-5) and best.loss < made.candidates[0].loss


HALVED = ["--method", "minitron-width", "--search", "hidden", "ffn", "heads", "--ratio", "0.4", "--tolerance", "0.05"]
HALVED += ["--divisible-by", "12"]


def given(found: list[Candidate]) -> list[object]:
    """The same shapes by name, which are all scored on all windows."""
    shapes = [c.target for c in found]
    words = [f"{s.hidden_size}/{s.num_attention_heads}/{s.ffn_hidden_size}" for s in shapes]
    return ["--method", "minitron-width", "--divisible-by", "12", "--target-shapes", *words]


@pytest.mark.parametrize("layout", ["tp2pp2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("tp1", "dp2"))])
def test_a_search_on_more_and_more_text_finds_what_scoring_everything_finds(
    verbs: Verbs, tmp_path: Path, layout: str
) -> None:
    windows, first = 12, 4
    verbs.text = ["--calibration-data-path", verbs.corpus, "--calibration-seq-length", 32]
    exhaustive: dict[int, list[float]] = {}
    for number in (first, windows):
        verbs.text[4:] = ["--calibration-sequences", number]
        verbs.statistics = tmp_path / f"{number}.safetensors"
        verbs.calibrate()
        if number == first:  # other windows say otherwise which channels go: the search's decide
            continue
        assert verbs.make(*HALVED).returncode == EXIT_NEEDS_SCORES
        search, _ = candidates.read(tmp_path / "candidates.json")
        offered = search.candidates(statistics_file.read(verbs.statistics))
        assert len(offered) == 15
    whole = statistics_file.read(verbs.statistics)
    for number in (first, windows):
        few = statistics_file.read(tmp_path / f"{number}.safetensors")
        verbs.statistics = tmp_path / f"every-{number}.safetensors"
        replace(few, tensors=whole.tensors).write(verbs.statistics)
        assert verbs.make(*given(offered)).returncode == EXIT_NEEDS_SCORES
        verbs.score().ok()
        scores = statistics_file.read(verbs.statistics).scores
        exhaustive[number] = [scores[c.key].loss for c in offered]

    verbs.statistics = tmp_path / "12.safetensors"
    assert verbs.make(*HALVED).returncode == EXIT_NEEDS_SCORES
    nproc, flags = LAYOUTS[layout]
    assert "scored 15 candidates" in verbs.score(*flags, nproc=nproc).ok().output
    shown = verbs.make(*HALVED).ok().output
    made = plan.read(verbs.plan)
    best_five = set(sorted(range(15), key=lambda i: exhaustive[first][i])[:5])
    for i, row in enumerate(made.candidates):
        rounds = [(first, exhaustive[first][i])] + [(windows, exhaustive[windows][i])] * (i in best_five)
        assert row.rounds is not None and [n for n, _ in row.rounds] == [n for n, _ in rounds]
        assert [loss for _, loss in row.rounds] == pytest.approx([loss for _, loss in rounds], rel=2e-6)
    assert made.chosen == int(np.argmin(exhaustive[windows])) and "candidates: 15, by the loss" in shown
    assert made.target == offered[made.chosen].target


def stopped(argv: list[str], after: int) -> int:
    """``calibrate`` in this rank, stopped when it has written ``after`` files of scores; how many it has written."""
    from megatron_prune.__main__ import main
    from megatron_prune.calibration import run
    from megatron_prune.structured.statistics import Statistics

    write, written = Statistics.write, 0

    def count(self: Statistics, path: Any) -> None:
        nonlocal written
        if written == after:
            raise KeyboardInterrupt
        write(self, path)
        written += 1

    Statistics.write, run.KEEP_EVERY = count, 0  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        main(["calibrate", *argv])
    return written


def test_a_stopped_search_is_resumed(verbs: Verbs, distributed: Callable[..., list[int]], tmp_path: Path) -> None:
    verbs.text = ["--calibration-data-path", verbs.corpus, "--calibration-seq-length", 16]
    verbs.text += ["--calibration-sequences", 12]
    verbs.calibrate()
    assert verbs.make(*HALVED).returncode == EXIT_NEEDS_SCORES
    words = [*verbs.load, "--score", tmp_path / "candidates.json", "--statistics", verbs.statistics]
    words = [str(word) for word in (*words, "--output", tmp_path / "out.safetensors")]
    assert distributed(stopped, 1, words, 17) == [17]  # in the second round
    found = statistics_file.read(tmp_path / "out.safetensors")
    assert len(found.scores) == 15 and sum(score.windows is None for score in found.scores.values()) == 2
    assert distributed(stopped, 1, words, 100) == [3 + 1]  # the rest, and the file at the end
    verbs.score().ok()  # without a stop
    whole, resumed = (statistics_file.read(path) for path in (verbs.statistics, tmp_path / "out.safetensors"))
    assert resumed.scores == whole.scores and resumed.scores != found.scores


def test_depth_and_width_are_searched_together(verbs: Verbs, tmp_path: Path) -> None:
    verbs.calibrate()
    choice = [
        "--method",
        "minitron-width",
        "--search",
        "depth",
        "hidden",
        "ffn",
        "--ratio",
        "0.4",
        "--divisible-by",
        12,
    ]
    assert verbs.make(*choice).returncode == EXIT_NEEDS_SCORES
    verbs.score(*TP2, *PP2, nproc=4).ok()
    verbs.make(*choice).ok()
    made = plan.read(verbs.plan)
    question, _ = candidates.read(tmp_path / "candidates.json")
    found = statistics_file.read(verbs.statistics)
    offered = question.candidates(found)
    assert {c.target.num_layers for c in offered} == {3, 4}
    expected = applied_losses(verbs, found, offered)
    assert [row.loss for row in made.candidates] == pytest.approx(expected, abs=2e-5)
    assert made.chosen == int(np.argmin(expected))
    # The layer that goes is minitron-depth's.
    verbs.make("--method", "minitron-depth", "--target-num-layers", 3).ok()  # its losses are known
    assert {c.selection.layers for c in offered if c.target.num_layers == 3} == {plan.read(verbs.plan).kept_layers}


def test_masked_width_is_transformers_sliced_model(verbs: Verbs, tiny_corpus: Path, tmp_path: Path) -> None:
    """The loss that scoring finds for the chosen shape, against the exported cut in float64."""
    import transformers

    verbs.calibrate()
    choice = ["--method", "minitron-width", "--search", "hidden", "ffn", "--ratio", "0.5", "--divisible-by", "12"]
    assert verbs.make(*choice).returncode == EXIT_NEEDS_SCORES
    verbs.score().ok()
    verbs.make(*choice).ok()
    made = plan.read(verbs.plan)
    assert made.chosen is not None and made.target.hidden_size < 96
    apply.apply_plan(verbs.parent, made, tmp_path / "cut")
    export_hf(tmp_path / "cut", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    assert made.candidates[made.chosen].loss == pytest.approx(hf_loss(model, tiny_corpus), rel=2e-6)


@pytest.mark.parametrize("layout", [pytest.param("tp1", marks=pytest.mark.slow), "tp2pp2"])
@pytest.mark.parametrize(
    "choice", [["--method", "minitron-depth", "--target-num-layers", "3"], [*SEARCH, "--max-candidates", "3"]]
)
def test_prune_does_the_three_steps_in_one_load(
    verbs: Verbs, job: Callable[..., Any], tmp_path: Path, choice: list[str], layout: str
) -> None:
    nproc, flags = LAYOUTS[layout]
    text = ["--calibration-data-path", verbs.corpus, *TEXT]
    words = ["prune", *verbs.load, *text, "--save", tmp_path / "cut", "--divisible-by", "4", *choice, *flags]
    output = job(words, nproc=nproc).ok().output
    assert output.count("successfully loaded checkpoint") == 1
    verbs.calibrate()
    tp = ["--tensor-model-parallel-size", "2"] if layout == "tp2pp2" else []
    verbs.make(*choice, *tp)
    verbs.score().ok()
    verbs.make(*choice, *tp).ok()
    by_hand, found = plan.read(verbs.plan), plan.read(tmp_path / "cut" / "pruning" / "plan.json")
    assert (found.chosen, found.target, found.kept_layers) == (by_hand.chosen, by_hand.target, by_hand.kept_layers)
    assert found.kept_ffn == by_hand.kept_ffn and found.kept_hidden == by_hand.kept_hidden
    expected = [row.loss for row in by_hand.candidates]
    assert [row.loss for row in found.candidates] == pytest.approx(expected, rel=2e-6)
    pruned = open_checkpoint(tmp_path / "cut")
    assert pruned.shape == found.target
    assert found.calibration is not None
    spent = found.calibration["flops"] + found.calibration["scoring"]["flops"]
    assert pruned.pruning[-1]["flops"] == spent > found.calibration["flops"]


@pytest.mark.parametrize(
    "choice", [["--method", "minitron-depth", "--target-num-layers", "2"], [*SEARCH, "--max-candidates", "3"]]
)
def test_bf16_scores_are_those_of_fp32_but_for_rounding(verbs: Verbs, tmp_path: Path, choice: list[str]) -> None:
    found = {}
    for name, flags in {"fp32": [], "bf16": ["--bf16"]}.items():
        verbs.statistics = tmp_path / f"{name}.safetensors"
        verbs.calibrate(*flags)
        if name == "bf16":  # its own statistics may put other units on the kept side of the cut
            same = statistics_file.read(tmp_path / "fp32.safetensors").tensors
            replace(statistics_file.read(verbs.statistics), tensors=same).write(verbs.statistics)
        verbs.make(*choice)
        verbs.score(*flags).ok()
        losses = statistics_file.read(verbs.statistics).scores.values()
        found[name] = {score.candidate: score.loss for score in losses}
    assert found["bf16"].keys() == found["fp32"].keys()
    for candidate, loss in found["fp32"].items():
        assert found["bf16"][candidate] == pytest.approx(loss, rel=5e-3) and found["bf16"][candidate] != loss


@pytest.mark.parametrize("centered", [False, True])
def test_a_layer_norm_is_narrowed_with_its_mean_and_bias(centered: bool) -> None:
    import contextlib

    from megatron_prune.calibration import scoring
    from megatron_prune.engine.patches import CenteredLayerNorm

    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64) + 3
    kept = [0, 2, 3]
    norm = (CenteredLayerNorm if centered else torch.nn.LayerNorm)(8, eps=0.1).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
        norm.bias.copy_(torch.randn(8))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    zeros = torch.zeros_like(x)
    zeros[:, kept] = x[:, kept]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        scoring._narrow(stack, norm, kept, 8)
        found = norm(zeros)
    gain = before["weight"][kept] + int(centered)
    expected = torch.nn.functional.layer_norm(x[:, kept], (3,), gain, before["bias"][kept], 0.1)
    torch.testing.assert_close(found[:, kept], expected)
    assert not found[:, [1, 4, 5, 6, 7]].any()
    assert norm.eps == 0.1 and all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    torch.testing.assert_close(
        norm(x), torch.nn.functional.layer_norm(x, (8,), before["weight"] + int(centered), before["bias"], 0.1)
    )


@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_fused_into_its_linear_is_narrowed(centred: bool) -> None:
    """Scoring under Transformer Engine, where linears hold the gain of the norm before them."""
    import contextlib
    from types import SimpleNamespace

    from megatron_prune.calibration import scoring

    torch.manual_seed(0)
    x, gain = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    kept = [0, 2, 3, 7]
    zeros = torch.zeros_like(x)
    zeros[:, kept] = x[:, kept]
    linear = SimpleNamespace(layer_norm_weight=gain - int(centred), eps=0.1, zero_centered_gamma=centred)
    before = linear.layer_norm_weight.clone()
    with contextlib.ExitStack() as stack:
        scoring._narrow(stack, linear, kept, 8)
        weight = linear.layer_norm_weight + int(centred)
        found = torch.nn.functional.rms_norm(zeros, (8,), weight, linear.eps)
    expected = torch.nn.functional.rms_norm(x[:, kept], (4,), gain[kept], 0.1)
    torch.testing.assert_close(found[:, kept], expected)
    assert linear.eps == 0.1 and torch.equal(linear.layer_norm_weight, before)


def test_candidates_are_scored_once_and_what_does_not_fit_is_refused(
    verbs: Verbs, tiny_hf: Callable[..., Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    verbs.calibrate("--calibration-sampling", "random", "--seed", 3)
    assert verbs.make("--method", "minitron-depth", "--target-num-layers", "3").returncode == EXIT_NEEDS_SCORES
    assert "scored 4 candidates" in verbs.score().ok().output
    first = statistics_file.read(verbs.statistics).scores
    assert "scored 0 candidates" in verbs.score().ok().output
    assert statistics_file.read(verbs.statistics).scores == first
    assert verbs.make("--method", "minitron-depth", "--target-num-layers", "2").returncode == EXIT_NEEDS_SCORES
    assert "scored 3 candidates" in verbs.score().ok().output
    assert len(statistics_file.read(verbs.statistics).scores) == 7

    import_hf(tiny_hf("llama-gqa", layers=LAYERS, seed=1), tmp_path / "other")
    (tmp_path / "broken.json").write_text('{"version": 1}')
    for more, message in (
        (["--calibration-sequences", 3], "--calibration-sequences: expected no such flag with --score, got it"),
        (["--bf16"], "--bf16, --fp16: expected the precision of --statistics, float32, got bfloat16"),
        (
            ["--load", tmp_path / "other"],
            "--load: expected the parent checkpoint that --statistics was made from, got .*other",
        ),
        (["--calibration-data-path", tmp_path / "nowhere"], "nowhere.bin does not exist"),
        (["--output", "x.pt"], "--output: expected .*, got x.pt"),
        (["--score", tmp_path / "broken.json"], "broken.json is damaged: KeyError"),
    ):
        finished = verbs.score(*more)
        assert finished.returncode == 2, finished.output[-3000:]
        assert re.search("megatron-prune calibrate: .*" + message, finished.output), finished.output[-3000:]
    lonely = verbs.job(["calibrate", *verbs.load, "--score", tmp_path / "candidates.json"])
    assert lonely.returncode == 2 and "--score, --statistics: expected both or neither, got only one" in lonely.output
    verbs.calibrate()  # other windows: other statistics under the same name
    stale = verbs.score()
    assert stale.returncode == 2 and "the statistics that the candidates of --score were planned from" in stale.output
