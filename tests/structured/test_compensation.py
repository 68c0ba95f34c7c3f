"""Biases for the mean of removed inputs: the pruned model against transformers' with columns removed and biases added,
through Megatron at several layouts, save, rewrite, export and import; and where no bias can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError, PlanError, UsageError
from megatron_prune.methods.options import FlapOptions
from megatron_prune.structured import apply, plan
from megatron_prune.structured import choice as choices
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics, tensor_shapes
from tests import tiny
from tests.convert import family_models
from tests.reference import window_losses
from tests.structured.test_apply import logits_of_checkpoint

MODELS = ("llama-gqa", "llama-biases", "qwen2", "qwen3")  # without biases, with, on q/k/v alone, and with QK norms
LENGTH = 48
Models = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def models(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """``models(name)``: its Hugging Face directory, and its checkpoint."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> tuple[Path, Path]:
        hf = tiny_hf(name, layers=3) if name == "llama-gqa" else root / f"{name}-hf"
        if not hf.exists():
            family_models.write(hf, name)
        if not (root / name).exists():
            import_hf(hf, root / name)
        return hf, root / name

    return get


def statistics(parent: Checkpoint) -> Statistics:
    """Made-up ones, with means that show in the logits."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.rand(size, generator=generator, dtype=torch.float64)
        for name, size in tensor_shapes(parent.shape).items()
    }
    for site in ("attention", "mlp"):
        tensors[f"{site}.sum"] = (tensors[f"{site}.sum"] - 0.3) * 100
        tensors[f"{site}.sum_sq"] = tensors[f"{site}.sum"].square() / 60 + tensors[f"{site}.sum_sq"]
    run = {"prefix": "p", "corpus": "c", "sampling": "sequential", "seed": None, "windows": [0, 1]}
    return Statistics(tensors, parent.shape, parent.fingerprint(), 30, 2, 30.0, (run,))


def flap(parent: Checkpoint, **own: Any) -> plan.PruningPlan:
    """Two groups and about two thirds of the FFN channels stay."""
    settings, source = FlapOptions(**own), parent.shape
    target = replace(
        source, num_query_groups=2, num_attention_heads=2 * source.heads_per_group,
        ffn_hidden_size=source.ffn_hidden_size * 2 // 3 // 6 * 6,
    )  # fmt: skip
    target = target.with_biases() if settings.compensate else target
    question = Question("flap", settings, source, (target,), parent.fingerprint())
    return plan.make(question, ratio=None, ratio_of="linears", statistics=statistics(parent))


def reference(hf: Path, made: plan.PruningPlan, means: Statistics) -> Any:
    """transformers' model in float64 in which what is removed always has its mean: hooks on the whole parent."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float64).eval()
    source, size = made.source, made.source.kv_channels
    for layer, block in enumerate(model.model.layers):
        assert made.kept_heads is not None and made.kept_ffn is not None
        heads = sorted(set(range(source.num_attention_heads)) - set(made.kept_heads[layer]))
        gone = {
            "attention": [head * size + i for head in heads for i in range(size)],
            "mlp": sorted(set(range(source.ffn_hidden_size)) - set(made.kept_ffn[layer])),
        }
        for site, linear in (("attention", block.self_attn.o_proj), ("mlp", block.mlp.down_proj)):
            value = means.tensors[f"{site}.sum"][layer, gone[site]] / means.tokens
            if made.compensation is None:
                value = torch.zeros_like(value)

            def fix(_: Any, given: tuple[torch.Tensor], places=gone[site], value=value) -> tuple[torch.Tensor]:
                x = given[0].clone()
                x[..., places] = value
                return (x,)

            linear.register_forward_pre_hook(fix)
    return model


TOKENS = (np.arange(LENGTH) * 11 % tiny.VOCABULARY).tolist()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([TOKENS])).logits[0]
    return found


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_parent_with_means_in_place_of_what_is_removed(
    models: Models,
    distributed: Callable[..., list[Any]],
    tmp_path: Path,
    name: str,
    compensate: bool,
) -> None:
    """Megatron's of the pruned checkpoint at two layouts, and transformers' of its export where there is one."""
    import transformers

    hf, checkpoint = models(name)
    parent = open_checkpoint(checkpoint)
    made = flap(parent, compensate=compensate)
    apply.apply_plan(checkpoint, made, tmp_path / "pruned", workers=2)
    pruned = open_checkpoint(tmp_path / "pruned")
    assert pruned.shape == made.target and pruned.shape.linear_bias == (compensate or parent.shape.linear_bias)
    expected = logits(reference(hf, made, statistics(parent)))
    for tp in (1, 2):
        layout = ["--tensor-model-parallel-size", str(tp)]
        found = torch.tensor(distributed(logits_of_checkpoint, tp, str(tmp_path / "pruned"), TOKENS, layout)[0])
        torch.testing.assert_close(found[:, : expected.shape[1]].double(), expected, atol=1e-3, rtol=1e-4)
    if name == "qwen3" and compensate:
        with pytest.raises(CheckpointError, match="Qwen3ForCausalLM only supports False.*prune with --no-compensate"):
            export_hf(tmp_path / "pruned", tmp_path / "hf")
        return
    export_hf(tmp_path / "pruned", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    if compensate:
        assert (config["model_type"], config["attention_bias"], config["mlp_bias"]) == ("llama", True, True)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(exported), expected, atol=1e-4, rtol=1e-5)  # weights and biases are fp32
    again = import_hf(tmp_path / "hf", tmp_path / "again")
    assert all(torch.equal(again.read(one), pruned.read(one)) for one in pruned.names)


@pytest.mark.parametrize("sizes", [{"ratio": 0.4}, {"target_num_query_groups": 2, "target_ffn_hidden_size": 120}])
def test_layers_that_differ_have_biases_of_their_own(
    models: Models, distributed: Callable[..., list[Any]], tmp_path: Path, sizes: dict[str, Any]
) -> None:
    hf, checkpoint = models("llama-gqa")
    parent = open_checkpoint(checkpoint)
    asked = verbs.TargetSettings(divisible_by=4, **sizes)
    chosen = choices.choose("flap", asked, FlapOptions(allocation="global"), tensor_parallel=2)
    made_up = statistics(parent)
    for site in ("attention", "mlp"):  # few inputs of the last layer stand out, and most of the first
        made_up.tensors[f"{site}.weight_sum_sq"] **= torch.tensor([0.5, 2, 8])[:, None]
    made = chosen.make(chosen.question(parent), made_up)
    assert len(set(made.target.by_layer())) > 1
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made
    apply.apply_plan(checkpoint, made, tmp_path / "pruned")
    expected = logits(reference(hf, made, statistics(parent)))
    for tp in (1, 2):
        layout = ["--tensor-model-parallel-size", str(tp)]
        found = torch.tensor(distributed(logits_of_checkpoint, tp, str(tmp_path / "pruned"), TOKENS, layout)[0])
        torch.testing.assert_close(found[:, : expected.shape[1]].double(), expected, atol=1e-3, rtol=1e-4)
    import transformers

    export_hf(tmp_path / "pruned", tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float64, trust_remote_code=True
    )
    torch.testing.assert_close(logits(exported.eval()), expected, atol=1e-4, rtol=1e-5)


def test_biases_elsewhere_are_zero_and_those_of_the_parent_stay(models: Models, tmp_path: Path) -> None:
    for name in ("llama-gqa", "qwen2"):
        checkpoint = models(name)[1]
        parent = open_checkpoint(checkpoint)
        apply.apply_plan(checkpoint, made := flap(parent), tmp_path / name)
        pruned = open_checkpoint(apply.rewrite(tmp_path / name, tmp_path / f"{name}-again").root)
        for layer in range(parent.shape.num_layers):
            prefix = f"decoder.layers.{layer}."
            assert pruned.read(f"{prefix}mlp.linear_fc1.bias").count_nonzero() == 0
            assert pruned.read(f"{prefix}mlp.linear_fc2.bias").count_nonzero() == parent.shape.hidden_size
            qkv = pruned.read(f"{prefix}self_attention.linear_qkv.bias")
            assert bool(qkv.any()) == (name == "qwen2") and len(qkv) == made.target.axis_size("qkv")
        assert pruned.args["add_bias_linear"] is True


def test_a_part_that_stays_whole_needs_nothing(models: Models, tmp_path: Path) -> None:
    checkpoint = models("llama-gqa")[1]
    parent = open_checkpoint(checkpoint)
    target = replace(parent.shape, ffn_hidden_size=60).with_biases()
    question = Question("flap", FlapOptions(), parent.shape, (target,), parent.fingerprint())
    made = plan.make(question, ratio=None, ratio_of="linears", statistics=statistics(parent))
    apply.apply_plan(checkpoint, made, tmp_path / "pruned")
    pruned = open_checkpoint(tmp_path / "pruned")
    for layer in range(3):
        assert pruned.read(f"decoder.layers.{layer}.self_attention.linear_proj.bias").count_nonzero() == 0


def test_a_plan_keeps_its_means_and_refuses_others(models: Models, tmp_path: Path) -> None:
    made = flap(open_checkpoint(models("llama-gqa")[1]))
    made.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == made
    means = made.compensation
    assert means is not None and means.ffn is not None
    for wrong, message in (
        (replace(means, ffn=means.ffn[:-1]), "compensation.ffn: expected a number for each input that is removed"),
        (replace(means, ffn=(means.ffn[0][:-1], *means.ffn[1:])), "compensation.ffn: expected a number for each"),
        (replace(means, heads=None), "compensation.heads: expected a number for each input"),
        (replace(means, ffn=((float("nan"), *means.ffn[0][1:]), *means.ffn[1:])), "ffn: expected finite numbers"),
        (None, "expected kept indices that give"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(made, compensation=wrong)
    with pytest.raises(PlanError, match="expected kept indices that give"):  # biases, but no target with them
        replace(made, target=replace(made.target, linear_bias=False))


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3"])
def test_exportable_refuses_biases_that_a_family_cannot_have(models: Models, name: str) -> None:
    parent = open_checkpoint(models(name)[1])

    def targets(**own: Any) -> Any:
        asked = verbs.TargetSettings(ratio=0.3, divisible_by=4, tolerance=0.1)
        return choices.choose("flap", asked, FlapOptions(**own), exportable=True).question(parent).targets

    (plain,) = targets(compensate=False)
    assert not plain.linear_bias
    if name == "llama-gqa":
        (biased,) = targets()
        assert biased == plain.with_biases()
    else:
        with pytest.raises(UsageError, match="got flap, which adds biases .*Qwen3.* False.*give --no-compensate"):
            targets()


def test_it_retrains_at_other_layouts_and_a_scratch_run_has_its_shape(
    job: Callable[..., Any], tiny_parent: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Pruned at TP 2, trained at PP 2, evaluated at TP 1: the losses are transformers'."""
    import transformers

    text = ["--calibration-data-path", tiny_corpus, "--calibration-sequences", 5, "--calibration-seq-length", 64]
    cut = ["--method", "flap", "--ratio", 0.3, "--divisible-by", 8, "--tolerance", 0.05]
    two = ["--tensor-model-parallel-size", 2]
    job(["prune", "--load", tiny_parent, *cut, *text, *two, "--save", tmp_path / "pruned"], nproc=2).ok()
    pruned = open_checkpoint(tmp_path / "pruned")
    assert pruned.pruning[-1]["removed_linears"] == pytest.approx(0.3, abs=0.035)
    assert pruned.pruning[-1]["settings"] == {
        "allocation": "uniform",
        "least_kept": 0.0,
        "owl_threshold": None,
        "owl_bound": None,
        "search_generations": None,
        "metric": "wifv",
        "compensate": True,
    }

    recipe = "--train-iters 2 --global-batch-size 2 --micro-batch-size 1 --lr 1e-2 --seq-length 64".split()
    recipe += ["--data-path", tiny_corpus, "--stream-range", "0:4"]
    start = ["pretrain", "--pretrained-checkpoint", tmp_path / "pruned", "--pipeline-model-parallel-size", 2]
    job([*start, *recipe, "--save", tmp_path / "trained"], nproc=2).ok()
    job(["pretrain", "--shape-from", tmp_path / "pruned", *recipe, "--save", tmp_path / "scratch"]).ok()
    trained = open_checkpoint(tmp_path / "trained")
    assert trained.shape == open_checkpoint(tmp_path / "scratch").shape == pruned.shape
    fc1 = "decoder.layers.1.mlp.linear_fc1.bias"
    assert not pruned.read(fc1).any() and trained.read(fc1).all()

    data = ["--data-path", tiny_corpus, "--labels", "text", "--seq-length", 32, "--windows", 4]
    job(["evaluate", "--load", tmp_path / "trained", *data, "--output", tmp_path / "scores.json"]).ok()
    found = json.loads((tmp_path / "scores.json").read_text())["corpora"]["text"]["window_losses"]
    export_hf(tmp_path / "trained", tmp_path / "hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    np.testing.assert_allclose(found, window_losses(exported, tiny_corpus, 32, 4), rtol=2e-5)
