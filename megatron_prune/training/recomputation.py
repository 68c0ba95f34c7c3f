"""FLOPs of recomputed activations: what ``--recompute-granularity`` makes a backward pass execute again."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from megatron_prune.checkpoint.layout import ModelShape, weights_of_layer


def recomputed_flops(args: argparse.Namespace, shape: ModelShape) -> int:
    """Dense GEMM FLOPs that training on one sequence repeats, by Megatron's rules for its flags.

    ``full`` repeats the forward pass of whole layers: of all (``uniform``), or of the first of every virtual pipeline
    stage (``block``). ``selective`` repeats the products of attention (``core_attn``), or the MLP; its other modules
    have no GEMM.
    """
    every = range(shape.num_layers)
    if args.recompute_granularity == "full":
        layers = _first_of_stages(args) if args.recompute_method == "block" else every
        return sum(shape.layer_flops(layer, args.seq_length) for layer in layers)
    if args.recompute_granularity == "selective":
        modules = args.recompute_modules or ["core_attn"]
        return sum(_of_modules(shape, layer, args.seq_length, modules) for layer in every)
    return 0


def _of_modules(shape: ModelShape, layer: int, length: int, modules: Iterable[str]) -> int:
    linears = [weight for weight in weights_of_layer(shape, layer) if weight.is_linear]
    mlp = sum(2 * length * weight.numel for weight in linears if weight.suffix.startswith("mlp."))
    attention = shape.layer_flops(layer, length) - sum(2 * length * weight.numel for weight in linears)
    return attention * ("core_attn" in modules) + mlp * ("mlp" in modules)


def _first_of_stages(args: argparse.Namespace) -> list[int]:
    """The layers that ``block`` recomputes: the first ones of every stage, counted over the model."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.training.arguments import core_transformer_config_from_args

    config, virtual = core_transformer_config_from_args(args), args.virtual_pipeline_model_parallel_size
    found: list[int] = []
    first = 0
    for chunk in range(virtual or 1):  # the first virtual stage of all stages comes first
        for rank in range(args.pipeline_model_parallel_size):
            layers = get_num_layers_to_build(config, chunk if virtual else None, rank)
            found += range(first, first + min(layers, args.recompute_num_layers))
            first += layers
    return found
