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
the backward pass, in the type of the logits: neither model's logits are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_PART = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of logits in fp32 at a time: in a cache, or enough for a GPU


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

    ``logits`` [s, b, V / TP] are the student's, as its output layer returns them; ``labels`` [b, s].
    """
    if isinstance(targets, TopKTargets) and targets.ids.shape[-1] == shard.words:
        targets = _dense(targets, logits, shard)
    if isinstance(targets, FullTargets):
        # [b, s, ·] -> [s, b, ·]: views, of which a part at a time is copied
        work: _Full | _TopK = _Full(labels.t(), targets.logits.transpose(0, 1), targets.normalized, mixture, shard)
    else:
        rest = targets.log_rest.unsqueeze(-1)
        teacher = torch.cat([targets.log_probabilities.to(rest.dtype), rest], dim=-1)  # [b, s, k + 1]
        work = _TopK(labels.t(), targets.ids.transpose(0, 1), teacher.transpose(0, 1), mixture, shard)
    found = _WithSlopes.apply(logits, work)
    return TokenLosses(*(each.t().contiguous() for each in found))


@torch.no_grad()
def log_probabilities(logits: Tensor, shard: Shard) -> Tensor:
    """Log-probabilities of words from logits [s, b, V / TP], as the loss computes them from ``FullTargets``.

    Padding has -inf. Collective over ``shard.group``.
    """
    width = logits.shape[-1]
    found = torch.full(logits.shape, -torch.inf, dtype=_wide(logits[:0]).dtype, device=logits.device)
    for part in _parts(logits):
        found[part, :, : shard.count(width)] = _normalized(logits[part], shard)
    return found


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


def _normalized(logits: Tensor, shard: Shard) -> Tensor:
    """Log-probabilities of this rank's words, a new tensor. Collective.

    Student and teacher take the same way, so that equal logits give equal bits. The largest logit is taken away first:
    then words of high probability keep all their digits.
    """
    z = logits[..., : shard.count(logits.shape[-1])]
    lost = z.shape[:-1]
    largest = _wide(z.amax(-1)) if z.shape[-1] else _wide(z.new_full(lost, -torch.inf))
    z = _wide(z) - shard.largest(largest).unsqueeze(-1)
    return z.sub_(shard.sum(z.exp().sum(-1)).log_().unsqueeze(-1))


def _softened(log_probabilities: Tensor, temperature: float, shard: Shard) -> Tensor:
    """The same at another temperature; the same tensor at one. Collective."""
    if temperature == 1:
        return log_probabilities
    found = log_probabilities / temperature
    return found.sub_(shard.log_sum_exp(_log_sum_exp(found)).unsqueeze(-1))


def _parts(logits: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of [s, b, V / TP], such that one has at most ``_PART`` elements."""
    length = max(1, _PART.get(logits.device.type, 1 << 24) // max(1, logits[0].numel()))
    for first in range(0, logits.shape[0], length):
        yield slice(first, first + length)


def _divergence(log_q: Tensor, log_p: Tensor, mixture: Mixture, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """KL of a part [s, b], its slope by the student's softened logits, [s, b, ·], times T, and the student's q.

    ``log_q`` is the student's, ``log_p`` the teacher's. Collective over ``shard.group``.
    """
    q, p = log_q.exp(), log_p.exp()
    excess = q - p
    if not mixture.reverse:
        terms = torch.addcmul(excess, p, log_p - log_q)
        return shard.sum(terms.sum(-1)), excess, q
    slope = (log_q - log_p).mul_(q)
    found = shard.sum((slope - excess).sum(-1))
    return found, slope.addcmul_(q, found.unsqueeze(-1), value=-1), q


def _places(ids: Tensor, width: int, count: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """Columns of words in this rank's shard, and which are here; words of other ranks get the column ``count``."""
    columns = ids.long() - shard.first(width)
    here = (columns >= 0) & (columns < count)
    return torch.where(here, columns, count), here


def _at(values: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """``values`` [..., n] at ``columns`` [..., m], and 0 where the word is on another rank."""
    if not values.shape[-1]:
        return values.new_zeros(columns.shape)
    return torch.where(here, values.gather(-1, columns.clamp(max=values.shape[-1] - 1)), 0)


class _WithSlopes(torch.autograd.Function):
    """Mixed, CE and T² · KL of every token, all [s, b]; keeps the gradient of mixed by the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, work: _Full | _TopK) -> tuple[Tensor, Tensor, Tensor]:
        mixture, count = work.mixture, work.shard.count(logits.shape[-1])
        lm, divergence = _wide(logits.new_empty(2, *logits.shape[:-1]))
        slopes = torch.zeros_like(logits) if count < logits.shape[-1] else torch.empty_like(logits)
        for part in _parts(logits):
            lm[part], divergence[part], slopes[part, :, :count] = work.of(logits, part)
        distillation = divergence.mul_(mixture.temperature**2)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(lm, distillation)
        return (1 - mixture.alpha) * lm + mixture.alpha * distillation, lm, distillation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        for part in _parts(slopes):
            slopes[part] = slopes[part] * gradients[0][part].unsqueeze(-1)
        return slopes, None


@dataclass(frozen=True)
class _Full:
    """With the teacher's whole distribution."""

    labels: Tensor  # [s, b]
    teacher: Tensor  # [s, b, V / TP]
    normalized: bool
    mixture: Mixture
    shard: Shard

    def of(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """CE and KL of a part, and the slopes of its mixed loss by this rank's logits of words. Collective."""
        alpha, temperature = self.mixture.alpha, self.mixture.temperature
        count = self.shard.count(logits.shape[-1])
        columns, here = _places(self.labels[part].unsqueeze(-1), logits.shape[-1], count, self.shard)
        plain = _normalized(logits[part], self.shard)
        lm = -self.shard.sum(_at(plain, columns, here).squeeze(-1))
        if self.normalized:
            teacher = _wide(self.teacher[part, :, :count])
        else:
            teacher = _normalized(self.teacher[part], self.shard)
        log_q = _softened(plain, temperature, self.shard)
        log_p = _softened(teacher, temperature, self.shard)
        divergence, slope, q = _divergence(log_q, log_p, self.mixture, self.shard)
        slope *= alpha * temperature
        if alpha != 1:
            slope.add_(q if temperature == 1 else plain.exp_(), alpha=1 - alpha)
        return lm, divergence, _minus(slope, columns, 1 - alpha)


@dataclass(frozen=True)
class _TopK:
    """With k words and the rest."""

    labels: Tensor  # [s, b]
    ids: Tensor  # [s, b, k]
    teacher: Tensor  # [s, b, k + 1], log-probabilities
    mixture: Mixture
    shard: Shard

    def of(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """As that of ``_Full``."""
        alpha, temperature = self.mixture.alpha, self.mixture.temperature
        count = self.shard.count(logits.shape[-1])
        wanted = torch.cat([self.ids[part], self.labels[part].unsqueeze(-1)], dim=-1)  # [s, b, k + 1]
        columns, here = _places(wanted, logits.shape[-1], count, self.shard)
        top = columns[..., :-1]
        plain = _normalized(logits[part], self.shard)
        known = self.shard.sum(_at(plain, columns, here))
        others = _others(plain, top)
        rest = self.shard.log_sum_exp(_log_sum_exp(others)).unsqueeze(-1)
        # What follows, up to the slopes of events, is the same on every tensor-parallel rank.
        events = torch.cat([known[..., :-1], rest], dim=-1)  # [s, b, k + 1]
        least = torch.finfo(events.dtype).min / 4  # of an event that cannot be: finite, so that differences are
        log_q, log_p = (
            (each.to(events.dtype).clamp(min=least) / temperature).log_softmax(-1)
            for each in (events, self.teacher[part])
        )
        divergence, slopes, _ = _divergence(log_q, log_p, self.mixture, Shard(self.shard.words))
        slopes *= alpha * temperature
        # A word of the rest has its share of the rest's slope; the k words have their own.
        slope = others.sub_(rest.clamp(min=least)).exp_().mul_(slopes[..., -1:])
        if alpha != 1:
            slope.add_(plain.exp_(), alpha=1 - alpha)
        slope = torch.nn.functional.pad(slope, (0, 1)).scatter_add_(-1, top, slopes[..., :-1])[..., :-1]
        return -known[..., -1], divergence, _minus(slope, columns[..., -1:], 1 - alpha)


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
