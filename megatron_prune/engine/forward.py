"""Batch, loss and forward step: the functions that Megatron's loop expects of every training script.

``forward_step`` is passed to ``megatron.training.pretrain``. ``run`` is for the verbs that only need forward passes
(calibrate, evaluate): the same model and schedule, without gradients.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
    unwrap_model,
)
from megatron.training import get_args, get_timers
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_prune.data.streams import TEACHER_PREFIX
from megatron_prune.engine import decoding
from megatron_prune.errors import DataError

_SPIKE_FACTOR = 10  # with --check-for-spiky-loss, a loss this many times the largest so far is reported
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def needs_data(vp_stage: int | None = None) -> bool:
    """True on the ranks whose data loader feeds the others: first and last stage, first TP rank."""
    return bool(is_first_or_last_pipeline_stage(vp_stage)) and mpu.get_tensor_model_parallel_rank() == 0


def is_last_stage(vp_stage: int | None = None) -> bool:
    """True where losses are computed."""
    return bool(mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage))


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """This rank's share of the next micro-batch; every value None on middle pipeline stages. What the data set adds
    (``TEACHER_PREFIX``) is there on the first tensor-parallel rank alone."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(_BATCH_KEYS)
    args = get_args()
    batch: dict[str, Any] = {}
    added: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: value.cuda(non_blocking=True) for key, value in sample.items() if key in _BATCH_KEYS}
        added = {key: value.cuda(non_blocking=True) for key, value in sample.items() if key.startswith(TEACHER_PREFIX)}
    if args.tensor_model_parallel_size > 1:  # a single rank would broadcast to itself
        batch = get_batch_on_this_tp_rank(
            batch,
            has_cu_seqlens=False,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
            broadcast_group=mpu.get_tensor_model_parallel_group(),
            cp_size=args.context_parallel_size,
            tp_rank=mpu.get_tensor_model_parallel_rank(),
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=False,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        )
    batch |= added
    if args.context_parallel_size > 1:
        batch = get_batch_on_this_cp_rank(batch, False, cp_group=mpu.get_context_parallel_group())
    return {key: batch.get(key) for key in (*_BATCH_KEYS, *added)}


def loss_function(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses [b, s], the number of tokens, and the pair for Megatron's log."""
    args = get_args()
    loss = torch.sum(output.view(-1).float() * loss_mask.view(-1).float())
    tokens = loss_mask.sum().detach().to(torch.int)
    report = {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}
    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for kind, reject in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            rerun.validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {kind} in local forward loss calculation",
                tolerance=0.0,  # forward passes are deterministic
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(rerun.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    return loss, tokens, report


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch through this stage, as Megatron's schedules call it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_function, batch["loss_mask"])


def run(
    model: list[torch.nn.Module],
    windows: Iterable[torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor] = torch.mean,
    batch: int = 1,
) -> list[float] | None:
    """Forward every window through the pipeline; returns ``reduce`` of each window's token losses, in order.

    ``windows`` yields int64 tensors [S + 1] of any length, the same on every rank of this data-parallel replica: token
    t+1 is predicted from the tokens up to t, so each window makes S predictions. A micro-batch is ``batch`` windows,
    which must have the same length. ``reduce`` gets the losses of one window, float64 [S], and returns a scalar.
    Returns None except on the last stage. Padding of the vocabulary does not count (``engine/vocabulary.py``);
    DataError if a window holds a padding id.
    """
    stacked = (torch.stack(some) for some in itertools.batched(map(checked, windows), batch))  # [B, S + 1] each
    batches = (_Batch(some[:, :-1].contiguous(), some[:, 1:].contiguous()) for some in stacked)  # [B, S] each
    found = _through_the_pipeline(
        model, batches, lambda losses: [reduce(row).item() for row in losses.double().view(losses.shape[0], -1)]
    )
    return None if found is None else list(itertools.chain.from_iterable(found))


def total(found: torch.Tensor) -> torch.Tensor:
    """The sum over data-parallel replicas of what the last stage has ``found``, of any shape, on every rank and on the
    CPU. Collective."""
    if not mpu.is_pipeline_last_stage(ignore_virtual=True) or mpu.get_tensor_model_parallel_rank():
        found = torch.zeros_like(found)  # every TP rank of the last stage has the same: count one
    found = found.to(torch.cuda.current_device())
    torch.distributed.all_reduce(found)
    return found.cpu()


def run_backward(model: list[torch.nn.Module], windows: Iterable[torch.Tensor]) -> list[float] | None:
    """``run`` with a backward pass of every window's mean loss: returns these losses, in order.

    Gradients accumulate in ``parameter.grad`` of parameters that require them, window after window, each with the
    scale of its own mean loss.
    """
    batches = (_Batch(w[None, :-1].contiguous(), w[None, 1:].contiguous()) for w in map(checked, windows))  # [1, S]
    return _through_the_pipeline(model, batches, lambda losses: losses.double().mean().item(), backward=True)


def checked(window: torch.Tensor) -> torch.Tensor:
    """``window``, int64 [S + 1], if all of its ids are words of the loaded model; else DataError."""
    largest, words = int(window.max()), get_args().vocab_size
    if largest >= words:
        raise DataError(
            f"the text holds token {largest}, expected ids up to {words - 1}: it was written with another tokenizer "
            "than the model's; or give --vocab-size, if the model has learned more words than its checkpoint says"
        )
    return window


def run_logits(
    model: list[torch.nn.Module], batches: Iterable[torch.Tensor], read: Callable[[torch.Tensor], Any]
) -> list[Any] | None:
    """Forward every batch through the pipeline; returns ``read`` of each batch's logits, in order.

    ``batches`` yields int64 tensors [B, S], as ``windows`` in ``run``. ``read`` gets [B, S, V / TP] on every tensor
    parallel rank of the last stage: this rank's share of the padded vocabulary. Returns None on other stages.
    """
    return _through_the_pipeline(model, map(_Batch, batches), read)


def run_logits_at(
    model: list[torch.nn.Module],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    read: Callable[[torch.Tensor], Any],
) -> list[Any] | None:
    """The same where logits are wanted at some places only, which is where the output layer is run.

    ``batches`` yields the tokens and n places, int64 [n]: ``b * S + s`` is that after token s of sequence b. ``read``
    gets [n, V / TP].
    """
    return _through_the_pipeline(model, (_Batch(tokens, places=places) for tokens, places in batches), read)


def run_cached(
    model: list[torch.nn.Module],
    batches: Iterable[tuple[torch.Tensor, StaticInferenceContext]],
    read: Callable[[torch.Tensor], Any],
) -> list[Any] | None:
    """Forward the next tokens of sequences whose earlier tokens are in a cache of keys and values, which grows.

    ``batches`` yields int64 tokens [B, n] and the cache of exactly B sequences: n is one, unless the cache is empty. An
    empty ``decoding.Cache``, which needs ``decoding.is_attached``, takes its packed prompts, [1, N]. ``read`` gets the
    logits after the last token, [B, 1, V], whole on every tensor parallel rank of the last stage. Returns what ``read``
    returned, in order; None on other stages.
    """
    with InferenceMode.active():  # only the last token's logits are computed
        return _through_the_pipeline(model, (_Batch(tokens, cache=cache) for tokens, cache in batches), read)


@dataclass(frozen=True)
class _Batch:
    """Tokens [B, S]; labels [B, S], None for logits; and what ``run_logits_at`` and ``run_cached`` are given."""

    tokens: torch.Tensor
    labels: torch.Tensor | None = None
    cache: StaticInferenceContext | None = None
    places: torch.Tensor | None = None

    def positions(self) -> torch.Tensor:
        """Of the tokens in their texts, int64 [B, S]."""
        if isinstance(self.cache, decoding.Cache):
            return self.cache.positions()
        first = 0 if self.cache is None else self.cache.sequence_len_offset
        device = torch.cuda.current_device()
        return torch.arange(first, first + self.tokens.shape[1], device=device).expand_as(self.tokens)

    def advance(self) -> None:
        """The tokens have been read, and are in the cache, if there is one."""
        if isinstance(self.cache, decoding.Cache):
            self.cache.advance()
        elif self.cache is not None:
            self.cache.increment_sequence_len_offset(self.tokens.shape[1])


def _through_the_pipeline(
    model: list[torch.nn.Module],
    batches: Iterable[_Batch],
    read: Callable[[torch.Tensor], Any],
    *,
    backward: bool = False,
) -> list[Any] | None:
    """Run batches through all stages; returns ``read`` of each output.

    ``backward``: and the mean of every output, which are losses, back.
    """
    found: list[Any] = []
    group: Sequence[_Batch] = ()

    def step(iterator: Iterator[_Batch], stage: torch.nn.Module) -> tuple[Any, Any]:
        batch = next(iterator)
        with _only_at(stage, batch.places):
            output = stage(
                batch.tokens.cuda(),  # [B, S]
                batch.positions(),
                None,
                labels=None if batch.labels is None else batch.labels.cuda(),
                inference_context=batch.cache,
                runtime_gather_output=None if batch.cache is None else True,
            )
        batch.advance()

        def collect(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            found.append(read(output.detach() if batch.places is None else output[0]))
            if backward:  # the schedule divides by the number of micro-batches
                scale = 1 if config.calculate_per_token_loss else len(group)
                return output.float().mean() * scale, torch.tensor(1, dtype=torch.int, device=output.device), {}
            return no_loss(output)

        return output, collect

    config = get_model_config(model[0])
    schedule = get_forward_backward_func()
    in_flight = 4 * mpu.get_pipeline_model_parallel_world_size()  # enough to keep every stage busy
    # A pipeline sends one shape at a time.
    alike = (same for _, same in itertools.groupby(batches, key=lambda batch: batch.tokens.shape))
    with torch.set_grad_enabled(backward):
        for group in itertools.chain.from_iterable(itertools.batched(same, in_flight) for same in alike):
            size, length = group[0].tokens.shape
            schedule(
                forward_step_func=step,
                data_iterator=iter(group),
                model=model[0],
                num_microbatches=len(group),
                seq_length=length,
                micro_batch_size=size,
                forward_only=not backward,
            )
    return found if mpu.is_pipeline_last_stage(ignore_virtual=True) else None


def no_loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """A loss function for passes whose outputs alone are wanted: the schedule's reduction of losses is not used."""
    return output.new_zeros(()), torch.tensor(1, dtype=torch.int, device=output.device), {}


@contextlib.contextmanager
def _only_at(stage: torch.nn.Module, places: torch.Tensor | None) -> Iterator[None]:
    """The output layer of ``stage``, if it has one, reads only these places of ``run_logits_at``: [n, 1, H]."""
    whole: Any = unwrap_model(stage)
    if places is None or not whole.post_process:
        yield
        return

    def select(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = given
        rows = hidden.transpose(0, 1).flatten(0, 1)  # [B * S, H]
        return rows[places.to(rows.device)][:, None], *others

    hook = whole.output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def count_nonzero(model: list[torch.nn.Module]) -> int:
    """Nonzero parameters of the whole model, each counted once, the same on every rank."""
    own = torch.zeros(1, dtype=torch.int64, device=torch.cuda.current_device())
    if mpu.get_data_parallel_rank(with_context_parallel=True) == 0:
        first_of_tp = mpu.get_tensor_model_parallel_rank() == 0
        for chunk in model:
            for parameter in chunk.parameters():
                sharded = getattr(parameter, "tensor_model_parallel", False)
                # `shared` marks the last stage's copy of tied embeddings.
                if (sharded or first_of_tp) and not getattr(parameter, "shared", False):
                    own += torch.count_nonzero(parameter.detach())
    torch.distributed.all_reduce(own)
    return int(own.item())
