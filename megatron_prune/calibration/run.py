"""The passes over calibration text: one of the parent, for statistics, and one per candidate, for scores.

``gather`` and ``score`` load the model, run it on the windows that the flags or the statistics specify, and
return complete results on every rank. Import after ``runtime.start``: Megatron must be ready.

``ActivationRecorder`` passes activations of Megatron's modules to the accumulators, on every rank of any layout.

Where each statistic is read (activations are [s, b, n]):

* block influence: input and output of a ``TransformerLayer``;
* ``input_layernorm``, ``pre_mlp_layernorm``: the norms' outputs, which ``linear_qkv`` and
  ``linear_fc1`` multiply (``engine/spec.py``); ``final_layernorm``: its output;
* ``attention``, ``mlp``: the inputs of ``linear_proj`` and ``linear_fc2``, of which a tensor-parallel
  rank holds a contiguous slice of channels, with the columns that read them.

Every rank sums over its own layers (PP), sequences (DP) and channels (TP). TP ranks divide the work on activations
that all of them hold: each sums a slice of the norms' channels and every TP-th layer's cosines. In a sequence-parallel
model each rank has its own tokens: it sums their cosines for all layers, and norms' outputs are gathered, because a
mean over a sequence's tokens needs all of them before it is squared.
``ActivationRecorder.gather`` writes the sums into global tensors of zeros, which one all-reduce completes.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune import screen
from megatron_prune.calibration import scoring
from megatron_prune.calibration.gradients import GradientRecorder
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import indexed
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.data.windows import Windows, windows
from megatron_prune.engine import forward, fp8, outliers, runtime, spec
from megatron_prune.errors import UsageError
from megatron_prune.methods.accumulators import (
    COLUMN_SUMS,
    QUANTITIES,
    ChannelSums,
    CosineDistance,
    Workspace,
    column_sums,
)
from megatron_prune.methods.allocation import OUTLIERS
from megatron_prune.structured.candidate import Candidate, Run, with_accuracies, with_scores
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics, site_shapes, tensor_shapes
from megatron_prune.training.zeros import check_loaded

KEEP_EVERY = 30  # seconds between two files with the scores of candidates so far


class ActivationRecorder:
    """Attached to this rank's stage while open: ``with ActivationRecorder(stage, shape) as recorder: …``."""

    def __init__(self, stage: torch.nn.Module, shape: ModelShape):
        self.shape = shape
        self._device = next(stage.parameters()).device
        self._workspace = Workspace()
        # (statistics key, layer or None, first channel) of every accumulator
        self._channels: list[tuple[str, int | None, int, ChannelSums]] = []
        self._cosines: list[tuple[int, CosineDistance]] = []
        self._columns: list[tuple[str, int, torch.nn.Parameter]] = []  # site, layer, weight [out, channels here]
        self._handles: list[Any] = []
        self._rank = mpu.get_tensor_model_parallel_rank()
        self._ranks = mpu.get_tensor_model_parallel_world_size()
        decoder: Any = unwrap_model(stage).decoder  # bf16 and fp16 models are wrapped
        self._config = decoder.config
        for block in decoder.layers:
            self._attach_block(block, block.layer_number - 1)  # Megatron counts layers of all stages from 1
        if decoder.final_layernorm is not None:
            self._on_output(decoder.final_layernorm, self._shared("final_layernorm", None))

    def __enter__(self) -> ActivationRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach_block(self, block: Any, layer: int) -> None:
        linears = spec.linears(block)
        for site, name in (("input_layernorm", "qkv"), ("pre_mlp_layernorm", "fc1")):
            if name in linears:
                self._on_input(linears[name], spec.multiplied(linears[name], self._shared(site, layer)))
        for site, name in (("attention", "proj"), ("mlp", "fc2")):
            if name in linears:
                weight = linears[name].weight
                self._on_input(linears[name], self._sharded(site, layer, weight.shape[1]))
                self._columns.append((site, layer, weight))
        if spec.sequence_ranks(self._config) > 1 or layer % self._ranks == self._rank:
            cosine = CosineDistance(self._device, self._workspace)
            self._cosines.append((layer, cosine))
            # Megatron calls a layer by keyword and gets (hidden states, context) back.
            self._handles.append(
                block.register_forward_hook(
                    torch.no_grad()(
                        lambda _, args, named, out: cosine.add(named.get("hidden_states", *args[:1]), out[0])
                    ),
                    with_kwargs=True,
                )
            )

    def _shared(self, site: str, layer: int | None) -> Callable[[torch.Tensor], None]:
        """A hook for activations that all TP ranks hold, or share by tokens; sums this rank's slice of the channels."""
        channels = site_shapes(self.shape)[site][-1]
        first, last = (channels * r // self._ranks for r in (self._rank, self._rank + 1))
        sums = self._accumulator(site, layer, first, last - first)
        return spec.whole_sequences(self._config, lambda x: sums.add(x[..., first:last]))

    def _sharded(self, site: str, layer: int, channels: int) -> Callable[[torch.Tensor], None]:
        """A hook for activations of which this rank holds a slice, so many ``channels``."""
        return self._accumulator(site, layer, self._rank * channels, channels).add

    def _accumulator(self, site: str, layer: int | None, first: int, channels: int) -> ChannelSums:
        sums = ChannelSums(channels, self._device, self._workspace)
        self._channels.append((site, layer, first, sums))
        return sums

    def _on_output(self, module: Any, add: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_hook(torch.no_grad()(lambda _module, _args, out: add(out))))

    def _on_input(self, module: Any, add: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(torch.no_grad()(lambda _module, args: add(args[0]))))

    def gather(self, loss_sum: float) -> tuple[dict[str, torch.Tensor], float]:
        """Whole statistics on every rank, and the sum of ``loss_sum`` over ranks. Collective."""
        sizes = tensor_shapes(self.shape)
        counts = [torch.Size(size).numel() for size in sizes.values()]
        flat = torch.zeros(1 + sum(counts), dtype=torch.float64, device=self._device)
        flat[0] = loss_sum
        views = dict(zip(sizes, torch.split(flat[1:], counts), strict=True))
        tensors = {name: views[name].view(size) for name, size in sizes.items()}
        for layer, cosine in self._cosines:
            tensors["block_influence"][layer] = cosine.total
        for site, of_layer, first, sums in self._channels:
            for quantity, values in zip(QUANTITIES, sums.sums, strict=True):
                place = tensors[f"{site}.{quantity}"]
                (place if of_layer is None else place[of_layer])[first : first + len(values)] = values
        if mpu.get_data_parallel_rank() == 0:  # the other replicas have the same weights
            for site, layer, weight in self._columns:
                for name, values in zip(COLUMN_SUMS, column_sums(weight.detach()), strict=True):
                    first = self._rank * len(values)
                    tensors[f"{site}.{name}"][layer, first : first + len(values)] = values
        torch.distributed.all_reduce(flat)
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}, float(flat[0])


def gather(
    args: argparse.Namespace,
    question: Question | None = None,
    requests: Requests | None = None,
    *,
    gradients: bool = False,
) -> Statistics:
    """Run the calibration that ``args`` describe; returns complete statistics on every rank. Collective.

    ``gradients``: with a backward pass, and the saliencies that need one.
    The candidates of ``question`` are scored in the same load of the model, on ``requests`` if a task decides.
    Destroys the process group before it returns, because rank 0 may then work for hours.
    """
    refuse_virtual_stages(args)
    parent = open_checkpoint(runtime.loaded_directory(args))
    chosen = chosen_windows(args)
    model = _load(args)
    own = chosen[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    read = screen.progress(own, len(own), "calibrating", "window")
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(ActivationRecorder(model[0], parent.shape))
        of_gradients = stack.enter_context(GradientRecorder(model[0], parent.shape)) if gradients else None
        losses = forward.run(model, read) if of_gradients is None else forward.run_backward(model, read)
        # Every TP rank of the last stage has the same losses: count one.
        mine = losses if losses is not None and mpu.get_tensor_model_parallel_rank() == 0 else []
        tensors, loss_sum = recorder.gather(sum(mine) * chosen.seq_length)
        if of_gradients is not None:
            tensors |= of_gradients.gather(len(chosen))
    tensors[OUTLIERS] = outliers.counts(model[0], parent.shape, tensors)
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
        found = _with_scores(model, found, question, requests, chosen, lambda known: None)
    torch.distributed.destroy_process_group()
    return found


def score(
    args: argparse.Namespace,
    question: Question,
    found: Statistics,
    requests: Requests | None,
    keep: Callable[[Statistics], None],
) -> Statistics:
    """``found`` plus the missing scores of ``question``'s candidates; the same on every rank. Collective.

    ``requests`` are those of the task, if one decides. Rank 0 calls ``keep`` now and then with what is known so far.
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
    found = _with_scores(_load(args), found, question, requests, chosen, keep)
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
    model = runtime.load_model(args)
    check_loaded(model, runtime.loaded_directory(args), allow_missing=args.allow_missing_masks)
    return model


def _with_scores(
    model: list[torch.nn.Module],
    found: Statistics,
    question: Question,
    requests: Requests | None,
    chosen: Windows,
    keep: Callable[[Statistics], None],
) -> Statistics:
    while (run := question.next_run(found)) is not None:
        found = _after(run, model, found, chosen, keep)
    if question.task is None:
        return found
    assert requests is not None
    asked = question.unscored(found)
    likelihoods = scoring.log_likelihoods(model, found.shape, asked, requests)
    scores = scoring.task_scores(asked, requests, likelihoods)
    return with_accuracies(found, asked, question.task, scores)


def _after(
    run: Run, model: list[torch.nn.Module], found: Statistics, chosen: Windows, keep: Callable[[Statistics], None]
) -> Statistics:
    """``found`` with the losses of ``run``. Windows that a candidate was run on in an earlier round count."""
    known = [_known(found, candidate, run.windows) for candidate in run.candidates]
    kept = time.monotonic()
    for first in sorted({number for number, _ in known}):
        some = [i for i, (number, _) in enumerate(known) if number == first]

        def add(place: int, mean: float, some: list[int] = some, first: int = first) -> None:
            nonlocal found, kept
            number = some[place]
            loss = (first * known[number][1] + (run.windows - first) * mean) / run.windows
            found = with_scores(found, [run.candidates[number]], [loss], run.windows)
            if torch.distributed.get_rank() == 0 and time.monotonic() - kept > KEEP_EVERY:
                keep(found)
                kept = time.monotonic()

        scoring.losses(model, found.shape, [run.candidates[i] for i in some], chosen[first : run.windows], add)
    return found


def _known(found: Statistics, candidate: Candidate, windows: int) -> tuple[int, float]:
    """On how many of the first ``windows`` windows it was run already, and its mean loss there."""
    score = found.scores.get(candidate.key)
    rounds = [each for each in score.rounds.items() if each[0] < windows] if score else []
    return max(rounds, default=(0, 0.0))


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
