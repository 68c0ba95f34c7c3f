"""``plan --exportable``, and the published shapes of pruned models from their parents' configurations."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.config import args_from_config, config_from_args, unexportable
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.errors import UsageError
from megatron_prune.methods.options import STRUCTURED
from megatron_prune.structured import choice as choices
from megatron_prune.structured.target import Target
from tests.convert import family_models


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Hidden 96 in 8 heads of 12: any other hidden size needs as many heads fewer."""
    folder = tmp_path_factory.mktemp("gpt2")
    return import_hf(family_models.write(folder / "hf", "gpt2"), folder / "parent")


def question(parent, method, *words, exportable=True, **own):
    asked = verbs.TargetSettings(**{"divisible_by": 4, **dict(words)})
    chosen = choices.choose(method, asked, STRUCTURED[method](**own), exportable=exportable)
    return chosen.question(parent)


def test_a_search_keeps_to_shapes_that_can_be_exported(gpt2):
    search = {"search": ("hidden", "heads", "ffn"), "max_candidates": 1000}
    size = [("target_params", 200_000), ("tolerance", 0.05)]
    every = question(gpt2, "minitron-width", *size, exportable=False, **search).targets
    kept = question(gpt2, "minitron-width", *size, **search).targets
    assert list(kept) == [s for s in every if s.hidden_size == 12 * s.num_attention_heads]
    assert 0 < len(kept) < len(every)


def test_an_explicit_shape_is_refused_with_the_reason(gpt2):
    sizes = [("target_hidden_size", 72)]
    assert question(gpt2, "minitron-width", *sizes, exportable=False).targets
    with pytest.raises(UsageError, match="--exportable: expected a shape .*got hidden 72, .*72 / 8"):
        question(gpt2, "minitron-width", *sizes)
    (shape,) = question(gpt2, "minitron-width", *sizes, exportable=False).targets
    assert re.search("heads have size 12", unexportable(open_checkpoint(gpt2.root), shape) or "")


LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
NEMOTRON_15B = {
    "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576,
    "num_hidden_layers": 32, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 4096, "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "relu2",
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
# The configurations that NVIDIA published: Llama-3.1-Minitron-4B-Width-Base, -Depth-Base, and Minitron-4B-Base.
PUBLISHED = {
    "width": (LLAMA, "minitron-width", {"hidden_size": 3072, "ffn_hidden_size": 9216}, 4.51e9),
    "depth": (LLAMA, "minitron-depth", {"num_layers": 16}, 4.54e9),
    "minitron-4b": (
        NEMOTRON_15B, "minitron-width",
        {"hidden_size": 3072, "num_attention_heads": 24, "ffn_hidden_size": 9216}, 4.19e9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    config, method, sizes, parameters = PUBLISHED[name]
    args = args_from_config(config)
    source = ModelShape.from_args(args)
    target = Target(sizes=sizes).choose(source, methods.get(method), STRUCTURED[method]())
    assert target.parameters() == pytest.approx(parameters, rel=2e-3)
    made = config_from_args({**args, **target.to_args()}, torch.bfloat16, config)
    changed = {"hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
               "num_attention_heads": "num_attention_heads"}  # fmt: skip
    for field, key in changed.items():
        assert made[key] == sizes.get(field, config[key])
    for key in ("model_type", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert made[key] == config[key]
    assert made["head_dim"] == 128
    assert replace(target, **{field: getattr(source, field) for field in sizes}) == replace(
        source, num_query_groups=target.num_query_groups
    )
