"""fp32 masters that begin with the checkpoint's values where the weights live in FP8 (``--fp8-param-gather``).

Megatron makes masters of weights that were loaded without their optimizer out of the weights as they are then: FP8,
dequantized. A run from a pruned checkpoint would begin with an FP8 rounding of it, one from random weights would not.
``load_main_params_from_ckpt`` mends it where the checkpoint is not streamed into FP8, and only works with
``no_load_optim``, which would lose the moments where a run goes on from its own checkpoint: so all three are set for
the launch that begins, and for no other.
"""

from __future__ import annotations

import argparse

from megatron_prune import storage
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.errors import UsageError


def begin_with_checkpoint(args: argparse.Namespace) -> None:
    """Set what lets masters take a start's own values; UsageError where they cannot. Before Megatron validates."""
    if not args.fp8_param_gather or not _loads_weights_alone(args):
        return
    if args.use_precision_aware_optimizer and (args.fp8_recipe == "delayed" or args.main_params_dtype != "fp32"):
        raise UsageError(
            "--use-precision-aware-optimizer", given="with --fp8-param-gather and --fp8-recipe " + args.fp8_recipe,
            allowed="without it, or with another recipe and fp32 masters, where a run starts from a checkpoint",
            why="this optimizer makes its masters of the FP8 weights, which are a rounding of the checkpoint's",
        )  # fmt: skip
    args.load_main_params_from_ckpt = args.no_load_optim = True
    args.stream_ckpt_dequant = False  # streaming would hand over the FP8 weights again


def _loads_weights_alone(args: argparse.Namespace) -> bool:
    if args.load is None or not storage.path(args.load).is_dir() or find_iteration(args.load) is None:
        return args.pretrained_checkpoint is not None
    return args.finetune or args.no_load_optim or open_checkpoint(args.load).release
