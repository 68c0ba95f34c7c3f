"""Blocks whose MLP reads the block's input, as attention does, rather than attention's result: Pythia and GPT-NeoX.

Megatron's block adds attention's output to its input x, and then what the MLP makes of a norm of that sum. If this norm
reads x instead, the sum is x + attention(norm(x)) + MLP(norm'(x)). Hooks on every block, and on the norm before its
MLP, do this for both layer specs: with Transformer Engine that norm is an identity before a fused linear. The weights
are those of any other block. Megatron has no such argument, so ``--parallel-residual`` is this package's own: it is
stored in checkpoints, and unmodified Megatron would ignore it (``inspect`` says so).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from megatron_prune.engine.spec import has_mlp
from megatron_prune.errors import UsageError

FLAG = "--parallel-residual"


def refuse_unfit(args: argparse.Namespace) -> None:
    """UsageError for what would compute the norm before the MLP again later, or elsewhere, when the input is gone."""
    if not args.parallel_residual:
        return
    for unfit, flag, got in (
        ("layernorm" in (args.recompute_modules or ()), "--recompute-modules", "layernorm"),
        (args.cuda_graph_impl != "none", "--cuda-graph-impl", args.cuda_graph_impl),
        (args.fused_residual_rmsnorm, "--fused-residual-rmsnorm", "on"),
    ):
        if unfit:
            raise UsageError(flag, got=got, expected=f"no such flag with {FLAG}", why="the norm's input is replaced")


def attach(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """A pre-wrap hook of Megatron's model: the MLP of every block reads the block's input."""
    for chunk in chunks:
        for block in chunk.decoder.layers:  # type: ignore[union-attr]
            if has_mlp(block):
                _attach(block)
    return chunks


def _attach(block: Any) -> None:
    held: list[torch.Tensor] = []  # the input of the block that runs

    def keep(_block: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        held[:] = [args[0] if args else named["hidden_states"]]

    block.parallel_residual = True  # for layers that run without these hooks (engine/decoding.py)
    block.register_forward_pre_hook(keep, with_kwargs=True)
    block.pre_mlp_layernorm.register_forward_pre_hook(lambda _norm, args: (held.pop(), *args[1:]))
