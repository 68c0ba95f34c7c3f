"""The objective of distillation: (1 - α) · CE + α · T² · KL between a teacher and a student, per token.

Hinton et al. 2015 (arXiv 1503.02531); T² keeps the gradients of KL at the size of those of CE. Forward is KL(teacher ‖
student), as in Minitron (arXiv 2407.14679); reverse is KL(student ‖ teacher), as in MiniLLM (arXiv 2306.08543). Both
distributions are softened by T. The sum is over all words of the vocabulary, without its padding.

Logits are sharded over the vocabulary among tensor-parallel ranks and stay so: what is reduced over these ranks is a
few numbers per token (maxima, sums of exponentials, dot products). Arithmetic is in fp32, or fp64 where logits are.

There are two kinds of targets, and whoever has them is a ``TargetProvider``:

* ``FullTargets``: the teacher's logits, sharded as the student's. An online teacher makes them.
* ``TopKTargets``: the teacher's log-probabilities of k words, and of all other words together, which count as one event
  (Megatron's "ghost token"). Then KL is between distributions over k + 1 events, softened by T. At T = 1 and forward it
  is smaller than over the whole vocabulary by the teacher's mass of the rest times the KL within the rest, and it is
  zero only if the student gives the rest as much. At k = vocabulary the full form is computed, from the same numbers.

KL = Σ p · d with d = log p - log q loses its digits where p is close to q, since d has the rounding of two sums of
exponentials. Σ (p · d - p + q) is the same, because p and q sum to one, and such an error cancels in it. A student
equal to its teacher has a KL and gradients of exactly zero.

The gradient of every token's loss is computed with the loss, a part of the tokens at a time, and is what is kept for
the backward pass, in the memory and type of the student's logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_PART = {"cpu": 1 << 19, "cuda": 1 << 24}  # elements of logits in fp32 at a time: in a cache, or enough for a GPU


@dataclass(frozen=True)
class FullTargets:
    """The teacher's logits [b, s, V / TP]: this rank's shard of the padded vocabulary, of any float type."""

    logits: Tensor
    normalized: bool = False  # they are log-probabilities


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's log-probabilities of k different words, at T = 1; the same on every tensor-parallel rank.

    They need not sum to one to the last digit: they are normalized here.
    """

    ids: Tensor  # [b, s, k], words of the whole vocabulary
    log_probabilities: Tensor  # [b, s, k]
    log_rest: Tensor  # [b, s], of all other words together; -inf if there are none


Targets = FullTargets | TopKTargets


class TargetProvider(Protocol):
    """Where a run's targets come from: an online teacher, or a cache."""

    def targets(self, batch: Mapping[str, Any]) -> Targets:
        """The targets of this rank's share of the next training micro-batch; on the last stage, every TP and CP rank.

        ``batch`` is what ``engine/forward.py::get_batch`` returned. The last stage of several has labels, no tokens.
        """


@dataclass(frozen=True)
class Shard:
    """This rank's share of the vocabulary: equal shares of the padded one, in order of ranks."""

    words: int  # of the whole vocabulary, without padding
    rank: int = 0
    group: Any = None  # tensor-parallel process group; None for a single rank

    @staticmethod
    def of_megatron(words: int) -> Shard:
        from megatron.core import parallel_state as mpu

        group = mpu.get_tensor_model_parallel_group()
        return Shard(words, mpu.get_tensor_model_parallel_rank(), group if group.size() > 1 else None)

    def first(self, width: int) -> int:
        """The first word of a shard of ``width`` embeddings."""
        return self.rank * width

    def count(self, width: int) -> int:
        """How many of them are words."""
        return min(max(self.words - self.first(width), 0), width)

    def sum(self, values: Tensor) -> Tensor:
        """Summed over ranks; ``values`` may be overwritten."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks; ``values`` may be overwritten."""
        return self._reduced(values, torch.distributed.ReduceOp.MAX)

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        if self.group is None:
            return values
        values = values.contiguous()  # memory is what is reduced, and a sum over no word may have other strides
        torch.distributed.all_reduce(values, op=how, group=self.group)
        return values

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """Over ranks, of logarithms; ``values`` may be overwritten."""
        if self.group is None:
            return values
        largest = self.largest(values.clone())
        return self.sum(values.sub_(largest).exp_()).log_().add_(largest)


@dataclass(frozen=True)
class Mixture:
    """The settings of one step."""

    alpha: float  # share of KL, from 0 to 1
    temperature: float = 1.0
    reverse: bool = False


class TokenLosses(NamedTuple):
    """Per token, [b, s], the same on every tensor-parallel rank; gradients flow through ``mixed`` alone."""

    mixed: Tensor
    lm: Tensor  # cross entropy
    distillation: Tensor  # T² · KL


def losses(logits: Tensor, labels: Tensor, targets: Targets, mixture: Mixture, shard: Shard) -> TokenLosses:
    """The loss of each token. Collective over ``shard.group``, forward only.

    ``logits`` [s, b, V / TP] are the student's, as its output layer returns them, which are overwritten; ``labels``
    [b, s].
    """
    if isinstance(targets, TopKTargets) and targets.ids.shape[-1] == shard.words:
        targets = _dense(targets, logits, shard)
    # [b, s, ·] -> [s · b, ·]: views of what an online teacher returned
    if isinstance(targets, FullTargets):
        teacher = targets.logits.transpose(0, 1).flatten(0, 1)
        work: _Full | _TopK = _Full(labels.t().flatten(), teacher, targets.normalized, mixture, shard)
    else:
        if mixture.temperature != 1:  # softening the rest's sum is not summing the softened rest
            raise ValueError(
                f"temperature {mixture.temperature}: expected 1 with {targets.ids.shape[-1]} words and the rest"
            )
        rest = targets.log_rest.unsqueeze(-1)
        events = torch.cat([targets.log_probabilities.to(rest.dtype), rest], dim=-1)  # [b, s, k + 1]
        ids, events = (each.transpose(0, 1).flatten(0, 1) for each in (targets.ids, events))
        work = _TopK(labels.t().flatten(), ids, events, logits.shape[-1], mixture, shard)
    found = _WithSlopes.apply(logits, work)
    return TokenLosses(*(each.t().contiguous() for each in found))


@torch.no_grad()
def log_probabilities(logits: Tensor, shard: Shard) -> Tensor:
    """Log-probabilities of words from logits [n, V / TP], as the loss computes them from ``FullTargets``.

    Padding has -inf. Collective over ``shard.group``.
    """
    count = shard.count(logits.shape[-1])
    found = torch.full(logits.shape, -torch.inf, dtype=_wide(logits.dtype), device=logits.device)
    for part in _parts(logits):
        values = logits[part, :count].to(found.dtype, copy=True)
        _normalize(values, shard, found[part, :count])
    return found


def _dense(targets: TopKTargets, logits: Tensor, shard: Shard) -> FullTargets:
    """The log-probabilities of all words in their places, and this rank's shard of them."""
    width = logits.shape[-1]
    ids = targets.ids.transpose(0, 1).long()  # [s, b, words]
    values = targets.log_probabilities.transpose(0, 1)
    values = values.to(_wide(values.dtype)).contiguous()
    whole = torch.empty_like(values).scatter_(-1, ids, values)
    first = shard.first(width)
    here = whole[..., first : first + shard.count(width)]
    here = torch.nn.functional.pad(here, (0, width - here.shape[-1]))
    return FullTargets(here.transpose(0, 1), normalized=True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic."""
    return dtype if dtype == torch.float64 else torch.float32


def _amax(values: Tensor) -> Tensor:
    """Over the last dimension; -inf where it is empty."""
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], -torch.inf)


def _normalize(values: Tensor, shard: Shard, out: Tensor) -> Tensor:
    """Log-probabilities of this rank's words from their logits [n, words], into ``out``; overwrites ``values``.

    Student and teacher take the same way, so that equal logits give equal bits. The largest logit is taken away first:
    then words of high probability keep all their digits. Collective.
    """
    if shard.group is None:
        return torch.log_softmax(values, -1, out=out)
    values -= shard.largest(_amax(values)).unsqueeze(-1)
    return torch.sub(values, shard.sum(torch.exp(values, out=out).sum(-1)).log_().unsqueeze(-1), out=out)


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows [n, V / TP], as many at a time as ``part_length`` says."""
    length = part_length(rows)
    for first in range(0, rows.shape[0], length):
        yield slice(first, first + length)


def part_length(rows: Tensor) -> int:
    """How many rows [V / TP] are worked on at a time: as many as have at most ``_PART`` elements, or one."""
    return max(1, _PART.get(rows.device.type, _PART["cuda"]) // max(1, rows.shape[-1]))


def _divergence(
    log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, mixture: Mixture, shard: Shard
) -> tuple[Tensor, Tensor]:
    """KL of rows [n, ·], and its slope by the student's softened logits times T, in the memory of ``log_q``.

    ``log_q`` is the student's and ``log_p`` the teacher's; ``q`` and ``p`` are room for their probabilities, of which
    the first stays. Collective over ``shard.group``.
    """
    torch.exp(log_q, out=q)
    torch.exp(log_p, out=p)
    if not mixture.reverse:
        apart = log_p.sub_(log_q)
        excess = torch.sub(q, p, out=log_q)
        return shard.sum(torch.addcmul(excess, p, apart, out=apart).sum(-1)), excess
    slope = log_q.sub_(log_p).mul_(q)
    excess = torch.sub(q, p, out=p)
    found = shard.sum(torch.sub(slope, excess, out=log_p).sum(-1))
    return found, slope.addcmul_(q, found.unsqueeze(-1), value=-1)


def _places(ids: Tensor, width: int, count: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """Columns of words in this rank's shard, and which are here; words of other ranks get the first or last column."""
    columns = ids.long() - shard.first(width)
    here = (columns >= 0) & (columns < count)
    return columns.clamp_(0, max(0, count - 1)), here


def _at(values: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """``values`` [n, words] at ``columns`` [n, m], and 0 where the word is on another rank."""
    return torch.where(here, values.gather(-1, columns), 0) if values.shape[-1] else values.new_zeros(columns.shape)


def _add_at(values: Tensor, columns: Tensor, here: Tensor, amounts: Tensor | float) -> None:
    """Add to ``values`` [n, words] at ``columns`` [n, m], of which no two that are ``here`` are the same in a row."""
    if values.shape[-1]:
        values.scatter_add_(-1, columns, torch.where(here, amounts, values.new_zeros(())))


class _WithSlopes(torch.autograd.Function):
    """Mixed, CE and T² · KL of every token, all [s, b]; the gradient of mixed by the logits overwrites these."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: _Full | _TopK) -> tuple[Tensor, Tensor, Tensor]:
        mixture, count = work.mixture, work.shard.count(logits.shape[-1])
        slopes = logits.detach().flatten(0, 1)  # [s · b, V / TP]
        room = slopes.new_empty(work.ROOM, part_length(slopes), count, dtype=_wide(logits.dtype))
        lm, divergence = room.new_empty(2, len(slopes))
        for part in _parts(slopes):
            lm[part], divergence[part], slope = work.of(slopes[part, :count], part, room)
            slopes[part, :count] = slope
        slopes[:, count:] = 0
        lm, divergence = (each.view(logits.shape[:-1]) for each in (lm, divergence))
        distillation = divergence.mul_(mixture.temperature**2)
        ctx.save_for_backward(slopes.view(logits.shape))
        ctx.mark_non_differentiable(lm, distillation)
        return (1 - mixture.alpha) * lm + mixture.alpha * distillation, lm, distillation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (found,) = ctx.saved_tensors
        slopes, gradient = found.flatten(0, 1), gradients[0].flatten()
        for part in _parts(slopes):
            slopes[part] *= gradient[part].unsqueeze(-1)
        return found, None


@dataclass(frozen=True)
class _Full:
    """With the teacher's whole distribution."""

    ROOM = 5  # tensors of a part in the type of the arithmetic

    labels: Tensor  # [s · b]
    teacher: Tensor  # [s · b, V / TP]
    normalized: bool
    mixture: Mixture
    shard: Shard

    def of(self, logits: Tensor, part: slice, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CE and KL of a part [n], and the slopes of its mixed loss by the logits [n, words] of this rank's words.

        ``room`` is overwritten: memory that is used again is in a processor's cache. Collective.
        """
        alpha, temperature = self.mixture.alpha, self.mixture.temperature
        log_q, log_p, q, p, values = room[:, : len(logits)]
        width, count = self.teacher.shape[-1], logits.shape[-1]
        columns, here = _places(self.labels[part].unsqueeze(-1), width, count, self.shard)
        _normalize(values.copy_(logits), self.shard, log_q)
        lm = -self.shard.sum(_at(log_q, columns, here).squeeze(-1))
        teacher = self.teacher[part, :count]
        if self.normalized:
            log_p.copy_(teacher)
        else:
            _normalize(values.copy_(teacher), self.shard, log_p)
        plain = q
        if temperature != 1:
            _normalize(torch.div(log_p, temperature, out=p), self.shard, log_p)
            plain = torch.exp(log_q, out=values)
            _normalize(torch.div(log_q, temperature, out=p), self.shard, log_q)
        divergence, slope = _divergence(log_q, log_p, q, p, self.mixture, self.shard)
        slope *= alpha * temperature
        if alpha != 1:
            slope.add_(plain, alpha=1 - alpha)
        _add_at(slope, columns, here, alpha - 1)
        return lm, divergence, slope


@dataclass(frozen=True)
class _TopK:
    """With k words and the rest, at T = 1."""

    ROOM = 1

    labels: Tensor  # [s · b]
    ids: Tensor  # [s · b, k]
    teacher: Tensor  # [s · b, k + 1], log-probabilities
    width: int  # V / TP
    mixture: Mixture
    shard: Shard

    def of(self, logits: Tensor, part: slice, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As that of ``_Full``."""
        alpha, shard = self.mixture.alpha, self.shard
        wanted = torch.cat([self.ids[part], self.labels[part].unsqueeze(-1)], dim=-1)  # [n, k + 1]
        columns, here = _places(wanted, self.width, logits.shape[-1], shard)
        others = room[0, : len(logits)].copy_(logits)
        known = shard.sum(_at(others, columns, here))
        top = columns[:, :-1], here[:, :-1]
        _add_at(others, *top, -torch.inf)
        least = torch.finfo(others.dtype).min / 4  # of an event that cannot be: finite, so that differences are
        largest = shard.largest(_amax(others)).clamp_(min=least).unsqueeze(-1)
        others.sub_(largest).exp_()  # in the unit exp(largest), and 0 for the k words
        mass = shard.sum(others.sum(-1)).unsqueeze(-1)
        # What follows, up to the slopes of events, is the same on every tensor-parallel rank. The largest logit is
        # taken away first: then words of high probability keep all their digits.
        whole = torch.maximum(known[:, :-1].amax(-1, keepdim=True), largest)
        events = torch.cat([known[:, :-1] - whole, largest - whole + mass.log()], dim=-1)  # [n, k + 1]
        total = events.logsumexp(-1, keepdim=True)
        events -= total
        lm = (total - (known[:, -1:] - whole)).squeeze(-1)
        log_q, log_p = (each.to(events.dtype).clamp(min=least).log_softmax(-1) for each in (events, self.teacher[part]))
        room_q, room_p = torch.empty_like(log_q), torch.empty_like(log_p)
        divergence, slopes = _divergence(log_q, log_p, room_q, room_p, self.mixture, Shard(shard.words))
        slopes *= alpha
        # A word of the rest has its share of the rest's slope; the k words have their own.
        share = slopes[:, -1:] / mass.clamp(min=1) + (1 - alpha) * (largest - whole - total).exp()
        _add_at(others.mul_(share), *top, slopes[:, :-1] + (1 - alpha) * events[:, :-1].exp())
        _add_at(others, columns[:, -1:], here[:, -1:], alpha - 1)
        return lm, divergence, others
