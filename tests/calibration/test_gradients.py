"""``calibrate --gradients`` against gradients of single windows from plain autograd in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.convert.huggingface import import_hf
from megatron_prune.methods import options
from megatron_prune.methods.accumulators import variance
from megatron_prune.structured import plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics, StatisticsError
from tests.calibration.test_calibrate import (
    LAYOUTS,
    LENGTH,
    SEQUENCES,
    corpus_windows,
    flags,
    hf_statistics,
    padded,
    relative,
)
from tests.convert import family_models
from tests.reference import float64

MODELS = ("llama-gqa", "llama-biases", "qwen3")  # the second has biases, the third QK norms


@pytest.fixture(scope="module")
def folders(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {"llama-gqa": tiny_hf("llama-gqa", layers=4)}
    for name in MODELS[1:]:
        found[name] = family_models.write(root / name, name)
    return found


def saliencies(of_model: Path | torch.nn.Module, windows: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """The definitions, with one backward pass per window: arrays by the names of the statistics, and Σ of losses."""
    model: Any = float64(of_model)
    weights = {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    means = {name: torch.zeros_like(p) for name, p in weights.items()}
    squares = {name: torch.zeros_like(p) for name, p in weights.items()}
    total = 0.0
    for window in windows:
        tokens = torch.from_numpy(window)
        loss = torch.nn.functional.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:])
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            means[name] += gradient / len(windows)
            squares[name] += gradient**2 / len(windows)
        total += loss.item() * LENGTH
    config = model.config
    d = config.head_dim
    found: dict[str, list[np.ndarray]] = {}
    for layer in range(config.num_hidden_layers):
        of = {}
        for path in ("q", "k", "v", "o", "gate", "up", "down"):
            name = f"model.layers.{layer}.{'mlp' if path in ('gate', 'up', 'down') else 'self_attn'}.{path}_proj.weight"
            w, g, h = weights[name].detach(), means[name], squares[name]
            axis = 0 if path in ("o", "down") else 1
            of[path] = {
                "vector": (w * g).sum(axis).abs(),
                "first": (w * g).abs().sum(axis),
                "second": (w * w * h).sum(axis),
                "mixed": (w * g - w * w * h / 2).abs().sum(axis),
            }
        for kind in of["q"]:
            q, k, v = (of[path][kind].view(len(of["k"][kind]) // d, -1, d) for path in "qkv")
            fused = torch.cat([q, k, v], 1).flatten()
            gated = torch.cat([of["gate"][kind], of["up"][kind]])
            for module, value in (("qkv", fused), ("proj", of["o"][kind]), ("fc1", gated), ("fc2", of["down"][kind])):
                found.setdefault(f"{module}.{kind}", []).append(value.numpy())
    return {name: padded(values) for name, values in found.items()}, total


@pytest.fixture(scope="module")
def oracle(folders: dict[str, Path], tiny_corpus: Path) -> Callable[[str], tuple[dict[str, np.ndarray], float]]:
    return functools.cache(lambda name: saliencies(folders[name], corpus_windows(tiny_corpus)))


@pytest.fixture(scope="module")
def calibrated(
    job: Callable[..., Any], folders: dict[str, Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Statistics]:
    root = tmp_path_factory.mktemp("gradients")

    @functools.cache
    def get(name: str, layout: str) -> Statistics:
        parent, output = root / name, root / f"{name}-{layout}.safetensors"
        if not parent.exists():
            import_hf(folders[name], parent)
        nproc, more = LAYOUTS[layout]
        job(["calibrate", *flags(parent, tiny_corpus, "--gradients", "--output", output, *more)], nproc=nproc).ok()
        return statistics_file.read(output)

    return get


QUICK = {("llama-gqa", "tp2pp2"), ("llama-gqa", "dp2"), ("llama-biases", "tp2"), ("qwen3", "tp1")}
CASES = [
    pytest.param(name, layout, marks=() if (name, layout) in QUICK else pytest.mark.slow)
    for name in MODELS
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_saliencies_are_those_of_float64(
    calibrated: Callable[[str, str], Statistics],
    oracle: Callable[[str], tuple[dict[str, np.ndarray], float]],
    name: str,
    layout: str,
) -> None:
    found, (expected, loss) = calibrated(name, layout), oracle(name)
    assert found.gradients and found.loss_sum == pytest.approx(loss, rel=1e-6)
    assert found.provenance()["flops"] == 3 * SEQUENCES * found.shape.forward_flops(LENGTH)
    for key, wanted in expected.items():
        # A sum with signs is as exact as the sum of its terms' sizes.
        scale = expected[key.replace("vector", "first")]
        error = np.abs(found.tensors[key].numpy() - wanted) / scale
        assert error.max() < 1e-5, (key, error.max())


@pytest.fixture(scope="module")
def forward_oracle(folders: dict[str, Path], tiny_corpus: Path) -> Callable[[str], tuple[dict[str, np.ndarray], float]]:
    return functools.cache(lambda name: hf_statistics(folders[name], corpus_windows(tiny_corpus)))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_means_fluctuations_and_norms_are_those_of_float64(
    calibrated: Callable[[str, str], Statistics],
    forward_oracle: Callable[[str], tuple[dict[str, np.ndarray], float]],
    name: str,
    layout: str,
) -> None:
    """What flap and wanda-sp read: of the inputs of linear_proj and linear_fc2, and of the columns that read them."""
    found, expected = calibrated(name, layout), forward_oracle(name)[0]
    tokens = found.tokens
    for site in ("attention", "mlp"):
        own = {key.split(".")[1]: tensor for key, tensor in found.tensors.items() if key.startswith(f"{site}.")}
        total, squares = expected[f"{site}.sum"], expected[f"{site}.sum_sq"]
        spread = (squares - total**2 / tokens) / (tokens - 1)
        errors = {
            "mean": np.abs(own["sum"].numpy() - total) / tokens / np.sqrt(squares / tokens),
            "fluctuation": np.abs(variance(own["sum"], own["sum_sq"], tokens).numpy() / spread - 1),
            "norm": np.abs(own["sum_sq"].numpy() / squares - 1),
            **{
                key: np.abs(own[key].numpy() / expected[f"{site}.{key}"] - 1)
                for key in ("weight_sum_sq", "weight_sum_abs")
            },
        }
        worst = {key: float(error.max()) for key, error in errors.items()}
        assert max(worst.values()) < 1e-5, (site, worst)


def without_gradients(found: Statistics) -> Statistics:
    modules = ("qkv", "proj", "fc1", "fc2")
    kept = {key: tensor for key, tensor in found.tensors.items() if key.split(".")[0] not in modules}
    return replace(found, tensors=kept)


def test_forward_statistics_are_those_of_transformers_too(
    calibrated: Callable[[str, str], Statistics],
    forward_oracle: Callable[[str], tuple[dict[str, np.ndarray], float]],
) -> None:
    found = calibrated("llama-gqa", "dp2")
    expected = forward_oracle("llama-gqa")[0]
    errors = relative(without_gradients(found).tensors, expected, found.tokens)
    assert errors.keys() == without_gradients(found).tensors.keys() and max(errors.values()) < 2e-5, errors


def test_statistics_without_gradients_are_refused(calibrated: Callable[[str, str], Statistics]) -> None:
    found = calibrated("llama-gqa", "dp2")
    plain, target = without_gradients(found), replace(found.shape, ffn_hidden_size=64)
    question = Question("llm-pruner", options.LLMPrunerOptions(), found.shape, (target,), found.parent)
    question.candidates(found)
    with pytest.raises(StatisticsError, match="expected those with gradients, which llm-pruner reads"):
        question.candidates(plain)
    with pytest.raises(StatisticsError, match="cannot merge statistics with gradients"):
        statistics_file.merge([found, plain])
    with pytest.raises(StatisticsError, match="too many or too few of .'fc2.mixed'"):
        replace(found, tensors={key: value for key, value in found.tensors.items() if key != "fc2.mixed"})


@pytest.mark.parametrize("layout", [pytest.param("tp2pp2"), pytest.param("pp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("taylor", ["vector", "first", "second", "mixed"])
def test_every_layout_keeps_what_the_oracle_keeps(
    calibrated: Callable[[str, str], Statistics],
    oracle: Callable[[str], tuple[dict[str, np.ndarray], float]],
    layout: str,
    taylor: str,
) -> None:
    found, expected = calibrated("llama-gqa", layout), oracle("llama-gqa")[0]
    shape = found.shape
    target = replace(shape, ffn_hidden_size=64, num_query_groups=3, num_attention_heads=6)
    own = options.LLMPrunerOptions(taylor=taylor)
    question = Question("llm-pruner", own, shape, (target,), found.parent)
    made = plan.make(question, ratio=None, ratio_of="linears", statistics=found)
    d, heads = shape.kv_channels, shape.heads_per_group
    for layer in range(shape.num_layers):
        rows = expected[f"qkv.{taylor}"][layer].reshape(shape.num_query_groups, -1).sum(1)
        columns = expected[f"proj.{taylor}"][layer].reshape(shape.num_query_groups, heads * d).sum(1)
        groups = np.sort(np.argsort(-(rows + columns), kind="stable")[:3])
        assert made.kept_heads is not None and made.kept_ffn is not None
        assert made.kept_heads[layer] == tuple(g * heads + h for g in groups.tolist() for h in range(heads))
        gate, up = expected[f"fc1.{taylor}"][layer].reshape(2, -1)
        channels = gate + up + expected[f"fc2.{taylor}"][layer]
        assert made.kept_ffn[layer] == tuple(np.sort(np.argsort(-channels, kind="stable")[:64]).tolist())


def test_prune_runs_the_backward_pass_itself(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    more = ("--method", "llm-pruner", "--ratio", 0.25, "--divisible-by", 8, "--tolerance", 0.05)
    more += ("--tensor-model-parallel-size", 2, "--save", tmp_path / "pruned")
    job(["prune", *flags(tiny_parent, tiny_corpus, *more)], nproc=2).ok()
    found = statistics_file.read(tmp_path / "pruned" / "pruning" / "statistics.safetensors")
    made = plan.read(tmp_path / "pruned" / "pruning" / "plan.json")
    assert found.gradients and made.statistics == found.hash
    assert made.target.num_query_groups < made.source.num_query_groups
    assert made.target.hidden_size == made.source.hidden_size
    assert made.target.ffn_hidden_size < made.source.ffn_hidden_size
    assert made.removed_linears == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fp16"], "--fp16: expected bf16 or fp32 with gradients"),
        (["--score", "a.json", "--statistics", "b.safetensors"], "--gradients: expected no such flag with --score"),
    ],
)
def test_refused_before_it_begins(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    output = tmp_path / "s.safetensors"
    refused = job(["calibrate", *flags(tiny_parent, tiny_corpus, "--gradients", "--output", output, *more)])
    assert refused.returncode == 2 and message in refused.output, refused.output[-2000:]
    assert not output.exists()
