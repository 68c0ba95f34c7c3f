"""Dynamic batch loading: the corpora that a model is furthest behind on give more of each batch (``data/schedule.py``).

With ``--dynamic-batch-every M`` the loss on ``--domain-validation`` is measured before every M-th step but the first,
in Megatron's own evaluation: without gradients, at the run's layout, each sample once. The sums go over all ranks, and
the last rank, which alone has them, sends losses and proportions to all others. So every rank loads the same samples.
While masks are learned, the model that is measured has as many units as its masks expect to stay at that step.

The schedule is a file in the save directory, ``batch_schedule.json``, which grows by a block at each update, before the
first step of that block. A run that resumes continues with these blocks, those after its checkpoint included: the steps
that it repeats see the same samples again. The account holds the same blocks and the range of every corpus.

With ``--batch-schedule FILE`` a run follows the schedule of another run, step by step, and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_prune import screen, storage
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.data import blend
from megatron_prune.data.schedule import DIGITS, FILE, Schedule, ScheduledRange, followed, updated
from megatron_prune.data.streams import Stream, parse_range
from megatron_prune.errors import CheckpointError, DataError
from megatron_prune.training.batch_flags import identity

if TYPE_CHECKING:
    from megatron_prune.training.learned_masks import Learner

Build = Callable[[list[str]], Stream]


class ScheduledBatches:
    """The schedule of one run: ``attach`` before Megatron's ``pretrain``; Megatron's data provider calls ``begin``.

    ``first``: the first samples by corpus, which rank 0 alone must give; None for a run that resumes.
    """

    def __init__(self, args: argparse.Namespace, first: Sequence[int] | None, learner: Learner | None = None):
        self.args, self.first, self.learner = args, first, learner
        self.schedule: Schedule | None = None
        self._validation: list[Stream] = []

    def attach(self, training: Any) -> None:
        """Hang on what Megatron's module ``training`` calls for every step."""
        training.train_step = self._measure_before(training.train_step, training)

    def begin(self, stream: Stream, build: Build) -> ScheduledRange:
        """The samples of the run. Collective; ``build`` opens a stream over one corpus."""
        held: list[Any] = [None]
        if self.args.rank == 0:
            made = self._resumed() if self.args.iteration else self._begun(stream) or self._new(stream)
            held = [made.to_json()]
        torch.distributed.broadcast_object_list(held, 0)  # a file system could show some ranks an older file
        self.schedule = Schedule.of(held[0])
        if self.args.dynamic_batch_every is not None:
            self._validation = [build([prefix]) for prefix in self.args.domain_validation]
        self._keep()
        return ScheduledRange(stream, self.schedule)

    def _new(self, stream: Stream) -> Schedule:
        args = self.args
        if args.batch_schedule is not None:
            return followed(Schedule.read(args.batch_schedule), args.train_iters)
        assert self.first is not None
        lengths = [len(member) for member in stream.members]
        made = Schedule(
            stream=stream.describe(), start=parse_range(args.stream_range)[0], steps=args.train_iters,
            global_batch_size=args.global_batch_size, every=args.dynamic_batch_every,
            permutation_seed=args.stream_permutation_seed, begins=tuple(self.first),
            available=tuple(max(most - first, 0) for most, first in zip(lengths, self.first, strict=True)),
            settings=identity(args) or {},
        )  # fmt: skip
        made.extend(blend.shares(stream.corpora) or [length / sum(lengths) for length in lengths])
        return made

    def _begun(self, stream: Stream) -> Schedule | None:
        """The schedule of an attempt at this run that was killed before its first save, if there was one."""
        path = storage.path(self.args.save) / FILE
        if not path.exists():
            return None
        found, fresh = Schedule.read(path), self._new(stream)
        found_head, head = (one.to_json() | {"blocks": one.to_json()["blocks"][:1]} for one in (found, fresh))
        found_head["stream"], head["stream"] = found.stream["id"], fresh.stream["id"]
        return found if found_head == head else None

    def _resumed(self) -> Schedule:
        path = storage.path(self.args.load) / FILE
        try:
            found = Schedule.read(path)
        except DataError as error:
            raise CheckpointError(
                f"{error}: it says which samples the steps before {self.args.iteration} have read; restore it"
            ) from error
        if found.settings != identity(self.args) or (found.next_step or found.steps) < self.args.iteration:
            raise CheckpointError(
                f"{path}: expected the schedule of this run up to step {self.args.iteration}, got one with "
                f"{dict(found.settings)} up to step {found.next_step or found.steps}: restore it"
            )
        return found

    def _keep(self) -> None:
        assert self.schedule is not None
        if self.args.rank == self.args.world_size - 1:  # the rank that keeps the account
            self.schedule.write(storage.path(self.args.save) / FILE)

    # -- measuring ------------------------------------------------------------------------------------------------

    def _measure_before(self, train_step: Callable[..., Any], training: Any) -> Callable[..., Any]:
        signature = inspect.signature(train_step)

        @functools.wraps(train_step)
        def stepping(*positional: Any, **named: Any) -> Any:
            assert self.schedule is not None
            call = signature.bind(*positional, **named).arguments
            if self.schedule.next_step is not None and call["iteration"] >= self.schedule.next_step:
                self._update(call, training)
            return train_step(*positional, **named)

        return stepping

    def _update(self, call: Mapping[str, Any], training: Any) -> None:
        """Measure and extend the schedule by a block, equally on every rank. Collective."""
        assert self.schedule is not None
        args, before = self.args, self.schedule.blocks[-1].proportions
        losses = self._losses(call, training)
        found = torch.zeros(2, len(losses), dtype=torch.float64)
        if args.rank == args.world_size - 1:
            measured = [round(loss, DIGITS) for loss in losses]
            proportions = updated(before, measured, args.reference_losses)
            found = torch.tensor([measured, proportions], dtype=torch.float64)
        found = found.to(torch.cuda.current_device())
        torch.distributed.broadcast(found, args.world_size - 1)
        measured, shares = found.tolist()
        for loss, prefix in zip(measured, args.domain_validation, strict=True):
            if not math.isfinite(loss):
                raise DataError(f"the loss on {prefix} before step {call['iteration'] + 1} is {loss}: the run diverged")
        already = set(self.schedule.spent())
        self.schedule.extend(shares, measured)
        self._keep()
        words = "; ".join(
            f"{Path(corpus).name} {share:.4f} (loss {loss:.3f}, reference {reference:g})"
            for (_, corpus), share, loss, reference in zip(
                self.schedule.stream["blend"], shares, measured, args.reference_losses, strict=True
            )
        )
        self._say(f"batches from step {call['iteration'] + 1}: {words}")
        for corpus in sorted(set(self.schedule.spent()) - already):
            prefix = self.schedule.stream["blend"][corpus][1]
            self._say(f"{prefix} has no sample left after these: the others take its share")

    def _say(self, words: str) -> None:
        if self.args.rank == self.args.world_size - 1:
            screen.say(words, everywhere=True)

    def _losses(self, call: Mapping[str, Any], training: Any) -> list[float]:
        """The mean loss per token on each validation corpus, on the last rank; zeros elsewhere. Collective."""
        model, args = call["model"], self.args
        overlapped = training.should_disable_forward_pre_hook(args) and any(
            chunk.remove_forward_pre_hook_handles for chunk in model
        )
        if overlapped:
            training.disable_forward_pre_hook(model, optimizer=call["optimizer"])
        found = []
        masked = nullcontext() if self.learner is None else self.learner.as_it_is()
        with _evaluating(args, self._rounds()), masked:
            for stream in self._validation:
                iterators = [self._micro_batches(stream) for _ in model]
                groups = {name: call[name] for name in ("pg_collection", "p2p_communicator") if name in call}
                losses, _, _ = training.evaluate(
                    call["forward_step_func"], iterators if len(model) > 1 else iterators[0], model, None,
                    call["config"], eval_iters=1, **groups,
                )  # fmt: skip
                found.append(float(losses["lm loss"]) if losses else 0.0)
        if overlapped:
            training.enable_forward_pre_hook(model)
        return found

    def _rounds(self) -> int:
        """Micro-batches per replica and corpus; with virtual stages a multiple of the stages."""
        args = self.args
        rounds = -(-args.domain_samples // (args.micro_batch_size * args.data_parallel_size))
        stages = args.pipeline_model_parallel_size if args.virtual_pipeline_model_parallel_size else 1
        return int(-(-rounds // stages) * stages)

    def _micro_batches(self, stream: Stream) -> Iterator[dict[str, Any]]:
        """This replica's share of the first samples; what fills the last micro-batches up has no weight."""
        from megatron.core import parallel_state as mpu

        args = self.args
        for number in range(self._rounds()):
            first = (number * args.data_parallel_size + mpu.get_data_parallel_rank()) * args.micro_batch_size
            samples = []
            for place in range(first, first + args.micro_batch_size):
                sample = dict(stream[min(place, args.domain_samples - 1)])
                if place >= args.domain_samples:
                    sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
                samples.append(sample)
            yield torch.utils.data.default_collate(samples)

    # -- the account ----------------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """The account's entry: blocks so far, and FLOPs of measuring, which are neither training's nor its tokens."""
        schedule = self.schedule
        assert schedule is not None
        measured = sum(block.losses is not None for block in schedule.blocks) if self._validation else 0
        samples = measured * len(self._validation) * (self.args.domain_samples or 0)
        held = schedule.to_json()
        kept = ("every", "begins", "settings", "blocks")
        return {
            "hash": schedule.hash,
            **{name: held[name] for name in kept},
            "evaluation_flops": samples * ModelShape.from_args(vars(self.args)).forward_flops(self.args.seq_length),
        }


@contextmanager
def _evaluating(args: argparse.Namespace, rounds: int) -> Iterator[None]:
    """Megatron's evaluation with so many micro-batches per replica, and without a trace among its arguments."""
    own = {
        "eval_micro_batch_size": args.micro_batch_size,
        "eval_global_batch_size": rounds * args.micro_batch_size * args.data_parallel_size,
        "exit_duration_in_mins": None,  # the loop looks at the time itself
    }
    kept = {name: getattr(args, name) for name in (*own, "consumed_valid_samples")}
    vars(args).update(own)
    try:
        yield
    finally:
        vars(args).update(kept)
