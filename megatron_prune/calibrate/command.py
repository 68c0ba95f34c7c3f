"""``torchrun … -m megatron_prune calibrate``: one forward pass over calibration text, statistics out.

Runs the parent at any TP×PP×DP and gathers, in that one pass, all that every forward-only method
needs at every ratio. Data-parallel replicas share out the windows (unevenly where they must).

``calibrate --score candidates.json --statistics FILE`` runs it again on the same windows, with every
candidate that has no score yet (scoring.py), and writes FILE anew with their losses, or ``--output``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune import candidates
from megatron_prune.calibrate import statistics as statistics_file
from megatron_prune.calibrate.statistics import Statistics, json_path
from megatron_prune.candidates import Candidate, Question
from megatron_prune.engine import runtime
from megatron_prune.errors import UsageError

if TYPE_CHECKING:
    import torch

    from megatron_prune.data.windows import Windows

FLAGS = (
    "--calibration-data-path",
    "--calibration-sequences",
    "--calibration-seq-length",
    "--calibration-sampling",
)
CHOOSING = FLAGS[1:]  # of the windows


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked: Asked | None = None

    def complete_both(args: argparse.Namespace, argv: list[str]) -> None:
        nonlocal asked
        asked = _read_question(args, argv)
        complete(args, argv)

    args = runtime.start("calibrate", argv, _add_own_arguments, complete=complete_both)
    output = Path(args.output)
    if asked is None:
        statistics = gather(args)
        did = f"calibrated on {statistics.sequences} sequences of {statistics.seq_length} tokens, "
        did += f"loss {statistics.loss:.4f}"
    else:
        known = len(asked.statistics.scores)
        statistics = score(args, asked)
        did = f"scored {len(statistics.scores) - known} candidates"
    if args.rank == 0:
        statistics.write(output)
        print(f"{did}; wrote {output} and {json_path(output)}", flush=True)
    return 0


def _add_own_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--output", metavar="FILE.safetensors", help="where the statistics go")
    parser.add_argument(
        "--score",
        metavar="CANDIDATES.json",
        help="what plan wrote: score these candidates on the windows of --statistics",
    )
    parser.add_argument(
        "--statistics", metavar="FILE", help="with --score: what calibrate wrote; also the default --output"
    )
    return add_arguments(parser)


@dataclass(frozen=True)
class Asked:
    """Candidates to score, and the statistics that get their scores."""

    question: Question
    statistics: Statistics


def _read_question(args: argparse.Namespace, argv: list[str]) -> Asked | None:
    """Check the flags of output and scoring; with ``--score``, what it reads, whose windows ``args`` get."""
    from megatron_prune.engine.arguments import given

    if (args.score is None) != (args.statistics is None):
        raise UsageError("--score, --statistics", given="one of them", allowed="both or none")
    args.output = args.output or args.statistics
    if args.output is None or Path(args.output).suffix != ".safetensors":
        raise UsageError("--output", given=args.output or "nothing", allowed="a file name that ends in .safetensors")
    if args.score is None:
        return None
    for flag in CHOOSING:
        if given(argv, flag):
            raise UsageError(
                flag, given="with --score", allowed="without it",
                why="candidates are scored on the windows of --statistics",
            )  # fmt: skip
    question, of = candidates.read(args.score)
    found = statistics_file.read(args.statistics)
    if found.hash != of:
        raise UsageError(
            "--statistics", given=args.statistics, allowed="the statistics that --score was written for: plan again"
        )
    if len(found.calibrations) != 1:
        raise UsageError("--statistics", given=args.statistics, allowed="what one calibration wrote")
    behind = found.calibrations[0]
    args.calibration_data_path = args.calibration_data_path or behind["prefix"]
    args.calibration_sequences, args.calibration_seq_length = found.sequences, found.seq_length
    return Asked(question, found)


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


def gather(
    args: argparse.Namespace, candidates_of: Callable[[Statistics], list[Candidate]] | None = None
) -> Statistics:
    """Run the calibration that ``args`` describe; whole statistics on every rank. Collective.

    ``candidates_of`` says which candidates follow from them, to be scored in the same load of the model.
    The process group is gone when it returns: what follows may take one rank hours.
    """
    import torch
    from megatron.core import parallel_state as mpu

    from megatron_prune.calibrate.hooks import Recorder
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.data import indexed
    from megatron_prune.data.windows import windows
    from megatron_prune.engine import forward

    parent = open_checkpoint(directory(args))
    indexed.check_fits_model(args.calibration_data_path, parent.shape.padded_vocab_size)
    chosen = windows(
        args.calibration_data_path,
        args.calibration_seq_length,
        args.calibration_sequences,
        seed=args.seed if args.calibration_sampling == "random" else None,
        flag="--calibration-sequences",
    )
    model = _load(args)
    own = chosen[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    with Recorder(model[0], parent.shape) as recorder:
        losses = forward.run(model, own)
        # Every TP rank of the last stage has the same losses.
        mine = losses if losses is not None and mpu.get_tensor_model_parallel_rank() == 0 else []
        tensors, loss_sum = recorder.gather(sum(mine) * chosen.seq_length)
    found = Statistics(
        tensors=tensors,
        shape=parent.shape,
        parent=parent.fingerprint(),
        seq_length=chosen.seq_length,
        sequences=len(chosen),
        loss_sum=loss_sum,
        calibrations=(_provenance(args, indexed.fingerprint(args.calibration_data_path), chosen.numbers.tolist()),),
    )
    if candidates_of is not None:
        found = _with_losses(model, found, candidates_of(found), chosen)
    torch.distributed.destroy_process_group()
    return found


def score(args: argparse.Namespace, asked: Asked) -> Statistics:
    """The statistics and the losses of the candidates that had no score; the same on every rank. Collective."""
    import numpy as np
    import torch

    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.data import indexed
    from megatron_prune.data.windows import Windows

    found, behind = asked.statistics, asked.statistics.calibrations[0]
    parent = open_checkpoint(directory(args))
    if parent.fingerprint() != found.parent:
        raise UsageError("--load", given=args.load, allowed="the parent that --statistics are of")
    indexed.check_fits_model(args.calibration_data_path, parent.shape.padded_vocab_size)
    if indexed.fingerprint(args.calibration_data_path) != behind["corpus"]:
        raise UsageError(
            "--calibration-data-path", given=args.calibration_data_path, allowed="the corpus that was calibrated on"
        )
    if (dtype := _dtype(args)) != behind["params_dtype"]:
        raise UsageError(
            "--bf16, --fp16", given=dtype, allowed=behind["params_dtype"],
            why="scores are compared with one another and with the calibration's loss",
        )  # fmt: skip
    missing = candidates.unscored(asked.question.candidates(found), found)
    chosen = Windows(args.calibration_data_path, found.seq_length, np.array(behind["windows"]))
    found = _with_losses(_load(args), found, missing, chosen)
    torch.distributed.destroy_process_group()
    return found


def _load(args: argparse.Namespace) -> list[torch.nn.Module]:
    if args.virtual_pipeline_model_parallel_size is not None:  # not known before Megatron has read the layout
        raise UsageError(
            "--pipeline-model-parallel-layout",
            given=args.pipeline_model_parallel_layout,
            allowed="one stage a rank with this verb",
            why="the model is read stage by stage",
        )
    runtime.initialize(args)
    return runtime.load_model(args)


def _with_losses(
    model: list[torch.nn.Module], found: Statistics, asked: list[Candidate], chosen: Windows
) -> Statistics:
    import torch

    from megatron_prune.calibrate import scoring

    # Ranks that disagreed about a near-tie would run different models.
    shared: list[Any] = [asked]
    torch.distributed.broadcast_object_list(shared)
    (asked,) = shared
    losses = scoring.losses(model, found.shape, [candidate.selection for candidate in asked], chosen)
    return candidates.with_scores(found, asked, losses)


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
        "params_dtype": _dtype(args),
    }


def _dtype(args: argparse.Namespace) -> str:
    return str(args.params_dtype).removeprefix("torch.")
