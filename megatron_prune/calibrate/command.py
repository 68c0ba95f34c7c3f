"""``torchrun … -m megatron_prune calibrate``: one forward pass over calibration text, statistics out.

Runs the parent at any TP×PP×DP and gathers, in that one pass, all that every forward-only method
needs at every ratio. Data-parallel replicas share out the windows (unevenly where they must).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_prune.calibrate.statistics import Statistics, json_path
from megatron_prune.engine import runtime
from megatron_prune.errors import UsageError

FLAGS = (
    "--calibration-data-path",
    "--calibration-sequences",
    "--calibration-seq-length",
    "--calibration-sampling",
)


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    args = runtime.start("calibrate", argv, _add_output_arguments, complete=complete)
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise UsageError("--output", given=output, allowed="a file name that ends in .safetensors")
    statistics = gather(args)
    if args.rank == 0:
        statistics.write(output)
        print(
            f"calibrated on {statistics.sequences} sequences of {statistics.seq_length} tokens, "
            f"loss {statistics.loss:.4f}; wrote {output} and {json_path(output)}",
            flush=True,
        )
    return 0


def _add_output_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="where the statistics go")
    return add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that say which text is read."""
    group = parser.add_argument_group("megatron_prune: calibration")
    group.add_argument("--calibration-data-path", metavar="PREFIX", help="tokenized corpus, without .bin")
    group.add_argument("--calibration-sequences", type=int, default=128, metavar="N", help="default 128")
    group.add_argument(
        "--calibration-seq-length", type=int, default=2048, metavar="S", help="tokens of each; default 2048"
    )
    group.add_argument(
        "--calibration-sampling",
        choices=("sequential", "random"),
        default="sequential",
        help="the first N windows of the corpus, or N windows drawn with --seed",
    )
    return parser


def complete(args: argparse.Namespace, argv: list[str], *, reads_text: bool = True) -> None:
    """Fill in what follows from the calibration's flags, and refuse flags that contradict them.

    Without ``reads_text`` nothing is calibrated, and the calibration's flags are refused.
    """
    from megatron_prune.engine.arguments import given

    runtime.refuse_layouts(args)
    for flag in () if reads_text else FLAGS:
        if given(argv, flag):
            raise UsageError(flag, given="on the command line", allowed="where the method needs statistics")
    if reads_text and args.calibration_data_path is None:
        raise UsageError("--calibration-data-path", given="nothing", allowed="the prefix of a tokenized corpus")
    if args.load is None:
        raise UsageError("--load", given="nothing", allowed="the parent checkpoint")
    if given(argv, "--seq-length"):
        raise UsageError(
            "--seq-length",
            given=args.seq_length,
            allowed="not with this verb",
            why="it is --calibration-seq-length",
        )
    if args.micro_batch_size not in (None, 1):
        raise UsageError(
            "--micro-batch-size",
            given=args.micro_batch_size,
            allowed="1",
            why="batching must not change a sum",
        )
    if args.sequence_parallel:
        raise UsageError(
            "--sequence-parallel",
            given="on",
            allowed="off with this verb",
            why="norm outputs must be whole sequences",
        )
    length, longest = args.calibration_seq_length, args.max_position_embeddings
    if reads_text and longest is not None and length > longest:
        raise UsageError("--calibration-seq-length", given=length, allowed=f"up to the model's {longest}")
    args.max_position_embeddings = longest or length
    length = min(length, args.max_position_embeddings)
    args.seq_length = length
    args.micro_batch_size, args.global_batch_size = 1, None
    args.save = None


def gather(args: argparse.Namespace) -> Statistics:
    """Run the calibration that ``args`` describe; whole statistics on every rank. Collective.

    The process group is gone when it returns: what follows may take one rank hours.
    """
    import torch
    from megatron.core import parallel_state as mpu

    from megatron_prune.calibrate.hooks import Recorder
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.data import indexed
    from megatron_prune.data.windows import windows
    from megatron_prune.engine import forward

    if args.virtual_pipeline_model_parallel_size is not None:  # not known before Megatron has read the layout
        raise UsageError(
            "--pipeline-model-parallel-layout",
            given=args.pipeline_model_parallel_layout,
            allowed="one stage a rank with this verb",
            why="the model is read stage by stage",
        )
    parent = open_checkpoint(directory(args))
    indexed.check_fits_model(args.calibration_data_path, parent.shape.padded_vocab_size)
    chosen = windows(
        args.calibration_data_path,
        args.calibration_seq_length,
        args.calibration_sequences,
        seed=args.seed if args.calibration_sampling == "random" else None,
        flag="--calibration-sequences",
    )
    runtime.initialize(args)
    model = runtime.load_model(args)
    own = chosen[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    with Recorder(model[0], parent.shape) as recorder:
        losses = forward.run(model, own)
        # Every TP rank of the last stage has the same losses.
        mine = losses if losses is not None and mpu.get_tensor_model_parallel_rank() == 0 else []
        tensors, loss_sum = recorder.gather(sum(mine) * chosen.seq_length)
    torch.distributed.destroy_process_group()
    return Statistics(
        tensors=tensors,
        shape=parent.shape,
        parent=parent.fingerprint(),
        seq_length=chosen.seq_length,
        sequences=len(chosen),
        loss_sum=loss_sum,
        calibrations=(_provenance(args, indexed.fingerprint(args.calibration_data_path), chosen.numbers.tolist()),),
    )


def directory(args: argparse.Namespace) -> Path:
    """The checkpoint that Megatron will load: ``--load``, at ``--ckpt-step`` if one is given."""
    return Path(args.load) / (f"iter_{args.ckpt_step:07d}" if args.ckpt_step else "")


def _provenance(args: argparse.Namespace, corpus: str, numbers: list[int]) -> dict[str, Any]:
    random = args.calibration_sampling == "random"
    return {
        "prefix": args.calibration_data_path,
        "corpus": corpus,
        "sampling": args.calibration_sampling,
        "seed": args.seed if random else None,
        "windows": numbers,
        "layout": {
            "tensor_parallel": args.tensor_model_parallel_size,
            "pipeline_parallel": args.pipeline_model_parallel_size,
            "data_parallel": args.data_parallel_size,
        },
        "params_dtype": str(args.params_dtype).removeprefix("torch."),
    }
