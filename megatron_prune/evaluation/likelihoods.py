"""Log-likelihoods of continuations under the loaded model: asked for on rank 0, computed by all ranks.

Rank 0 runs lm-eval; the others wait in ``follow`` and make the same forward passes:

    rank 0:  score(requests) ─ broadcast ─▶ every rank: its replica's batches ─ all-reduce ─▶ the answers
    others:  follow() …                                                     until rank 0 says finish()

Requests with the same input are run once: the choices A, B, C, D of a question differ in their last token only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from tqdm import tqdm

from megatron_prune.engine import forward

PATIENCE = timedelta(days=7)  # of ranks that wait while lm-eval reads data or bootstraps


@dataclass(frozen=True)
class Request:
    """``inputs`` are read by the model; the predictions after its last tokens are compared with ``targets``."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class Scorer:
    """The model of all ranks, from ``runtime.load_model``. Collective, like each of its methods."""

    def __init__(self, model: list[torch.nn.Module], *, batch: int):
        self.model, self.batch = model, batch
        # NCCL would give up on a rank that is busy elsewhere; and there is nothing here for a GPU.
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """On rank 0: log-likelihood of each request's targets, and whether each target was the likeliest token."""
        return self._compute(self._broadcast(list(requests)) or [])

    def follow(self) -> None:
        """On the other ranks: take part in every ``score`` until ``finish``."""
        while (requests := self._broadcast(None)) is not None:
            self._compute(requests)

    def finish(self) -> None:
        """On rank 0: let the others go on."""
        self._broadcast(None)

    def _broadcast(self, requests: list[Request] | None) -> list[Request] | None:
        box = [requests]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _compute(self, requests: list[Request]) -> list[tuple[float, bool]]:
        asking: dict[tuple[int, ...], list[int]] = {}  # what is run once: which requests read from it
        for number, request in enumerate(requests):
            asking.setdefault(request.inputs, []).append(number)
        # The longest first, so that memory runs out at once or not at all; like lengths side by side.
        batches = list(itertools.batched(sorted(asking, key=len, reverse=True), self.batch))
        own = batches[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
        reading = iter(own)

        def padded() -> Iterator[torch.Tensor]:
            for batch in tqdm(own, desc="tasks", unit="batch", disable=torch.distributed.get_rank() != 0):
                rows = [torch.tensor(row, dtype=torch.int64) for row in batch]
                yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where nothing looks

        def read(logits: torch.Tensor) -> list[tuple[int, float, bool]]:
            """Number, log-likelihood and greediness of the requests of a batch, from logits [B, S, V / TP]."""
            pieces, numbers = [], []
            for row, inputs in enumerate(next(reading)):
                for number in asking[inputs]:
                    numbers.append(number)
                    pieces.append(logits[row, len(inputs) - len(requests[number].targets) : len(inputs)])
            lengths = [len(piece) for piece in pieces]
            targets = torch.tensor([t for n in numbers for t in requests[n].targets], device=logits.device)
            losses, greedy = _compare(torch.cat(pieces), targets)
            sums = [-part.sum().item() for part in torch.split(losses.double(), lengths)]
            return list(zip(numbers, sums, [bool(part.all()) for part in torch.split(greedy, lengths)], strict=True))

        found = forward.run_logits(self.model, padded(), read)
        gathered = torch.zeros(len(requests), 2, dtype=torch.float64, device=torch.cuda.current_device())
        if found is not None and mpu.get_tensor_model_parallel_rank() == 0:
            for number, likelihood, greedy in itertools.chain.from_iterable(found):
                gathered[number, 0], gathered[number, 1] = likelihood, greedy
        torch.distributed.all_reduce(gathered)
        return [(likelihood, bool(greedy)) for likelihood, greedy in gathered.tolist()]


def _compare(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [n] of ``targets`` [n], and whether each is the likeliest token, from this rank's logits [n, V / TP].

    Writes into ``logits``.
    """
    group = mpu.get_tensor_model_parallel_group()
    first = mpu.get_tensor_model_parallel_rank() * logits.shape[1]
    logits = logits.float()
    own, place = logits.max(-1)
    highest = own.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    # Of equal ones the lowest id, as where the vocabulary is whole.
    likeliest = torch.where(own == highest, place + first, torch.iinfo(torch.int64).max)
    torch.distributed.all_reduce(likeliest, torch.distributed.ReduceOp.MIN, group=group)
    losses = vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]  # [n, 1, V / TP] and [n, 1]
    return losses, likeliest == targets
