"""Layers of different shape: counted by hand, stored as Megatron reads them, and refused where they cannot be."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_prune.checkpoint.layer_shapes import ENCODED, PATH, LayerShape, canonical, decode
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape, weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import CheckpointError
from tests.checkpoint import small

UNIFORM = ModelShape(3, 24, 6, 3, 5, 20, 16, tied=False)
LAYERS = (LayerShape(6, 3, 20), LayerShape(4, 2, 7), LayerShape(0, 0, 11))
SHAPE = UNIFORM.with_layers(LAYERS)
ARGS = {
    "num_layers": 3, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 3, "group_query_attention": True,
    "kv_channels": 5, "ffn_hidden_size": 20, "padded_vocab_size": 16, "swiglu": True, "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
}  # fmt: skip


def by_hand(layer: LayerShape) -> int:
    """Linear weights of a layer, hidden size 24, heads of 5."""
    heads, groups, ffn = layer.num_attention_heads, layer.num_query_groups, layer.ffn_hidden_size
    return 24 * 5 * (heads + 2 * groups) + 5 * heads * 24 + 3 * 24 * ffn


def test_counts_follow_the_layers() -> None:
    assert SHAPE.linear_parameters() == sum(map(by_hand, LAYERS))
    norms = 24 * (2 + 2 + 1 + 1)  # one in the layer without attention, and the final one
    assert SHAPE.parameters() == SHAPE.linear_parameters() + norms + 2 * 16 * 24
    products = 4 * 9 * 9 * 5 * (6 + 4)  # QK and PV, heads of 5
    assert SHAPE.forward_flops(9) == 2 * 9 * SHAPE.linear_parameters() + products + 2 * 9 * 24 * 16
    names = {weight.name for weight in weights(SHAPE)}
    assert not any(name.startswith("decoder.layers.2.self_attention") for name in names)
    assert "decoder.layers.2.mlp.linear_fc1.layer_norm_weight" in names


def test_equal_layers_are_a_uniform_shape_whose_json_is_as_before() -> None:
    found = UNIFORM.with_layers([LayerShape(4, 2, 7)] * 2)
    assert found == ModelShape(2, 24, 4, 2, 5, 7, 16, tied=False) and type(found) is ModelShape
    assert "layers" not in asdict(found)
    assert ModelShape.read(json.loads(json.dumps(asdict(SHAPE)))) == SHAPE
    assert replace(SHAPE, hidden_size=12).by_layer() == LAYERS


def test_the_largest_layer_gives_the_models_sizes() -> None:
    """Heads and groups are those of one layer: the maximum of each alone would not divide."""
    mixed = UNIFORM.with_layers([LayerShape(6, 2, 1), LayerShape(5, 5, 3), LayerShape(1, 1, 0)])
    assert (mixed.num_attention_heads, mixed.num_query_groups, mixed.ffn_hidden_size) == (6, 2, 3)


def test_stored_arguments_give_the_shape_back_and_megatron_reads_them() -> None:
    from megatron.core.transformer.heterogeneous.heterogeneous_config import AttentionConfig, MLPConfig

    args = {**ARGS, **SHAPE.to_args()}
    assert ModelShape.from_args(args) == SHAPE and args[PATH]
    blocks = json.loads(args[ENCODED])["block_configs"]
    for block, layer in zip(blocks, LAYERS, strict=True):
        attention = AttentionConfig.build_config_from_dict(block, 6)
        mlp = MLPConfig.build_config_from_dict(block, 24)
        assert (attention.num_query_groups or 0, attention.no_op) == (
            layer.num_query_groups,
            not layer.num_attention_heads,
        )
        assert (mlp.ffn_hidden_size or 0, mlp.no_op) == (layer.ffn_hidden_size, not layer.ffn_hidden_size)
    assert blocks[1]["attention"]["num_attention_heads"] == 4  # which Megatron's format cannot say
    assert "num_attention_heads" not in blocks[0]["attention"]
    assert ENCODED not in UNIFORM.to_args() and PATH not in UNIFORM.to_args()


def test_the_published_form_is_read() -> None:
    """Llama-Nemotron: groups by heads per group, FFN sizes by a factor (2.625 is Llama-3.1-70B's 28672)."""
    blocks = [
        {"attention": {"n_heads_in_group": 8, "no_op": False}, "ffn": {"ffn_mult": 5.25, "no_op": False}},
        {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 1.3125, "no_op": False}},
        {"attention": {"n_heads_in_group": 16}, "ffn": {"ffn_mult": None, "no_op": True}},
    ]
    found = decode(json.dumps({"block_configs": blocks}), heads=64, hidden=8192, count=3)
    assert found == (LayerShape(64, 8, 28672), LayerShape(0, 0, 7168), LayerShape(64, 4, 0))


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ("{", "expected a list of layers"),
        ("[]", "expected a list of layers"),
        (7, "expected JSON"),
        (json.dumps({"block_configs": [{}]}), "expected 3 layers, got 1"),
        (json.dumps({"block_configs": [{}] * 3}), "expected a list of layers"),
        ("[" * 100_000, "expected a list of layers"),
        (json.dumps({"block_configs": [{"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}}] * 3}),
         "layer 0: expected attention or nothing in its place, got a linear layer"),
        (json.dumps({"block_configs": [{"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_hidden_size": 8}}] * 3}),
         "layer 0 has 6 heads in groups of 4"),
        (json.dumps({"block_configs": [{"attention": {"num_query_groups": "3"}, "ffn": {"ffn_hidden_size": 8}}] * 3}),
         "expected at least 0"),
        (json.dumps({"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_hidden_size": 8}}] * 3}),
         "expected attention in one of them"),
        (json.dumps({"block_configs": [{"attention": {"num_query_groups": 3}, "ffn": {"ffn_hidden_size": 2**40}}] * 3}),
         "ffn_hidden_size of a layer"),
    ],
)  # fmt: skip
def test_damaged_layers_are_refused(encoded: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelShape.from_args({**ARGS, ENCODED: encoded})


def test_a_path_without_its_content_is_refused() -> None:
    with pytest.raises(CheckpointError, match="expected the content of that file"):
        ModelShape.from_args({**ARGS, PATH: "layers.json"})


def test_a_shape_that_contradicts_its_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="layers: expected 3 that differ"):
        replace(SHAPE, ffn_hidden_size=21)
    with pytest.raises(CheckpointError, match="layers: expected 3 that differ"):
        HeterogeneousShape(**asdict(UNIFORM), layers=UNIFORM.by_layer())


def test_equal_layers_are_stacked_and_no_longer_said_one_by_one(tmp_path: Path) -> None:
    """Megatron would look for every layer's own weights if they were."""
    block = {"attention": {"num_query_groups": 2}, "ffn": {"ffn_hidden_size": 48}}
    args = {**small.ARGS, PATH: "layers.json", ENCODED: json.dumps({"block_configs": [block] * 4})}
    found = open_checkpoint(small.write(tmp_path / "checkpoint", args))
    assert found.args[ENCODED] is None and found.args[PATH] is None
    assert "decoder.layers.mlp.linear_fc2.weight" in found.stored and found.shape == ModelShape.from_args(small.ARGS)


def test_the_same_layers_are_always_the_same_arguments() -> None:
    """Runs are compared by their arguments: what a checkpoint stores, flags of the shape, and what was read again."""
    args = {**ARGS, **SHAPE.to_args(), "rotary_base": 700, "use_rope_scaling": True, "rope_scaling_factor": 32.0}
    found = canonical(args)
    assert canonical({**args, **found}) == found and ModelShape.from_args({**args, **found}) == SHAPE
    whole = json.loads(found[ENCODED])
    assert (whole["rope_theta"], whole["rope_scaling"], whole["tie_word_embeddings"]) == (700, {"factor": 32.0}, False)
    other = json.loads(args[ENCODED]) | {"architectures": ["Any"]}
    assert canonical({**args, ENCODED: json.dumps(other, indent=2)}) == found
    assert canonical(ARGS) == {}
