"""A parent whose layers differ already, as flap leaves one, is cut again: one layer has no attention, one no MLP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune import verbs
from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.cli.pruning_tables import show_plan
from megatron_prune.errors import UsageError
from megatron_prune.methods import options
from megatron_prune.methods.base import Selection
from megatron_prune.settings import Settings
from megatron_prune.structured import apply, candidates
from megatron_prune.structured import choice as choices
from megatron_prune.structured import plan as plans
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics
from tests.calibration.test_scoring import SEQUENCES, TEXT, hf_loss
from tests.checkpoint import ranks
from tests.structured import layered
from tests.structured.test_layers import statistics
from tests.tiny import VOCABULARY

GLOBAL = options.FlapOptions(allocation="global")


@pytest.fixture(scope="module")
def parent(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered.cut(tiny_parent, tmp_path_factory.mktemp("again") / "parent", biases=True)


@pytest.fixture
def smaller(tiny_hf: Callable[..., Path]) -> Any:
    """The same model in transformers, in float64."""
    return layered.really_cut(tiny_hf("llama-gqa", layers=4), layered.with_means(layered.selection()))


def made_up(parent: Checkpoint) -> Statistics:
    """With numbers that must not be read after the channels of smaller layers."""
    found = statistics(parent)
    for name, axis in (("attention.sum", "heads"), ("mlp.sum", "ffn")):
        for layer, own in enumerate(parent.shape.extents(axis)):  # type: ignore[arg-type]
            found.tensors[name][layer, own:] = 1e9
    return found


def asked(name: str, own: Settings, parent: Checkpoint, *, tp: int = 1, **target: Any) -> tuple[Any, Question]:
    wanted = verbs.TargetSettings.read({"divisible_by": 2, **target})
    choice = choices.choose(name, wanted, own, tensor_parallel=tp, seed=3)
    return choice, choice.question(parent)


@pytest.mark.parametrize(
    ("name", "own", "tp", "pp"),
    [
        ("flap", GLOBAL, 2, 2),
        pytest.param("flap", options.FlapOptions(), 2, 1, marks=pytest.mark.slow),
        pytest.param("wanda-sp", options.WandaSpOptions(allocation="global"), 1, 2, marks=pytest.mark.slow),
        pytest.param("llm-pruner", options.LLMPrunerOptions(exempt_layers="0"), 2, 2, marks=pytest.mark.slow),
    ],
)
def test_logits_are_those_of_the_model_that_is_cut_twice(
    parent: Path, smaller: Any, distributed: Callable[..., list[Any]], tmp_path: Path, capsys: Any,
    name: str, own: Settings, tp: int, pp: int,
) -> None:  # fmt: skip
    """The budget counts what is there, biases of both cuts add up, and what a layer lacks stays away."""
    source = open_checkpoint(parent)
    choice, question = asked(name, own, source, tp=tp, ratio=0.3)
    made = choice.make(question, made_up(source))
    given, left = source.shape.by_layer(), made.target.by_layer()
    assert abs(made.target.linear_parameters() / (0.7 * source.shape.linear_parameters()) - 1) <= 0.005
    assert (left[1].num_attention_heads, left[3].ffn_hidden_size) == (0, 0)
    assert left[2].num_query_groups == 1 and left != given
    for layer in left:
        assert not layer.unshared(tp) and layer.num_attention_heads == 2 * layer.num_query_groups
    made.write(tmp_path / "plan.json")
    assert plans.read(tmp_path / "plan.json") == made
    question.write(tmp_path / "candidates.json", made_up(source))
    assert candidates.read(tmp_path / "candidates.json")[0] == question
    show_plan(made)
    assert "0 to 192" in capsys.readouterr().out  # of FFN channels, before
    apply.apply_plan(parent, made, tmp_path / "twice")
    whole = tuple(tuple(range(layer.num_attention_heads)) for layer in given)
    kept = Selection(made.kept_layers, None, made.kept_heads or whole, made.kept_ffn, compensation=made.compensation)
    tokens = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = layered.really_cut(smaller, kept)(tokens).logits
    found = distributed(ranks.logits, tp * pp, str(tmp_path / "twice"), tp, pp, tokens)[-1]
    assert expected.std() > 0.1
    assert (found[..., :VOCABULARY] - expected).abs().max() < 1e-4
    assert [entry["method"] for entry in open_checkpoint(tmp_path / "twice").pruning] == ["minitron-width", name]


def test_layers_are_counted_by_their_mean_size(parent: Path) -> None:
    source = open_checkpoint(parent)
    shape, found = source.shape, made_up(source)
    choice, question = asked("shortgpt", options.NoOptions(), source, ratio=0.3)
    made = choice.make(question, found)
    order = found.tensors["block_influence"].argsort(descending=True)[:3].tolist()
    assert made.kept_layers == tuple(sorted(order))
    assert made.target.by_layer() == tuple(shape.by_layer()[layer] for layer in sorted(order))
    layers = [sum(w.numel for w in apply.weights(shape) if w.layer == n) for n in range(4)]
    goal = shape.parameters() - sum(layers) // 2 - 10
    choice, question = asked("shortgpt", options.NoOptions(), source, target_params=goal)
    assert choice.make(question, found).target.num_layers == 2
    for name, own in (("random", options.RandomOptions()), ("minitron-depth", options.MinitronDepthOptions())):
        choice, question = asked(name, own, source, target_num_layers=3)
        offered = question.candidates(found)
        assert len(offered) == (1 if name == "random" else 4)
        assert all(one.skips_layers_only and one.target == one.selection.shape(shape) for one in offered)


@pytest.mark.parametrize(
    ("name", "own", "target", "message"),
    [
        ("minitron-width", options.MinitronWidthOptions(), {"ratio": 0.3},
         "--method: expected flap, llm-pruner, wanda-sp, .* got one that cuts hidden channels"),
        ("minitron-width", options.MinitronWidthOptions(search=("ffn",)), {"ratio": 0.3},
         "--method: .* got minitron-width for a parent whose layers differ"),
        ("random", options.RandomOptions(axis="width"), {"ratio": 0.3}, "--method: .* got one that cuts hidden"),
        ("sheared-llama", options.NoOptions(), {"target_num_layers": 2}, "--method: .* got sheared-llama for"),
        ("flap", GLOBAL, {"target_ffn_hidden_size": 40},
         "--target-ffn-hidden-size: expected --ratio or --target-params, got 40 for a parent whose layers differ"),
        ("flap", GLOBAL, {"ratio": 0.3, "keep_heads": True}, "--keep-heads: expected a cut that leaves layers"),
        ("flap", GLOBAL, {"target_params": 10**9}, "--target-params: expected a number between 0 and the parent"),
        ("shortgpt", options.NoOptions(), {"ratio": 0.01}, "--ratio: expected a target that removes 1 to 3 of 4"),
        ("shortgpt", options.NoOptions(), {"target_num_layers": 4}, "--target-num-layers: .* got the parent's sizes"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_of_it_is_refused(
    parent: Path, name: str, own: Settings, target: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        asked(name, own, open_checkpoint(parent), **target)


def test_a_cut_to_layers_that_are_alike_is_stacked_again(tiny_parent: Path, tmp_path: Path) -> None:
    """Two layers of one shape stay of four."""
    source = layered.cut(tiny_parent, tmp_path / "cut", ((6, 50), (4, 50), (6, 50), (2, 8)))
    choice, question = asked("shortgpt", options.NoOptions(), open_checkpoint(source), target_num_layers=2)
    found = statistics(open_checkpoint(source))
    found.tensors["block_influence"].copy_(torch.tensor([3.0, 1.0, 2.0, 0.0]))
    apply.apply_plan(source, choice.make(question, found), tmp_path / "alike")
    left = open_checkpoint(tmp_path / "alike")
    assert left.shape.by_layer() == (LayerShape(12, 6, 50),) * 2 and "layers" not in left.pruning[-1]["target"]
    assert torch.equal(
        left.read("decoder.layers.1.mlp.linear_fc2.weight"),
        open_checkpoint(source).read("decoder.layers.2.mlp.linear_fc2.weight"),
    )


@pytest.mark.parametrize("layout", ["pp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_prune_removes_the_layers_whose_absence_costs_least(
    job: Callable[..., Any], parent: Path, smaller: Any, tiny_corpus: Path, tmp_path: Path, layout: str
) -> None:
    """Calibrated, scored and cut in one load; losses against transformers in float64."""
    flag = "--tensor-model-parallel-size" if layout == "tp2" else "--pipeline-model-parallel-size"
    job([
        "prune", "--load", parent, "--save", tmp_path / "cut", "--method", "minitron-depth", "--ratio", 0.25,
        "--calibration-data-path", tiny_corpus, *TEXT, flag, 2,
    ], nproc=2).ok()  # fmt: skip
    made = plans.read(tmp_path / "cut" / "pruning" / "plan.json")
    layers, expected = list(smaller.model.layers), []
    for gone in range(4):
        smaller.model.layers = torch.nn.ModuleList(layer for n, layer in enumerate(layers) if n != gone)
        expected.append(hf_loss(smaller, tiny_corpus))
    assert made.calibration is not None and made.calibration["sequences"] == SEQUENCES
    assert [row.loss for row in made.candidates] == pytest.approx(expected, rel=2e-6)
    best = min(range(4), key=expected.__getitem__)
    assert open_checkpoint(tmp_path / "cut").shape.by_layer() == tuple(
        layer for number, layer in enumerate(open_checkpoint(parent).shape.by_layer()) if number != best
    )
