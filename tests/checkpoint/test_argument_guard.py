"""Every argument of Megatron's model, set to another value: its checkpoint alone has the same loss, or is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_prune.checkpoint import model_arguments
from megatron_prune.checkpoint.layer_shapes import ENCODED, PATH
from megatron_prune.checkpoint.layout import OTHER_MODELS
from megatron_prune.checkpoint.model_arguments import FREE, compared, known, of_the_function
from megatron_prune.engine import from_checkpoint
from megatron_prune.errors import UsageError
from tests.checkpoint import argument_guard, small
from tests.checkpoint.argument_guard import OUTCOMES

TABLE = Path(__file__).parents[2] / "docs" / "model-arguments.json"
BUGS = {"DIFFERENT", "FAILED"}
# In every run: one that this package restores, one that is refused, one that splits the model (with dropout).
SAMPLE = {"window_size": "equal", "softmax_type": "refused", "tensor_model_parallel_size": "equal"}


def test_a_sample(distributed, tmp_path):
    [found] = distributed(argument_guard.examine, 1, list(SAMPLE), str(tmp_path))
    assert {one.argument: one.outcome for one in found} == SAMPLE, found


def test_the_table_has_every_argument_and_no_bug():
    """If Megatron changed: python -m tests.checkpoint.argument_guard docs/model-arguments.json; look at what is new."""
    rows = {row["argument"]: row for row in json.loads(TABLE.read_text())}
    assert set(rows) == set(known())
    for name, row in rows.items():
        assert row["outcome"] in OUTCOMES.keys() - BUGS, row
        if row["outcome"] == "equal":
            assert name not in compared() and name not in OTHER_MODELS, row
        if row["outcome"] == "refused":
            assert name in compared() or name in OTHER_MODELS, row


def test_every_argument_must_agree_with_the_checkpoint_or_has_a_reason():
    function, run = set(of_the_function()), model_arguments._CANNOT_MATTER
    assert not function & FREE.keys() and all(FREE.values())
    assert {name for name in known() if name not in function | FREE.keys() and not name.startswith(run)} == set()


_GPT2 = {
    "swiglu": False, "add_bias_linear": True, "group_query_attention": False, "num_query_groups": 1,
    "untie_embeddings_and_output_weights": False, "normalization": "LayerNorm", "bias_gelu_fusion": True,
    "position_embedding_type": "learned_absolute",
}  # fmt: skip


def test_a_flag_of_the_function_agrees_with_the_checkpoint_or_is_refused():
    """Every argument of Megatron's parser that says what a model computes, beside a Llama and a GPT-2: with another
    value than the checkpoint's, and with its own."""
    from megatron_prune.engine.arguments import megatron_parser

    parser, refused = megatron_parser(), set()
    for stored in (small.ARGS, small.ARGS | _GPT2):
        checkpoint = SimpleNamespace(args=stored, root="CKPT")
        for action in parser._actions:
            name = action.dest
            if name not in of_the_function():
                continue
            words = argument_guard.flags(name, known().get(name), action)
            said, own = getattr(parser.parse_args(words), name), model_arguments.stored_argument(stored, name)
            if said != own:
                try:
                    from_checkpoint.refuse_contradictions({name: said}, parser, words, checkpoint)
                except UsageError as error:
                    assert error.flag == words[0] and "CKPT" in str(error), name
                    refused.add(name)
            if own is not None:
                from_checkpoint.refuse_contradictions({name: own}, parser, words, checkpoint)
    assert set(of_the_function()) == refused


def test_layers_that_differ_are_compared_by_their_content(tmp_path):
    layers = {"block_configs": [{"attention": {"no_op": True}}]}
    (tmp_path / "same.json").write_text(json.dumps(layers, indent=4))
    (tmp_path / "other.json").write_text(json.dumps({"block_configs": []}))
    differing = functools.partial(model_arguments.differing_value, small.ARGS | {ENCODED: json.dumps(layers)})
    assert differing(PATH, str(tmp_path / "same.json")) is None and differing(ENCODED, json.dumps(layers)) is None
    for given in ("other.json", "absent.json"):
        assert differing(PATH, str(tmp_path / given)) == "the layers that it stores"


@pytest.mark.slow
def test_the_table_is_what_comes_out(distributed, tmp_path):
    """Every argument once more: twenty minutes of one core."""
    [found] = distributed(argument_guard.examine, 1, None, str(tmp_path), timeout=7200)
    assert not [one for one in found if one.outcome in BUGS]
    rows = {row["argument"]: row["outcome"] for row in json.loads(TABLE.read_text())}
    assert {one.argument: one.outcome for one in found} == rows
