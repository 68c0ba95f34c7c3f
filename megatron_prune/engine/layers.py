"""Models whose layers differ: Megatron's heterogeneous layers, with numbers of heads of their own on top.

Megatron's ``HeterogeneousTransformerConfig`` gives a layer another FFN size or number of query groups, or leaves its
attention or MLP out, and stores each layer's weights under its own name. Its check of the command line accepts no other
models than Llama 3.1 with scaled RoPE, and its default layer spec is wrong with virtual pipeline stages: neither is
used here. Layers stay in order, as many to each pipeline stage as of any model.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.layer_shapes import ENCODED, IN_WORDS, PATH, LayerShape, canonical, decode
from megatron_prune.errors import UsageError
from megatron_prune.untrusted import read_bytes

FLAG = "--" + PATH.replace("_", "-")
_MOST_BYTES = 16 << 20  # of the file


def differ(args: argparse.Namespace) -> bool:
    """True if the model of ``args`` is built layer by layer."""
    return bool(getattr(args, ENCODED, None))


def sizes(args: argparse.Namespace) -> tuple[LayerShape, ...]:
    """The shape of every layer of such a model."""
    return decode(
        getattr(args, ENCODED), heads=args.num_attention_heads, hidden=args.hidden_size, count=args.num_layers
    )


def settle(args: argparse.Namespace) -> None:
    """Read the file of ``--heterogeneous-layers-config-path``, if the command line gives one, and write the layers as
    every run with them does: Megatron fails on entries that are absent because they have no meaning."""
    if getattr(args, PATH, None) and not differ(args):
        path = Path(getattr(args, PATH))
        if not path.is_file():
            raise UsageError(FLAG, got=path, expected="a JSON file with the block_configs of a model's layers")
        setattr(args, ENCODED, read_bytes(path, _MOST_BYTES).decode(errors="replace"))
    vars(args).update(canonical(vars(args)))


def refuse(args: argparse.Namespace, why: str) -> None:
    """UsageError for a model whose layers differ, in a verb that cannot take one."""
    if differ(args):
        raise UsageError(
            "--load", got="a model whose layers differ", expected="one whose layers have one shape", why=why
        )


@contextmanager
def unseen(args: argparse.Namespace) -> Iterator[None]:
    """Hide that layers differ from Megatron: from its check of arguments, and from its choice of a config."""
    held = {name: getattr(args, name, None) for name in (PATH, ENCODED)}
    vars(args).update(dict.fromkeys(held))
    try:
        yield
    finally:
        vars(args).update(held)


def refuse_unfit(args: argparse.Namespace) -> None:
    """UsageError for flags and sizes with which Megatron cannot build or split the layers."""
    if not differ(args):
        return
    for unfit, flag, got in (
        (args.cuda_graph_impl != "none", "--cuda-graph-impl", args.cuda_graph_impl),
        (args.fused_residual_rmsnorm, "--fused-residual-rmsnorm", "on"),
        (args.yaml_cfg is not None, "--yaml-cfg", args.yaml_cfg),
        (args.spec is not None, "--spec", args.spec),
    ):
        if unfit:
            raise UsageError(flag, got=got, expected="no such flag with layers that differ", why="it is not tested")
    ranks = args.tensor_model_parallel_size
    for number, layer in enumerate(sizes(args)):
        for name, size in layer.unshared(ranks).items():
            raise UsageError(
                "--tensor-model-parallel-size", got=ranks,
                expected="a size that divides every layer", why=f"layer {number} has {size} {IN_WORDS[name]}",
            )  # fmt: skip


def transformer_config(args: argparse.Namespace) -> Any:
    """Megatron's transformer config of a model whose layers differ."""
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.training.argument_utils import core_transformer_config_from_args

    class OwnHeads(HeterogeneousTransformerConfig):  # type: ignore[misc]  # Megatron is not typed
        """Layers that differ in their number of heads too."""

        layer_shapes: Sequence[LayerShape]

        def get_config_for_layer(self, layer_number: int) -> Any:
            """The config of a layer, counted from 1: this one, with the layer's sizes."""
            shape, found = self.layer_shapes[layer_number - 1], copy.copy(self)
            if shape.num_attention_heads:
                found.num_attention_heads = shape.num_attention_heads
                found.num_query_groups = shape.num_query_groups
            if shape.ffn_hidden_size:
                found.ffn_hidden_size = shape.ffn_hidden_size
            return found

    encoded = getattr(args, ENCODED)
    with unseen(args):
        setattr(args, ENCODED, encoded)
        config = core_transformer_config_from_args(args, OwnHeads)
    config.layer_shapes = sizes(args)
    return config


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The specs of the layers of this rank's stage, for a model config (``GPTModelConfig``)."""
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec

    use_te = config.transformer.transformer_impl == "transformer_engine"
    return get_gpt_heterogeneous_layer_spec(config.transformer, use_te, vp_stage=vp_stage)
