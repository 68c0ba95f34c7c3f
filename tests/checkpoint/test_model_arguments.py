"""Stored arguments that change a model and that nothing restores: verbs that build or rewrite it refuse them."""

from __future__ import annotations

import pytest

from megatron_prune.checkpoint import model_arguments
from megatron_prune.checkpoint.model_arguments import FORGOTTEN, compared, known, refuse_unrestored
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf
from megatron_prune.errors import CheckpointError
from megatron_prune.structured.apply import apply_plan, rewrite
from tests.checkpoint import megatron_arguments, plants, small
from tests.training.small import any_plan

# Known to change the function: attention spans, positions, activations, norms, multipliers.
MATTER = (
    "quick_geglu mrope_section softmax_type qk_l2_norm attention_output_gate glu_linear_offset "
    "activation_func_clamp_value apply_residual_connection_post_layernorm openai_gelu "
    "use_mup mup_output_mult experimental_attention_variant linear_attention_freq spec hybrid_layer_pattern"
).split()


def test_the_table_is_megatrons():
    """If Megatron changed: python -m tests.checkpoint.megatron_arguments > megatron_prune/checkpoint/…; review it."""
    assert known() == megatron_arguments.arguments()


def test_what_matters_is_compared_and_nothing_stands_for_nobody():
    assert set(MATTER) <= set(compared())
    names = set(known())
    for excused in model_arguments._CANNOT_MATTER:
        assert any(name.startswith(excused) for name in names), excused
    assert model_arguments._RESTORED - set(FORGOTTEN) <= names


def other_than(default):
    return {bool: lambda: not default, int: lambda: default + 1, float: lambda: default + 0.5, list: lambda: ["x"]}.get(
        type(default), lambda: "other"
    )()


@pytest.mark.parametrize("name", sorted(compared()))
def test_each_is_refused_by_name_with_both_values(name):
    default = compared()[name]
    refuse_unrestored({name: default}, "it")
    refuse_unrestored({}, "it")
    value = other_than(default)
    with pytest.raises(CheckpointError, match=rf"it was trained with {name}=.*default is ") as refused:
        refuse_unrestored({name: value}, "it")
    assert repr(value) in str(refused.value) and repr(default) in str(refused.value)
    with pytest.raises(CheckpointError, match=name):
        refuse_unrestored({name: value}, "it", {name: default})
    refuse_unrestored({name: value}, "it", {name: value})  # given by hand


def test_the_rest_is_restored_or_does_not_matter():
    changed = {name: other_than(default) for name, default in known().items() if name not in compared()}
    assert len(changed) > 200
    refuse_unrestored(changed, "it")


def test_whoever_rewrites_a_model_refuses_it(tmp_path):
    root = small.write(tmp_path / "other", small.ARGS | {"softmax_type": "off-by-one"})
    made = any_plan(open_checkpoint(root))
    for make in (
        lambda: rewrite(root, tmp_path / "made"),
        lambda: apply_plan(root, made, tmp_path / "made"),
        lambda: export_hf(root, tmp_path / "made"),
    ):
        with pytest.raises(CheckpointError, match="other was trained with softmax_type='off-by-one'"):
            make()
        assert not (tmp_path / "made").exists()


RECIPE = "--seq-length 16 --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 0.1 --mock-data".split()
MODEL = ["--load", "{}", "--use-checkpoint-args"]
VERBS = [
    ["evaluate", *MODEL, "--data-path", "none", "--output", "none"],
    ["calibrate", *MODEL, "--calibration-data-path", "none", "--output", "none.safetensors"],
    ["sparsify", *MODEL, "--method", "magnitude", "--ratio", "0.5", "--save", "none"],
    ["prune", *MODEL, "--method", "magnitude", "--ratio", "0.5", "--save", "none"],
    ["pretrain", "--pretrained-checkpoint", "{}", "--use-checkpoint-args", *RECIPE],
    ["pretrain", *MODEL, *RECIPE],
    ["pretrain", "--shape-from", "{}", *RECIPE],
]


def test_every_verb_that_builds_a_model_refuses_it(tmp_path, distributed):
    root = small.write(tmp_path / "other", small.ARGS | {"softmax_type": "off-by-one"})
    cases = [(words[0], [word.format(root) for word in words[1:]], "") for words in VERBS]
    (ends,) = distributed(plants.run_verbs, 1, cases)
    for (verb, words, _), (code, said) in zip(cases, ends, strict=True):
        assert code == 2 and "was trained with softmax_type='off-by-one'" in said, (verb, words, code, said[-500:])


def test_by_hand_it_must_be_given_as_it_is_stored(tmp_path, job, tiny_corpus):
    """Also without --use-checkpoint-args; with it, the model is that of the checkpoint."""
    changed = {"softmax_type": "off-by-one", "max_position_embeddings": 64, "vocab_size": 379, "padded_vocab_size": 384}
    root = small.write(tmp_path / "other", small.ARGS | changed)
    words = ["evaluate", "--load", root, "--data-path", tiny_corpus, "--seq-length", "16", "--windows", "1"]
    sizes = (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
        "--ffn-hidden-size 48 --kv-channels 10 --swiglu --normalization RMSNorm --disable-bias-linear "
        "--position-embedding-type rope --untie-embeddings-and-output-weights --padded-vocab-size 384 "
        "--vocab-size 379 --max-position-embeddings 64"
    ).split()
    refused = job([*words, *sizes, "--output", tmp_path / "scores.json"])
    assert refused.returncode == 2 and "softmax_type='off-by-one'" in refused.output, refused.output[-2000:]
    assert not (tmp_path / "scores.json").exists()
    job([*words, "--use-checkpoint-args", "--softmax-type", "off-by-one", "--output", tmp_path / "scores.json"]).ok()


def test_a_models_arguments_are_as_stored_or_megatrons_default():
    """So a second model can be built from the arguments of a first one, which may have other values."""
    stored = {"window_size": (8, 0), "rotary_base": 700, "bias_gelu_fusion": False, "apply_layernorm_1p": True, "lr": 1}
    found = model_arguments.restored(stored)
    assert found["window_size"] == (8, 0) and found["rotary_base"] == 700 and found["bias_gelu_fusion"] is False
    assert found["layernorm_zero_centered_gamma"] is True  # stored under its earlier name
    assert found["qk_layernorm"] is False and found["swiglu"] is False and "lr" not in found
    assert set(found) >= set(compared())
