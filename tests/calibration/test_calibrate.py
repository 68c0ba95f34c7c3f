"""The ``calibrate`` verb: against transformers in float64, across layouts, and its refusals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.methods import options
from megatron_prune.methods.accumulators import QUANTITIES
from megatron_prune.settings import Settings
from megatron_prune.structured import plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics
from tests.reference import float64

SEQUENCES, LENGTH = 7, 64  # an odd number: data-parallel ranks share it unevenly
LAYERS = 4
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
    "tp2pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


def flags(parent: Path, corpus: Path, *more: object) -> list[Any]:
    return [
        "--load", parent, "--calibration-data-path", corpus,
        "--calibration-sequences", SEQUENCES, "--calibration-seq-length", LENGTH, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Statistics]:
    """Statistics of the tiny parent at every layout."""
    folder = tmp_path_factory.mktemp("statistics")
    found = {}
    for name, (nproc, layout) in LAYOUTS.items():
        output = folder / f"{name}.safetensors"
        job(["calibrate", *flags(tiny_parent, tiny_corpus, "--output", output, *layout)], nproc=nproc).ok()
        found[name] = statistics_file.read(output)
    return found


def padded(rows: list[np.ndarray]) -> np.ndarray:
    """[rows, …, n], with zeros after those whose last axis is shorter."""
    longest = max(row.shape[-1] for row in rows)
    return np.stack([np.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, longest - row.shape[-1])]) for row in rows])


def hf_statistics(of: Path | torch.nn.Module, windows: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """The definitions, by hooks on transformers' model in float64, one sequence at a time."""
    model: Any = float64(of)
    seen: dict[tuple[str, int | None], list[np.ndarray]] = {}

    def keep(site: str, layer: int | None, x: torch.Tensor) -> None:
        seen.setdefault((site, layer), []).append(x.detach()[0].numpy().copy())  # [t, n]

    for i, block in enumerate(model.model.layers):
        for site, module in (
            ("input_layernorm", block.input_layernorm),
            ("pre_mlp_layernorm", block.post_attention_layernorm),
        ):
            module.register_forward_hook(lambda _, __, out, site=site, i=i: keep(site, i, out))
        for site, module in (("attention", block.self_attn.o_proj), ("mlp", block.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, args, site=site, i=i: keep(site, i, args[0]))
        block.register_forward_pre_hook(lambda _, args, i=i: keep("in", i, args[0]))
        block.register_forward_hook(
            lambda _, __, out, i=i: keep("out", i, out if isinstance(out, torch.Tensor) else out[0])
        )
    model.model.norm.register_forward_hook(lambda _, __, out: keep("final_layernorm", None, out))
    loss = 0.0
    with torch.no_grad():
        for window in windows:
            tokens = torch.from_numpy(window)
            logits = model(tokens[None, :-1]).logits[0]
            loss += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()

    found: dict[str, np.ndarray] = {}
    layers = len(model.model.layers)
    for site in ("input_layernorm", "pre_mlp_layernorm", "attention", "mlp", "final_layernorm"):
        xs = [np.stack(seen[site, i]) for i in ([None] if site == "final_layernorm" else range(layers))]
        stacked = padded(xs) if site != "final_layernorm" else xs[0]  # [(L,) b, t, n]
        found[f"{site}.sum_abs_mean_sq"] = (np.abs(stacked).mean(-2) ** 2).sum(-2)
        found[f"{site}.sum_sq"] = (stacked**2).sum((-3, -2))
        found[f"{site}.sum"] = stacked.sum((-3, -2))
    for site, readers in (
        ("attention", [block.self_attn.o_proj for block in model.model.layers]),
        ("mlp", [block.mlp.down_proj for block in model.model.layers]),
    ):
        columns = padded([one.weight.detach().numpy() for one in readers])  # [L, out, n]
        found[f"{site}.weight_sum_sq"] = (columns**2).sum(1)
        found[f"{site}.weight_sum_abs"] = np.abs(columns).sum(1)
    found["outliers"] = np.array([outliers(block, found, i) for i, block in enumerate(model.model.layers)])
    influence = []
    for i in range(layers):
        x, y = np.stack(seen["in", i]), np.stack(seen["out", i])
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        influence.append((1 - cosine).sum())
    found["block_influence"] = np.array(influence)
    return found, loss


SITES = ("input_layernorm", "attention", "pre_mlp_layernorm", "mlp")


def outliers(block: Any, sums: dict[str, np.ndarray], layer: int, sites: Sequence[str] = SITES) -> list[int]:
    """A block's weights that read ``sites``, and how many have |w|·‖x‖ above 3, 5, 7 and 10 times the mean of all."""
    attention, mlp = block.self_attn, block.mlp
    scores = []
    for site, readers in (
        ("input_layernorm", (attention.q_proj, attention.k_proj, attention.v_proj)),
        ("attention", (attention.o_proj,)),
        ("pre_mlp_layernorm", (mlp.gate_proj, mlp.up_proj)),
        ("mlp", (mlp.down_proj,)),
    ):
        for reader in readers if site in sites else ():
            weight = reader.weight.detach().abs().numpy()
            scores.append((weight * np.sqrt(sums[f"{site}.sum_sq"][layer][: weight.shape[1]])).ravel())
    every = np.concatenate(scores)
    return [every.size, *(int((every > times * every.mean()).sum()) for times in (3, 5, 7, 10))]


def relative(found: dict[str, Any], expected: dict[str, Any], tokens: int) -> dict[str, float]:
    """Largest error of every quantity, relative to its value (a signed sum: to its largest possible value; counts: as
    they are)."""
    errors = {}
    for name, wanted in expected.items():
        wanted = np.asarray(wanted)
        if name == "outliers":
            errors[name] = float(np.abs(np.asarray(found[name]) - wanted).max())
            continue
        scale = np.sqrt(np.asarray(expected[f"{name}_sq"]) * tokens) if name.endswith(".sum") else np.abs(wanted)
        errors[name] = float((np.abs(np.asarray(found[name]) - wanted) / scale).max())
    return errors


def corpus_windows(corpus: Path) -> np.ndarray:
    """The first windows of the corpus, read without our reader: int64 [SEQUENCES, LENGTH + 1]."""
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16).astype(np.int64)
    return np.stack([tokens[k * LENGTH : (k + 1) * LENGTH + 1] for k in range(SEQUENCES)])


@pytest.fixture(scope="module")
def oracle(tiny_hf: Callable[..., Path], tiny_corpus: Path) -> tuple[dict[str, np.ndarray], float]:
    return hf_statistics(tiny_hf("llama-gqa", layers=LAYERS), corpus_windows(tiny_corpus))


def test_statistics_match_transformers_in_float64(
    calibrated: dict[str, Statistics], oracle: tuple[dict[str, np.ndarray], float]
) -> None:
    expected, loss = oracle
    found = calibrated["tp1"]
    assert set(found.tensors) == set(expected)
    assert (expected["outliers"][:, :2] > 0).all() and len({*expected["outliers"][:, 1]}) > 1
    errors = relative(found.tensors, expected, found.tokens)
    assert max(errors.values()) < 2e-5, errors
    assert found.loss_sum == pytest.approx(loss, rel=1e-6)
    assert (found.sequences, found.seq_length) == (SEQUENCES, LENGTH)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_layout_does_not_change_statistics(calibrated: dict[str, Statistics], layout: str) -> None:
    one, other = calibrated["tp1"], calibrated[layout]
    errors = relative(other.tensors, one.tensors, one.tokens)
    assert max(errors.values()) < 1e-5, errors
    assert other.loss_sum == pytest.approx(one.loss_sum, rel=1e-5)
    assert other.calibrations[0]["windows"] == list(range(SEQUENCES))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_what_the_oracle_keeps(
    calibrated: dict[str, Statistics],
    oracle: tuple[dict[str, np.ndarray], float],
    layout: str,
) -> None:
    """Kept sets of both methods against a ranking of the float64 statistics, written here."""
    found, expected = calibrated[layout], oracle[0]
    from dataclasses import replace

    def made(name: str, settings: Settings, **sizes: int) -> plan.PruningPlan:
        target = replace(found.shape, **sizes)  # type: ignore[arg-type]
        question = Question(name, settings, found.shape, (target,), found.parent)
        return plan.make(question, ratio=None, ratio_of="linears", statistics=found)

    def top(scores: np.ndarray, count: int) -> tuple[int, ...]:
        return tuple(sorted(np.argsort(-scores, kind="stable")[:count].tolist()))

    depth = made("shortgpt", options.NoOptions(), num_layers=2)
    assert not depth.near_ties and depth.kept_layers == top(expected["block_influence"], 2)

    key = "sum_abs_mean_sq"
    score = {site: np.sqrt(expected[f"{site}.{key}"]) for site in ("attention", "mlp")}
    norms = np.sqrt(expected[f"input_layernorm.{key}"]) + np.sqrt(expected[f"pre_mlp_layernorm.{key}"])
    width = made(
        "minitron-width", options.MinitronWidthOptions(),
        hidden_size=40, ffn_hidden_size=64, num_attention_heads=6,
    )  # fmt: skip
    assert not width.near_ties, "choose another seed or size: this cut is for clear decisions"
    assert width.kept_hidden == top(norms.sum(0), 40)
    assert width.kept_ffn == tuple(top(score["mlp"][i], 64) for i in range(LAYERS))
    heads = np.linalg.norm(score["attention"].reshape(LAYERS, 12, 12), axis=2).reshape(LAYERS, 6, 2)
    best = heads.argmax(2) + 2 * np.arange(6)
    assert width.kept_heads == tuple(tuple(row) for row in best.tolist())


def test_bf16_statistics_are_those_of_fp32_but_for_rounding(
    job: Callable[..., Any],
    oracle: tuple[dict[str, np.ndarray], float],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "s.safetensors"
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    job(["calibrate", *flags(tiny_parent, tiny_corpus, "--output", output, "--bf16", *layout)], nproc=4).ok()
    found = statistics_file.read(output)
    errors = relative(found.tensors, oracle[0], found.tokens)
    assert errors.pop("outliers") < 0.005 * oracle[0]["outliers"][:, 0].min()
    assert 1e-5 < max(errors.values()) < 0.05, errors
    assert found.calibrations[0]["params_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["llama-mha-tied", "mistral-gqa"])
def test_other_models_match_transformers(
    job: Callable[..., Any], tiny_hf: Callable[..., Path], tiny_corpus: Path, tmp_path: Path, name: str
) -> None:
    import_hf(tiny_hf(name), tmp_path / "parent")
    output = tmp_path / "s.safetensors"
    more = ("--output", output, "--tensor-model-parallel-size", 2)
    job(["calibrate", *flags(tmp_path / "parent", tiny_corpus, *more)], nproc=2).ok()
    expected, loss = hf_statistics(tiny_hf(name), corpus_windows(tiny_corpus))
    found = statistics_file.read(output)
    errors = relative(found.tensors, expected, found.tokens)
    assert max(errors.values()) < 2e-5, errors
    assert found.loss_sum == pytest.approx(loss, rel=1e-6)


def test_random_windows_are_a_function_of_the_seed_and_merge(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    found = []
    for seed, nproc in ((1, 1), (1, 2), (2, 1)):
        output = tmp_path / f"{seed}-{nproc}.safetensors"
        more = ("--output", output, "--calibration-sampling", "random", "--seed", seed)
        job(["calibrate", *flags(tiny_parent, tiny_corpus, *more)], nproc=nproc).ok()
        found.append(statistics_file.read(output))
    windows = [s.calibrations[0]["windows"] for s in found]
    assert windows[0] == windows[1] != windows[2]
    assert windows[0] != list(range(SEQUENCES)) and len(set(windows[0])) == SEQUENCES
    assert found[0].calibrations[0]["seed"] == 1
    assert not set(windows[0]) & set(windows[2])  # of hundreds; if the windows overlapped, merging would be refused
    merged = statistics_file.merge([found[0], found[2]])
    assert merged.sequences == 2 * SEQUENCES
    assert sorted(sum((run["windows"] for run in merged.calibrations), [])) == sorted(windows[0] + windows[2])


def test_fewer_sequences_than_ranks(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """A data-parallel rank without a window adds nothing."""
    found = []
    for nproc in (1, 3):
        output = tmp_path / f"{nproc}.safetensors"
        arguments = flags(tiny_parent, tiny_corpus, "--output", output, "--calibration-sequences", 2)
        job(["calibrate", *arguments], nproc=nproc).ok()
        found.append(statistics_file.read(output))
    assert found[0].sequences == found[1].sequences == 2
    for name, tensor in found[0].tensors.items():
        torch.testing.assert_close(found[1].tensors[name], tensor, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    ("more", "nproc", "message"),
    [
        (["--context-parallel-size", "2"], 2, "--context-parallel-size: expected .*, got 2"),
        (
            ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
            2,
            "--num-layers-per-virtual-pipeline-stage: expected .*, got 1",
        ),
        (
            ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
            2,
            "--num-virtual-stages-per-pipeline-rank: expected .*, got 2",
        ),
        (
            ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Et|t|t|tL"],
            2,
            "--pipeline-model-parallel-layout: expected .*, got ",
        ),
        (["--micro-batch-size", "2"], 1, "--micro-batch-size: expected .*, got 2"),
        (["--seq-length", "32"], 1, "--seq-length: expected .*, got 32"),
        (["--calibration-seq-length", "256"], 1, "--calibration-seq-length: expected at most 128, .*, got 256"),
        (["--calibration-sequences", "100000"], 1, "--calibration-sequences: expected .*, got 100000"),
        (["--calibration-data-path", "/nowhere"], 1, "/nowhere.bin does not exist"),
        (["--output", "s.pt"], 1, "--output: expected .*, got s.pt"),
    ],
    ids=itertools.count(),
)
def test_refused_before_work_starts(
    job: Callable[..., Any],
    tiny_parent: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    more: list[str],
    nproc: int,
    message: str,
) -> None:
    arguments = flags(tiny_parent, tiny_corpus, "--output", tmp_path / "s.safetensors", *more)
    finished = job(["calibrate", *arguments], nproc=nproc)
    assert finished.returncode != 0
    assert re.search("megatron-prune calibrate: " + message, finished.output), finished.output[-3000:]
    assert not list(tmp_path.iterdir())


def test_a_norm_that_is_fused_into_its_linear_is_recomputed() -> None:
    """The hooks under Transformer Engine, where no module returns a norm's output."""
    from megatron_prune.engine.spec import multiplied

    torch.manual_seed(0)
    x = torch.randn(5, 2, 8)
    gain, bias = torch.randn(8), torch.randn(8)
    rms = torch.nn.RMSNorm(8, eps=1e-3)
    layer = torch.nn.LayerNorm(8, eps=1e-3)
    with torch.no_grad():
        rms.weight.copy_(gain + 1)
        layer.weight.copy_(gain)
        layer.bias.copy_(bias)
    fused = {"eps": 1e-3, "layer_norm_weight": gain, "layer_norm_bias": bias}
    for linear, norm in (
        (SimpleNamespace(**fused, normalization="RMSNorm", zero_centered_gamma=True), rms),
        (SimpleNamespace(**fused, normalization="LayerNorm", zero_centered_gamma=False), layer),
    ):
        found: list[torch.Tensor] = []
        multiplied(linear, found.append)(x)
        torch.testing.assert_close(found[0], norm(x))


def test_quantities_have_their_documented_order() -> None:
    assert QUANTITIES == ("sum_abs_mean_sq", "sum_sq", "sum")


def test_statistics_name_their_parent(calibrated: dict[str, Statistics], tiny_parent: Path) -> None:
    parent = open_checkpoint(tiny_parent)
    for found in calibrated.values():
        assert (found.parent, found.shape) == (parent.fingerprint(), parent.shape)
