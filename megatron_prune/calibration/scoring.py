"""Run the loaded model as if cut by a candidate's selection: layers skipped, channels masked, no checkpoint.

``losses`` gives the mean loss of every candidate on the same windows, ``log_likelihoods`` every candidate's
log-likelihood of a task's choices, at any TP×PP×DP. Inside ``reduced``:

* this rank's decoder holds only the selection's layers;
* removed hidden channels are zero in the residual stream: in the embedding's output and in the outputs of attention
  and MLP. RMSNorm then needs the mean over the kept channels only: with k of h kept,
  x/√(Σx²/k + ε) = √(k/h) · x/√(Σx²/h + ε·k/h), so its gain and ε are scaled temporarily. LayerNorm needs mean and
  variance over the kept channels: its input gets their mean in the removed ones, which leaves the mean as it is and
  scales the variance by k/h, and its bias has zeros there;
* removed heads and FFN channels are zero in the inputs of linear_proj and linear_fc2, or their mean, where biases make
  up for it; outputs are zero if a layer loses all of them.

A model that is really cut computes the same numbers, up to the order of sums.

Candidates that only skip layers share work if one rank has all layers: everything before the first removed layer is
the same as in the dense model, and is computed once per sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune import screen
from megatron_prune.checkpoint.kept import Kept, axis_indices
from megatron_prune.checkpoint.layout import Axis, ModelShape
from megatron_prune.data import multiple_choice
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.data.windows import Windows
from megatron_prune.engine import forward, fp8, runtime, spec
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import Compensation, Selection
from megatron_prune.methods.ranking import accuracies
from megatron_prune.structured.candidate import Candidate
from megatron_prune.structured.statistics import TaskScore


def losses(
    model: list[torch.nn.Module],
    shape: ModelShape,
    candidates: Sequence[Candidate],
    windows: Windows,
    done: Callable[[int, float], None] = lambda number, loss: None,
) -> list[float]:
    """Mean loss per token of every candidate on ``windows``, the same on every rank. Collective.

    ``windows`` is the whole list, which data-parallel replicas divide. ``done`` is told every candidate's number and
    loss as soon as it is known.
    """

    def tell(numbers: Sequence[int], sums: torch.Tensor) -> None:
        for number, mean in zip(numbers, (sums / windows.seq_length).mean(1).tolist(), strict=True):
            found[number] = mean
            done(number, mean)

    found = [math.nan] * len(candidates)
    _sums(model, shape, candidates, windows, [windows.seq_length] * len(windows), tell)
    return found


def log_likelihoods(
    model: list[torch.nn.Module], shape: ModelShape, candidates: Sequence[Candidate], requests: Requests
) -> torch.Tensor:
    """Log-likelihood of every choice under every candidate: float64 [candidates, choices] on every rank. Collective.

    Choices are run one at a time without padding, short ones first: equal lengths keep a pipeline full.
    """
    order = sorted(range(len(requests.sequences)), key=lambda i: len(requests.sequences[i]))
    sequences, scored = [requests.sequences[i] for i in order], [requests.scored[i] for i in order]
    found = torch.empty(len(candidates), len(order), dtype=torch.float64)

    def tell(numbers: Sequence[int], sums: torch.Tensor) -> None:
        for number, row in zip(numbers, sums, strict=True):
            found[number, order] = -row

    _sums(model, shape, candidates, sequences, scored, tell)
    return found


def _sums(
    model: list[torch.nn.Module],
    shape: ModelShape,
    candidates: Sequence[Candidate],
    sequences: Sequence[torch.Tensor],
    scored: Sequence[int],
    tell: Callable[[Sequence[int], torch.Tensor], None],
) -> None:
    """Tells numbers of candidates, and their losses of the last ``scored[i]`` tokens of ``sequences[i]``, summed:
    float64 [candidates, sequences] on the CPU. Every candidate is told once, on every rank."""
    own = range(mpu.get_data_parallel_rank(), len(sequences), mpu.get_data_parallel_world_size())
    depth = [i for i, c in enumerate(candidates) if c.skips_layers_only]
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        depth = []
    with screen.Bar(len(candidates) * len(own), f"scoring {len(candidates)} candidates", "sequence") as bar:
        if depth:
            layers = agreed([candidates[i].selection.layers for i in depth])
            sums = torch.zeros(len(depth), len(sequences), dtype=torch.float64)
            for n in bar.over(own, len(depth)):
                sums[:, n] = _from_the_first_removed_layer(model[0], layers, forward.checked(sequences[n]), scored[n])
            tell(depth, forward.total(sums))
        for i in sorted(set(range(len(candidates))) - set(depth)):
            with reduced(model[0], shape, agreed(candidates[i].selection)):
                found = forward.run(model, bar.over(sequences[n] for n in own), _tails([scored[n] for n in own]))
            sums = torch.zeros(1, len(sequences), dtype=torch.float64)
            sums[0, own] = torch.tensor(found or [0.0] * len(own), dtype=torch.float64)
            tell([i], forward.total(sums))


def agreed[T](value: T) -> T:
    """Rank 0's ``value``: ranks that resolve a near-tie differently would run different models. Collective."""
    shared: list[Any] = [value]
    torch.distributed.broadcast_object_list(shared)
    return cast(T, shared[0])


def _tails(counts: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that sums the last losses of its argument: ``counts[0]`` of them in the first call, and so on."""
    remaining = iter(counts)
    return lambda losses: losses[-next(remaining) :].sum()


@torch.no_grad()
def _from_the_first_removed_layer(
    stage: Any, kept: Sequence[tuple[int, ...]], sequence: torch.Tensor, scored: int
) -> torch.Tensor:
    """Summed losses of the last ``scored`` tokens of one sequence with only the layers ``kept``: [kept].

    Each is run from its first removed layer on.
    """
    fp8.cast_weights_again(stage)  # no schedule triggers it
    sequence = sequence.cuda()
    tokens, labels = sequence[None, :-1], sequence[None, 1:]  # [1, S]
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, S]
    decoder = unwrap_model(stage).decoder
    layers = list(decoder.layers)
    # The first layer that `kept` lacks at its position. The whole parent counts as starting at its last layer.
    first = [min(next((i for i, n in enumerate(k) if n != i), len(k)), len(layers) - 1) for k in kept]
    before: dict[int, torch.Tensor] = {}  # layer: the residual stream [S, 1, h] that enters it

    def keep(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            before[layer] = named["hidden_states"] if "hidden_states" in named else args[0]

        return layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [keep(layer) for layer in set(first)]
    with _only(decoder, layers[: max(first) + 1]):
        stage(tokens, positions, None, labels=labels)
    for handle in handles:
        handle.remove()
    found = []
    for start, numbers in zip(first, kept, strict=True):
        with _only(decoder, [layers[i] for i in numbers[start:]]):
            output = stage(tokens, positions, None, labels=labels, decoder_input=before[start])
        found.append(output.double().view(-1)[-scored:].sum().item())
    return torch.tensor(found, dtype=torch.float64)


@contextlib.contextmanager
def _only(decoder: Any, layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let the decoder hold only these layers."""
    whole = decoder.layers
    decoder.layers = torch.nn.ModuleList(layers)
    try:
        yield
    finally:
        decoder.layers = whole


@contextlib.contextmanager
def reduced(stage: Any, shape: ModelShape, selection: Selection) -> Iterator[None]:
    """Let this rank's stage compute what the parent would compute if cut by ``selection``."""
    model = unwrap_model(stage)
    decoder = model.decoder
    # Megatron counts layers of all stages from 1.
    places = {layer: place for place, layer in enumerate(selection.layers)}
    blocks = [(n, b) for b in decoder.layers if (n := b.layer_number - 1) in places]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(_only(decoder, [block for _, block in blocks]))
        for layer, block in blocks:
            place, here, linears = places[layer], shape.of_layer(layer), spec.linears(block)
            heads = selection.heads[place] if selection.heads else None
            ffn = selection.ffn[place] if selection.ffn else None
            kept = Kept(heads=heads, ffn=ffn)
            means = selection.compensation or Compensation()
            parts: list[tuple[str, Axis, tuple[int, ...] | None, Any]] = [
                ("proj", "heads", heads, means.heads),
                ("fc2", "ffn", ffn, means.ffn),
            ]
            for name, axis, part, fill in parts:
                if name not in linears:
                    continue
                if (indices := axis_indices(axis, here, kept)) is not None:
                    _mask_input(stack, linears[name], indices, here.axis_size(axis), fill and fill[place])
                if part == ():  # attention or MLP goes whole, so its bias too
                    _mask_output(stack, linears[name], (), shape)
                if selection.hidden is not None:
                    _mask_output(stack, linears[name], selection.hidden, shape)
            if selection.hidden is not None:
                for norm in spec.norms(block):
                    _narrow(stack, norm, selection.hidden, shape.hidden_size)
        if selection.hidden is not None:
            if getattr(model, "embedding", None) is not None and model.pre_process:
                _mask_output(stack, model.embedding, selection.hidden, shape)
            if decoder.final_layernorm is not None:
                _narrow(stack, decoder.final_layernorm, selection.hidden, shape.hidden_size)
        fp8.cast_weights_again(model)  # the schedule only handles the layers of its first pass
        yield


def _mask(module: Any, indices: Sequence[int] | torch.Tensor, size: int) -> torch.Tensor:
    """Ones at ``indices`` of [size], zeros elsewhere, like the module's weights."""
    weight = next(module.parameters())
    mask = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    mask[torch.as_tensor(indices, device=weight.device)] = 1
    return mask


def _mask_input(
    stack: contextlib.ExitStack,
    linear: Any,
    indices: torch.Tensor,
    size: int,
    fill: Sequence[float] | None = None,
) -> None:
    """Zero the inputs of a row-parallel linear that are not in ``indices``, or give them the values ``fill``, in
    ascending order; this rank holds a slice of them."""
    rank, ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    own = slice(size // ranks * rank, size // ranks * (rank + 1))
    mask, whole = _mask(linear, indices, size), None
    if fill is not None:
        whole = torch.zeros_like(mask)
        whole[mask == 0] = torch.tensor(fill, dtype=torch.float64).to(mask)
        whole = whole[own]
    mask = mask[own]

    def hook(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        kept = args[0] * mask
        return kept if whole is None else kept + whole, *args[1:]

    stack.callback(linear.register_forward_pre_hook(hook).remove)


def _mask_output(stack: contextlib.ExitStack, module: Any, hidden: Sequence[int], shape: ModelShape) -> None:
    """Zero removed hidden channels in what an embedding or a linear (output, bias) adds to the residual stream."""
    mask = _mask(module, hidden, shape.hidden_size)

    def hook(_: Any, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return tuple(None if part is None else part * mask for part in out)
        return out * mask

    stack.callback(module.register_forward_hook(hook).remove)


def _narrow(stack: contextlib.ExitStack, norm: Any, hidden: Sequence[int], size: int) -> None:
    """Normalize a norm's input [..., size] over the channels ``hidden`` alone; the others are zero there."""
    gain, offset, bias, share = spec.gain(norm), spec.gain_offset(norm), spec.bias(norm), len(hidden) / size
    if bias is not None:
        kept = torch.zeros_like(bias)
        kept[torch.as_tensor(hidden, device=bias.device)] = 1
        own = bias.detach().clone()
        bias.mul_(kept)
        stack.callback(lambda: bias.copy_(own))

        def fill(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            mean = args[0].sum(-1, keepdim=True) / len(hidden)
            return args[0] + mean * (1 - kept), *args[1:]

        stack.callback(norm.register_forward_pre_hook(fill).remove)
    whole, eps = gain.detach().clone(), norm.eps
    gain.copy_((whole + offset) * math.sqrt(share) - offset)
    norm.eps = eps * share

    def restore() -> None:
        gain.copy_(whole)
        norm.eps = eps

    stack.callback(restore)


# The task that scores candidates: read, and tokenized like the model's own text. A task that does not fit is refused
# before anything starts.


def requests(args: argparse.Namespace, path: str, wanted: str) -> Requests:
    """The task in ``path``, whose fingerprint must be ``wanted``, for the checkpoint ``--load``.

    UsageError or DataError if file, tokenizer and model do not fit together.
    """
    task = multiple_choice.read(path)
    if task.fingerprint != wanted:
        raise UsageError("--task-data", got=path, expected="the file of examples that was given to plan")
    runtime.refuse_fixed_lengths(args)
    return multiple_choice.encode(task, runtime.tokenizer(args), args.max_position_embeddings)


def task_scores(candidates: Sequence[Candidate], requests: Requests, likelihoods: torch.Tensor) -> list[TaskScore]:
    """The scores of ``candidates`` on a task, from ``likelihoods`` [candidates, choices]."""
    lengths = [len(sequence) - 1 for sequence in requests.sequences]
    return [
        TaskScore(accuracies(requests.task, row), sum(candidate.scoring_flops(length) for length in lengths))
        for candidate, row in zip(candidates, likelihoods, strict=True)
    ]
