"""The passes over calibration text: one of the parent, for statistics, and one per candidate, for scores.

``gather`` and ``score`` load the model, run it on the windows that the flags or the statistics specify, and
return complete results on every rank. Import after ``runtime.start``: Megatron must be ready.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu

from megatron_prune import screen
from megatron_prune.calibration import scoring
from megatron_prune.calibration.hooks import ActivationRecorder
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import indexed
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.data.windows import Windows, windows
from megatron_prune.engine import forward, fp8, runtime
from megatron_prune.errors import UsageError
from megatron_prune.structured import candidates
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics


def gather(args: argparse.Namespace, question: Question | None = None, requests: Requests | None = None) -> Statistics:
    """Run the calibration that ``args`` describe; returns complete statistics on every rank. Collective.

    The candidates of ``question`` are scored in the same load of the model, on ``requests`` if a task decides.
    Destroys the process group before it returns, because rank 0 may then work for hours.
    """
    refuse_virtual_stages(args)
    parent = open_checkpoint(runtime.loaded_directory(args))
    chosen = chosen_windows(args)
    model = _load(args)
    own = chosen[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    with ActivationRecorder(model[0], parent.shape) as recorder:
        losses = forward.run(model, screen.progress(own, len(own), "calibrating", "window"))
        # Every TP rank of the last stage has the same losses: count one.
        mine = losses if losses is not None and mpu.get_tensor_model_parallel_rank() == 0 else []
        tensors, loss_sum = recorder.gather(sum(mine) * chosen.seq_length)
    found = Statistics(
        tensors=tensors,
        shape=parent.shape,
        parent=parent.fingerprint(),
        seq_length=chosen.seq_length,
        sequences=len(chosen),
        loss_sum=loss_sum,
        calibrations=(provenance(args, chosen),),
    )
    if question is not None:
        found = _with_scores(model, found, question, requests, chosen)
    torch.distributed.destroy_process_group()
    return found


def score(args: argparse.Namespace, question: Question, found: Statistics, requests: Requests | None) -> Statistics:
    """``found`` plus the missing scores of ``question``'s candidates; the same on every rank. Collective.

    ``requests`` are those of the task, if one decides.
    """
    refuse_virtual_stages(args)
    behind = found.calibrations[0]
    parent = open_checkpoint(runtime.loaded_directory(args))
    if parent.fingerprint() != found.parent:
        raise UsageError("--load", got=args.load, expected="the parent checkpoint that --statistics was made from")
    indexed.check_fits_model(args.calibration_data_path, args.vocab_size)
    if indexed.fingerprint(args.calibration_data_path) != behind["corpus"]:
        raise UsageError(
            "--calibration-data-path",
            got=args.calibration_data_path,
            expected="the corpus that --statistics was made from",
        )
    if (dtype := _dtype(args)) != behind["params_dtype"]:
        raise UsageError(
            "--bf16, --fp16", got=dtype, expected=f"the precision of --statistics, {behind['params_dtype']}",
            why="scores are compared with the loss of the calibration",
        )  # fmt: skip
    if (recipe := fp8.describe(args)) != behind.get("fp8"):
        raise UsageError(
            "--fp8-preset", got=_words(recipe), expected=f"the FP8 recipe of --statistics, {_words(behind.get('fp8'))}",
            why="scores are compared with the loss of the calibration",
        )  # fmt: skip
    if not question.unscored(found):
        return found
    chosen = Windows(args.calibration_data_path, found.seq_length, np.array(behind["windows"]))
    found = _with_scores(_load(args), found, question, requests, chosen)
    torch.distributed.destroy_process_group()
    return found


def refuse_virtual_stages(args: argparse.Namespace) -> None:
    """Refuse virtual stages made by a pipeline layout. Call after validation."""
    if args.virtual_pipeline_model_parallel_size is not None:  # unknown until Megatron has read the layout
        raise UsageError(
            "--pipeline-model-parallel-layout",
            got=args.pipeline_model_parallel_layout,
            expected="no such flag with this verb",
            why="it needs one pipeline stage per rank",
        )


def chosen_windows(args: argparse.Namespace) -> Windows:
    """The windows that the calibration's flags choose. DataError or UsageError if the corpus does not fit."""
    indexed.check_fits_model(args.calibration_data_path, args.vocab_size)
    return windows(
        args.calibration_data_path,
        args.calibration_seq_length,
        args.calibration_sequences,
        seed=args.seed if args.calibration_sampling == "random" else None,
        flag="--calibration-sequences",
    )


def _load(args: argparse.Namespace) -> list[torch.nn.Module]:
    runtime.initialize(args)
    return runtime.load_model(args)


def _with_scores(
    model: list[torch.nn.Module], found: Statistics, question: Question, requests: Requests | None, chosen: Windows
) -> Statistics:
    # Ranks that resolve a near-tie differently would run different models.
    shared: list[Any] = [question.unscored(found)]
    torch.distributed.broadcast_object_list(shared)
    (asked,) = shared
    # With a task, some may already have been run on the windows.
    new = [candidate for candidate in asked if candidate.selection.key not in found.scores]
    losses = scoring.losses(model, found.shape, [candidate.selection for candidate in new], chosen)
    found = candidates.with_scores(found, new, losses)
    if question.task is None:
        return found
    assert requests is not None
    likelihoods = scoring.log_likelihoods(model, found.shape, [c.selection for c in asked], requests)
    scores = scoring.task_scores(asked, requests, likelihoods)
    return candidates.with_accuracies(found, asked, question.task, scores)


def provenance(args: argparse.Namespace, chosen: Windows) -> dict[str, Any]:
    """The calibration text and settings, as JSON."""
    random = args.calibration_sampling == "random"
    return {
        "prefix": args.calibration_data_path,
        "corpus": indexed.fingerprint(args.calibration_data_path),
        "sampling": args.calibration_sampling,
        "seed": args.seed if random else None,
        "windows": chosen.numbers.tolist(),
        "layout": {
            "tensor_parallel": args.tensor_model_parallel_size,
            "pipeline_parallel": args.pipeline_model_parallel_size,
            "data_parallel": args.data_parallel_size,
        },
        "params_dtype": _dtype(args),
        "fp8": fp8.describe(args),
    }


def _words(recipe: dict[str, Any] | None) -> str:
    if recipe is None:
        return "no FP8"
    first, last = recipe["bf16_layers"]
    return f"{recipe['format']} with {recipe['recipe']} scaling, {first} first and {last} last layers in bf16"


def _dtype(args: argparse.Namespace) -> str:
    return str(args.params_dtype).removeprefix("torch.")
