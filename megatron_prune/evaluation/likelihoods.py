"""Log-likelihoods of continuations.

Requests with the same input are run once: the choices A, B, C, D of a question differ only in their last token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_prune import screen
from megatron_prune.engine import forward


@dataclass(frozen=True)
class LikelihoodRequest:
    """The model reads ``inputs``; the predictions after its last tokens are compared with ``targets``."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def score(model: list[torch.nn.Module], requests: Sequence[LikelihoodRequest], batch: int) -> list[tuple[float, bool]]:
    """Log-likelihood of each request's targets, and whether each target was the likeliest token. Collective."""
    asking: dict[tuple[int, ...], list[int]] = {}  # each input, run once: the requests that use it
    for number, request in enumerate(requests):
        asking.setdefault(request.inputs, []).append(number)
    # The longest first, so that out-of-memory errors come early; similar lengths share a batch.
    batches = list(itertools.batched(sorted(asking, key=len, reverse=True), batch))
    own = batches[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    reading = iter(own)

    def padded() -> Iterator[torch.Tensor]:
        for some in screen.progress(own, len(own), "tasks", "batch"):
            rows = [torch.tensor(row, dtype=torch.int64) for row in some]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, which no result reads

    def read(logits: torch.Tensor) -> list[tuple[int, float, bool]]:
        """Number, log-likelihood and greediness of a batch's requests, from logits [B, S, V / TP]."""
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

    found = forward.run_logits(model, padded(), read)
    gathered = torch.zeros(len(requests), 2, dtype=torch.float64, device=torch.cuda.current_device())
    if found is not None and mpu.get_tensor_model_parallel_rank() == 0:
        for number, likelihood, greedy in itertools.chain.from_iterable(found):
            gathered[number, 0], gathered[number, 1] = likelihood, greedy
    torch.distributed.all_reduce(gathered)
    return [(likelihood, bool(greedy)) for likelihood, greedy in gathered.tolist()]


def _compare(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [n] of ``targets`` [n], and whether each is the likeliest token, from this rank's logits [n, V / TP].

    Overwrites ``logits``.
    """
    group = mpu.get_tensor_model_parallel_group()
    first = mpu.get_tensor_model_parallel_rank() * logits.shape[1]
    logits = logits.float()
    own, place = logits.max(-1)
    highest = own.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    # Among equal ones the lowest id, as with an unsplit vocabulary.
    likeliest = torch.where(own == highest, place + first, torch.iinfo(torch.int64).max)
    torch.distributed.all_reduce(likeliest, torch.distributed.ReduceOp.MIN, group=group)
    losses = vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]  # [n, 1, V / TP] and [n, 1]
    return losses, likeliest == targets
