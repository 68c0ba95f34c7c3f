"""Layers of different shape: a cut model computes what the masked parent does, at every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint.layer_shapes import LayerShape, unreadable
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.cli.pruning_tables import show_plan
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.convert.inspect import describe, warnings
from megatron_prune.errors import PlanError, UsageError
from megatron_prune.methods import options
from megatron_prune.methods.llm_pruner import LLMPruner
from megatron_prune.structured import apply, candidates
from megatron_prune.structured import choice as choices
from megatron_prune.structured import plan as plans
from megatron_prune.structured.statistics import Statistics, StatisticsError, tensor_shapes
from tests.checkpoint import ranks
from tests.structured import layered
from tests.tiny import VOCABULARY


@pytest.fixture(scope="module")
def pruned(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered.cut(tiny_parent, tmp_path_factory.mktemp("layered") / "pruned")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_logits_are_those_of_the_masked_parent(
    pruned: Path, tiny_hf: Callable[..., Path], distributed: Callable[..., list[Any]], tp: int, pp: int
) -> None:
    """Against transformers in float64. One layer has no attention, one no MLP, one a single group."""
    tokens = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = layered.masked(tiny_hf("llama-gqa", layers=4), layered.selection())(tokens).logits
    found = distributed(ranks.logits, tp * pp, str(pruned), tp, pp, tokens)[-1]
    assert expected.std() > 0.1
    assert (found[..., :VOCABULARY] - expected).abs().max() < 1e-4


def test_the_checkpoint_says_its_layers(pruned: Path, tiny_parent: Path, tmp_path: Path) -> None:
    found = open_checkpoint(pruned)
    sizes = tuple(LayerShape(2 * groups, groups, ffn) for groups, ffn in layered.SIZES)
    assert found.shape.by_layer() == sizes
    assert found.pruning[-1]["target"]["layers"][2] == {
        "num_attention_heads": 2, "num_query_groups": 1, "ffn_hidden_size": 64
    }  # fmt: skip
    assert found.spec("decoder.layers.2.self_attention.linear_qkv.weight").shape == (12 * 4, 96)
    assert not any("layers.1.self_attention" in name or "layers.3.mlp" in name for name in found.names)
    tensors = describe(found)["tensors"]
    assert tensors["decoder.layers.0.mlp.linear_fc2.weight"]["stored_as"] == ["decoder.layers.0.mlp.linear_fc2.weight"]
    apply.rewrite(pruned, tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").full_hash() == found.full_hash()


def test_weights_are_slices_of_the_parents(pruned: Path, tiny_parent: Path) -> None:
    parent, found, kept = open_checkpoint(tiny_parent), open_checkpoint(pruned), layered.selection()
    assert kept.heads is not None and kept.ffn is not None
    fc1 = parent.read("decoder.layers.2.mlp.linear_fc1.weight").view(2, 192, 96)[:, list(kept.ffn[2])]
    assert torch.equal(found.read("decoder.layers.2.mlp.linear_fc1.weight"), fc1.reshape(-1, 96))
    groups = parent.read("decoder.layers.3.self_attention.linear_qkv.weight").view(6, 4 * 12, 96)
    whole = groups[sorted({head // 2 for head in kept.heads[3]})].reshape(-1, 96)
    assert torch.equal(found.read("decoder.layers.3.self_attention.linear_qkv.weight"), whole)


def test_a_plan_round_trips_and_contradictions_are_refused(tiny_parent: Path, tmp_path: Path) -> None:
    made = layered.plan(open_checkpoint(tiny_parent), layered.selection())
    made.write(tmp_path / "plan.json")
    assert plans.read(tmp_path / "plan.json") == made
    content = json.loads((tmp_path / "plan.json").read_text())
    assert len(content["target"]["layers"]) == 4 and "layers" not in content["source"]
    content["kept_ffn"][0].pop()
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="kept_ffn of layer 0: expected the target's 50 indices, got 49"):
        plans.read(tmp_path / "plan.json")


def test_layers_without_any_attention_left_are_refused(tiny_parent: Path) -> None:
    from megatron_prune.errors import CheckpointError

    with pytest.raises(CheckpointError, match="expected attention in one of them"):
        layered.selection(((0, 50),) * 4).shape(open_checkpoint(tiny_parent).shape)


@pytest.mark.parametrize("tp", [1, 2])
def test_unmodified_megatron_builds_checks_and_loads_what_its_format_can_say(
    tiny_hf: Callable[..., Path], distributed: Callable[..., list[Any]], tmp_path: Path, tp: int
) -> None:
    """Other FFN sizes, no attention, no MLP; in a model with scaled RoPE, the only one that its check accepts."""
    sizes, folder = ((6, 50), (0, 192), (6, 64), (6, 0)), tiny_hf("llama-gqa-tied-rope", layers=4)
    import_hf(folder, tmp_path / "parent")
    cut = layered.cut(tmp_path / "parent", tmp_path / "cut", sizes)
    assert unreadable(open_checkpoint(cut).args) is None
    tokens = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = layered.masked(folder, layered.selection(sizes))(tokens).logits
    found = distributed(layered.megatron_logits, tp, str(cut), tokens, tp)[-1]
    assert (found[..., :VOCABULARY] - expected).abs().max() < 1e-4


def test_what_unmodified_megatron_cannot_build_is_said(pruned: Path, tiny_parent: Path, tmp_path: Path) -> None:
    [said] = warnings(open_checkpoint(pruned))
    assert "cannot build layers with different numbers of heads" in said
    same_heads = layered.cut(tiny_parent, tmp_path / "cut", ((6, 50), (0, 192), (6, 64), (6, 0)))
    [said] = warnings(open_checkpoint(same_heads))
    assert "use_rope_scaling=False" in said and "it takes True alone" in said
    assert warnings(open_checkpoint(tiny_parent)) == []


def statistics(parent: Checkpoint) -> Statistics:
    """Made-up ones; later layers matter more."""
    generator = torch.Generator().manual_seed(0)
    sizes = tensor_shapes(parent.shape, gradients=True, outliers=True)
    tensors = {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    for name in ("qkv.first", "proj.first", "fc1.first", "fc2.first"):
        tensors[name] *= torch.arange(1, 5)[:, None]
    tensors["outliers"] = torch.tensor([[9000, 90, share, 5, 1] for share in (9, 70, 30, 31)], dtype=torch.float64)
    run = {"prefix": "p", "corpus": "c", "sampling": "sequential", "seed": None, "windows": [0, 1, 2]}
    return Statistics(tensors, parent.shape, parent.fingerprint(), 64, 3, 30.0, (run,))


@pytest.mark.parametrize("allocation", ["global", "owl"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_method_whose_layers_may_differ_is_planned_on_its_budget(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tp: int, allocation: str
) -> None:
    parent = open_checkpoint(tiny_parent)
    asked = verbs.TargetSettings(ratio=0.4, divisible_by=4)
    own = options.LLMPrunerOptions(allocation=allocation, least_kept=0.35)
    choice = choices.choose("llm-pruner", asked, own, tensor_parallel=tp)
    question = choice.question(parent)
    made = choice.make(question, statistics(parent))
    assert made.settings["least_kept"] == 0.35
    assert abs(made.target.linear_parameters() / (0.6 * parent.shape.linear_parameters()) - 1) <= 0.005
    assert len(set(made.target.by_layer())) > 1
    for layer in made.target.by_layer():
        assert layer.num_attention_heads % tp == layer.ffn_hidden_size % 4 == 0
        assert layer.num_attention_heads >= 0.35 * 12 and layer.ffn_hidden_size >= 0.35 * 192
    question.write(tmp_path / "candidates.json", statistics(parent))
    assert candidates.read(tmp_path / "candidates.json")[0] == question
    show_plan(made)
    shown = capsys.readouterr().out
    assert all(f" {layer.ffn_hidden_size} " in shown for layer in made.target.by_layer()) and "by layer" in shown
    monkeypatch.setattr(LLMPruner, "select", lambda *_: layered.selection())
    with pytest.raises(PlanError, match="expected layers that keep .* within 0.5%, got layers that keep"):
        choice.make(question, statistics(parent))


def test_owl_needs_outliers_which_merged_statistics_lack(tiny_parent: Path) -> None:
    parent, asked = open_checkpoint(tiny_parent), verbs.TargetSettings(ratio=0.4, divisible_by=4)
    choice = choices.choose("wanda-sp", asked, options.WandaSpOptions(allocation="owl"))
    whole = statistics(parent)
    choice.make(choice.question(parent), whole)
    merged = replace(whole, tensors={name: one for name, one in whole.tensors.items() if name != "outliers"})
    with pytest.raises(StatisticsError, match="expected those of one calibration, .*got merged ones"):
        choice.make(choice.question(parent), merged)


def test_keeping_heads_is_refused_where_layers_may_differ(tiny_parent: Path) -> None:
    """It would be accepted and have no effect: a ranking over all layers decides."""
    asked = verbs.TargetSettings(ratio=0.4, divisible_by=4, keep_heads=True)
    uniform, everywhere = (
        choices.choose("llm-pruner", asked, options.LLMPrunerOptions(allocation=allocation))
        for allocation in ("uniform", "global")
    )
    uniform.question(open_checkpoint(tiny_parent))
    with pytest.raises(UsageError, match="--keep-heads: expected a cut that leaves layers of one shape"):
        everywhere.question(open_checkpoint(tiny_parent))


def test_layers_that_differ_are_refused_early_where_they_cannot_be_exported(tiny_parent: Path) -> None:
    """Biases on queries, keys and values: a Qwen2 can be exported, but not with layers that differ."""
    args, asked = open_checkpoint(tiny_parent).args, verbs.TargetSettings(ratio=0.4, divisible_by=4)
    uniform, everywhere = (
        choices.choose("llm-pruner", asked, options.LLMPrunerOptions(allocation=allocation))
        for allocation in ("uniform", "global")
    )
    everywhere.refuse_unexportable_layers(args, "llama")
    with pytest.raises(UsageError, match="different shapes.*add_qkv_bias=True, but LayeredLlama"):
        everywhere.refuse_unexportable_layers({**args, "add_qkv_bias": True}, "qwen2")
    uniform.refuse_unexportable_layers({**args, "add_qkv_bias": True}, "qwen2")
