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

KL = Σ p · d with d = log p - log q loses all digits where p is close to q. Since Σ p = Σ q, it is also
Σ p · (d + exp(-d) - 1), of which no term is negative, and an error in d of a constant cancels. That sum is computed.
A student equal to its teacher has a KL and gradients of exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements of logits in fp32 at a time


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

    def targets(self, batch: Mapping[str, Any], step: int, number: int) -> Targets:
        """The targets of this rank's share of a micro-batch in training; on the last stage, every TP and CP rank.

        ``batch`` is what ``engine/forward.py::get_batch`` returned (the last stage of several has no tokens, but
        labels), ``step`` is Megatron's, from 0, and ``number`` is the micro-batch's within the step on this replica.
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
        """Summed over ranks, in place."""
        if self.group is not None:
            torch.distributed.all_reduce(values, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest over ranks, in place."""
        if self.group is not None:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=self.group)
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

    ``logits`` [s, b, V / TP] are the student's, as its output layer returns them; ``labels`` [b, s].
    """
    if isinstance(targets, TopKTargets) and targets.ids.shape[-1] == shard.words:
        targets = _dense(targets, logits, shard)
    if isinstance(targets, FullTargets):
        # [b, s, ·] -> [s, b, ·]: views, of which a chunk at a time is copied
        found = _Full.apply(logits, labels.t(), targets.logits.transpose(0, 1), targets.normalized, mixture, shard)
    else:
        rest = targets.log_rest.unsqueeze(-1)
        teacher = torch.cat([targets.log_probabilities.to(rest.dtype), rest], dim=-1)  # [b, s, k + 1]
        found = _TopK.apply(logits, labels.t(), targets.ids.transpose(0, 1), teacher.transpose(0, 1), mixture, shard)
    return TokenLosses(*(each.t().contiguous() for each in found))


@torch.no_grad()
def log_probabilities(logits: Tensor, shard: Shard) -> Tensor:
    """Log-probabilities of words from logits [s, b, V / TP], as the loss computes them from ``FullTargets``.

    Padding has -inf. Collective over ``shard.group``.
    """
    width = logits.shape[-1]
    count = shard.count(width)
    (scale,) = _scales([logits], count, shard)
    found = _soft(logits, scale, slice(None), count, 1)
    return torch.nn.functional.pad(found, (0, width - count), value=-torch.inf)


def _dense(targets: TopKTargets, logits: Tensor, shard: Shard) -> FullTargets:
    """The log-probabilities of all words in their places, and this rank's shard of them."""
    width = logits.shape[-1]
    values = _wide(targets.log_probabilities)
    whole = torch.empty_like(values).scatter_(-1, targets.ids.long(), values)  # [b, s, words]
    first = shard.first(width)
    here = whole[..., first : first + shard.count(width)]
    return FullTargets(torch.nn.functional.pad(here, (0, width - here.shape[-1])), normalized=True)


def _wide(values: Tensor) -> Tensor:
    """In the type of the arithmetic; the same memory if they are already."""
    return values if values.dtype == torch.float64 else values.float()


def _log_sum_exp(values: Tensor) -> Tensor:
    """Over the last dimension; -inf where it is empty."""
    return values.logsumexp(-1) if values.shape[-1] else values.new_full(values.shape[:-1], -torch.inf)


class _Scale(NamedTuple):
    """What makes logits log-probabilities: logits - largest - log_sum; softened: those / T - softened. All [s, b].

    The largest is taken away first: then words of high probability keep all their digits.
    """

    largest: Tensor
    log_sum: Tensor
    softened: Tensor | None = None


def _scales(
    sides: Sequence[Tensor], count: int, shard: Shard, temperature: float = 1, normalized: bool = False
) -> list[_Scale]:
    """Of the student's and the teacher's logits [s, b, V / TP]; ``normalized``: the last ones need none. Collective."""
    few = sides[:-1] if normalized else sides
    largest = _wide(sides[0].new_zeros(len(few), *sides[0].shape[:-1]))  # [sides, s, b]
    for part in _parts(sides[0]):
        for number, logits in enumerate(few):
            z = logits[part, :, :count]
            largest[number, part] = _wide(z.amax(-1)) if count else -torch.inf
    shard.largest(largest)
    sums = torch.empty_like(largest)
    for part in _parts(sides[0]):
        for number, logits in enumerate(few):
            z = _wide(logits[part, :, :count])
            sums[number, part] = (z - largest[number, part].unsqueeze(-1)).exp_().sum(-1)
    sums = shard.sum(sums).log_()
    found = [_Scale(*each) for each in zip(largest, sums, strict=True)]
    if normalized:
        found.append(_Scale(torch.zeros_like(largest[0]), torch.zeros_like(largest[0])))
    if temperature == 1:
        return found
    softened = torch.empty(len(sides), *largest.shape[1:], dtype=largest.dtype, device=largest.device)
    for part in _parts(sides[0]):
        for number, (logits, scale) in enumerate(zip(sides, found, strict=True)):
            softened[number, part] = _log_sum_exp(_soft(logits, scale, part, count, temperature))
    softened = shard.log_sum_exp(softened)
    return [_Scale(*scale[:2], each) for scale, each in zip(found, softened, strict=True)]


def _soft(logits: Tensor, scale: _Scale, part: slice, count: int, temperature: float) -> Tensor:
    """Log-probabilities of a part, softened; not normalized again if ``scale`` has no sum for that.

    Student and teacher take the same way, so that equal logits give equal bits.
    """
    found = _wide(logits[part, :, :count]) - scale.largest[part].unsqueeze(-1)
    found -= scale.log_sum[part].unsqueeze(-1)
    if temperature != 1:
        found /= temperature
    return found if scale.softened is None else found.sub_(scale.softened[part].unsqueeze(-1))


def _parts(logits: Tensor) -> Iterator[slice]:
    """Slices of the first dimension, such that an fp32 copy of one has at most ``_CHUNK`` elements."""
    length = max(1, _CHUNK // max(1, logits[0].numel()))
    for first in range(0, logits.shape[0], length):
        yield slice(first, first + length)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms of KL(p ‖ q), none negative; see the head of this file."""
    difference = log_p - log_q
    p = log_p.exp()
    # Where d is far below 0, exp(-d) may overflow, and p · exp(-d) = q does not.
    return torch.where(difference > -1, p * (difference + torch.expm1(-difference)), p * (difference - 1) + log_q.exp())


def _places(ids: Tensor, width: int, count: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """Columns of words in this rank's shard, and which are here; words of other ranks get the column ``count``."""
    columns = ids.long() - shard.first(width)
    here = (columns >= 0) & (columns < count)
    return torch.where(here, columns, count), here


def _at(values: Tensor, columns: Tensor, here: Tensor, less: Tensor | None = None) -> Tensor:
    """``values`` [..., n] at ``columns`` [..., m], ``less`` [...] if given; 0 where the word is on another rank."""
    if not values.shape[-1]:
        return _wide(values.new_zeros(columns.shape))
    found = _wide(values.gather(-1, columns.clamp(max=values.shape[-1] - 1)))
    if less is not None:
        found = found - less.unsqueeze(-1)
    return torch.where(here, found, 0)


class _Full(torch.autograd.Function):
    """With the teacher's whole distribution. Returns mixed, CE and T² · KL, all [s, b]."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor, normalized: bool, mixture: Mixture, shard: Shard
    ) -> tuple[Tensor, Tensor, Tensor]:
        temperature = mixture.temperature
        count = shard.count(logits.shape[-1])
        own, others = _scales([logits, teacher], count, shard, temperature, normalized)
        columns, here = _places(labels.unsqueeze(-1), logits.shape[-1], count, shard)
        found = torch.empty_like(own.log_sum).unsqueeze(0).repeat(2, 1, 1)  # the label's logit, and KL
        for part in _parts(logits):
            found[0, part] = _at(logits[part, :, :count], columns[part], here[part], own.largest[part]).squeeze(-1)
            log_q = _soft(logits, own, part, count, temperature)
            log_p = _soft(teacher, others, part, count, temperature)
            found[1, part] = _divergence(*(log_q, log_p) if mixture.reverse else (log_p, log_q)).sum(-1)
        predicted, divergence = shard.sum(found)
        lm = own.log_sum - predicted
        distillation = temperature**2 * divergence
        ctx.mixture, ctx.shard, ctx.scales, ctx.divergence = mixture, shard, (own, others), divergence
        ctx.save_for_backward(logits, teacher, columns)
        ctx.mark_non_differentiable(lm, distillation)
        return _mixed(lm, distillation, mixture), lm, distillation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, teacher, columns = ctx.saved_tensors
        mixture: Mixture = ctx.mixture
        (own, others), temperature = ctx.scales, mixture.temperature
        count = ctx.shard.count(logits.shape[-1])
        found = torch.zeros_like(logits) if count < logits.shape[-1] else torch.empty_like(logits)
        for part in _parts(logits):
            log_q = _soft(logits, own, part, count, temperature)
            log_p = _soft(teacher, others, part, count, temperature)
            if mixture.reverse:
                slope = log_q.exp() * (log_q - log_p - ctx.divergence[part].unsqueeze(-1))
            else:
                slope = log_q.exp() - log_p.exp()
            slope *= mixture.alpha * temperature
            if mixture.alpha != 1:
                slope += (1 - mixture.alpha) * _soft(logits, own._replace(softened=None), part, count, 1).exp()
            slope = _minus(slope, columns[part], 1 - mixture.alpha)
            found[part, :, :count] = slope * gradients[0][part].unsqueeze(-1)
        return found, None, None, None, None, None


class _TopK(torch.autograd.Function):
    """With k words and the rest. Returns mixed, CE and T² · KL, all [s, b]."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ids: Tensor, teacher: Tensor, mixture: Mixture, shard: Shard
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = logits.shape[-1]
        count = shard.count(width)
        (own,) = _scales([logits], count, shard)
        columns, here = _places(torch.cat([ids, labels.unsqueeze(-1)], dim=-1), width, count, shard)  # [s, b, k + 1]
        rest = torch.empty_like(own.log_sum)
        known = own.log_sum.new_empty(columns.shape)
        for part in _parts(logits):
            z = _soft(logits, own, part, count, 1)
            known[part] = _at(z, columns[part], here[part])
            rest[part] = _log_sum_exp(_others(z, columns[part, :, :-1]))
        rest, known = shard.log_sum_exp(rest), shard.sum(known)
        lm = -known[..., -1]
        # From here on every tensor-parallel rank computes the same.
        temperature = mixture.temperature
        events = torch.cat([known[..., :-1], rest.unsqueeze(-1)], dim=-1)  # [s, b, k + 1]
        least = torch.finfo(events.dtype).min / 4  # of an event that cannot be: finite, so that differences are
        log_q = (events.clamp(min=least) / temperature).log_softmax(-1)
        log_p = (teacher.to(events.dtype).clamp(min=least) / temperature).log_softmax(-1)
        divergence = _divergence(*(log_q, log_p) if mixture.reverse else (log_p, log_q)).sum(-1)
        if mixture.reverse:
            slopes = log_q.exp() * (log_q - log_p - divergence.unsqueeze(-1))
        else:
            slopes = log_q.exp() - log_p.exp()
        slopes *= mixture.alpha * temperature
        distillation = temperature**2 * divergence
        ctx.mixture, ctx.shard, ctx.scale = mixture, shard, own
        ctx.rest, ctx.slopes = rest.clamp(min=least), slopes
        ctx.save_for_backward(logits, columns)
        ctx.mark_non_differentiable(lm, distillation)
        return _mixed(lm, distillation, mixture), lm, distillation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, columns = ctx.saved_tensors
        mixture: Mixture = ctx.mixture
        count = ctx.shard.count(logits.shape[-1])
        found = torch.zeros_like(logits) if count < logits.shape[-1] else torch.empty_like(logits)
        for part in _parts(logits):
            z, top = _soft(logits, ctx.scale, part, count, 1), columns[part, :, :-1]
            # A word of the rest has its share of the rest's slope; the k words have their own.
            slope = (_others(z, top) - ctx.rest[part].unsqueeze(-1)).exp_() * ctx.slopes[part, :, -1:]
            if mixture.alpha != 1:
                slope += (1 - mixture.alpha) * z.exp()
            slope = torch.nn.functional.pad(slope, (0, 1)).scatter_add_(-1, top, ctx.slopes[part, :, :-1])
            slope = _minus(slope[..., :-1], columns[part, :, -1:], 1 - mixture.alpha)
            found[part, :, :count] = slope * gradients[0][part].unsqueeze(-1)
        return found, None, None, None, None, None


def _mixed(lm: Tensor, distillation: Tensor, mixture: Mixture) -> Tensor:
    return (1 - mixture.alpha) * lm + mixture.alpha * distillation


def _others(z: Tensor, columns: Tensor) -> Tensor:
    """``z`` with -inf at ``columns``; the column past the last is nobody's."""
    return torch.nn.functional.pad(z, (0, 1)).scatter_(-1, columns, -torch.inf)[..., :-1]


def _minus(values: Tensor, columns: Tensor, amount: float) -> Tensor:
    """``values`` less ``amount`` in one column each; the column past the last is nobody's."""
    if amount == 0 or not values.shape[-1]:
        return values
    last = values.shape[-1] - 1
    less = values.new_full(columns.shape, -amount).masked_fill_(columns > last, 0)
    return values.scatter_add_(-1, columns.clamp(max=last), less)
