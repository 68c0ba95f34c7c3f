"""What goes of a matrix that passes by in blocks of rows, as often as it takes: exact, in bounded memory, on the CPU.

Scores are bf16, fp16 or fp32 and never negative, so that their bits have their order. The lowest of a whole matrix are
found by radix selection, as in ``rows.py``: a pass over the matrix makes a histogram of the scores' first digit, which
says where the last one to go lies; where scores have another digit, one more pass counts that among those. Between
equal scores the lower index stays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy
import torch

from megatron_prune.errors import CheckpointError
from megatron_prune.methods import Sparsity

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by the bytes of a score
_DIGITS = {2: ((0, 15),), 4: ((16, 15), (0, 16))}  # (shift, width) of each, the sign left out


class Choice(ABC):
    """Which weights of one matrix go, by their scores.

        while choice.counts:
            for scores in blocks(): choice.count(scores)
            choice.narrow()
        for scores in blocks(): removed = choice.lowest(scores)

    ``blocks()`` are the same every time: consecutive rows [rows, in], from the first to the last.
    """

    counts: bool  # another pass must be counted before the choice is made

    @abstractmethod
    def count(self, scores: torch.Tensor) -> None:
        """See a block. CheckpointError where scores are not finite."""

    @abstractmethod
    def narrow(self) -> None:
        """All blocks were seen."""

    @abstractmethod
    def lowest(self, scores: torch.Tensor) -> torch.Tensor:
        """True for what goes of the next block, bool [rows, in]."""


def choice(sparsity: Sparsity, size: int) -> Choice:
    """The choice that ``sparsity`` asks for in a matrix of ``size`` weights."""
    n, m = sparsity.pattern.n, sparsity.pattern.m
    return LowestOfAll(sparsity.removed(size)) if n is None or m is None else LowestInGroups(m - n, m)


class LowestOfAll(Choice):
    """The ``count`` lowest scores of the whole matrix."""

    def __init__(self, count: int) -> None:
        self.counts = count > 0
        self._go = count  # of the scores that begin with ``_prefix``; all below it go
        self._stay = 0  # of the scores that are the threshold, and were not shown to ``lowest`` yet
        self._prefix = 0  # the digits of the threshold that are known
        self._known = 0  # how many these are
        self._digits: tuple[tuple[int, int], ...] = ()
        self._histogram: torch.Tensor | None = None

    def count(self, scores: torch.Tensor) -> None:
        bits = _bits(scores)
        self._digits = _DIGITS[scores.itemsize]
        shift, width = self._digits[self._known]
        if self._known == 0:
            digits = bits >> shift if shift else bits
        else:
            digits = bits[bits >> (shift + width) == self._prefix] & ((1 << width) - 1)
        histogram = torch.bincount(torch.from_numpy(digits.ravel()), minlength=1 << width)  # [2^width]
        if self._known == 0 and bool(histogram[_infinite(scores.dtype) >> shift :].any()):
            _refuse()
        self._histogram = histogram if self._histogram is None else self._histogram.add_(histogram)

    def narrow(self) -> None:
        assert self._histogram is not None
        upto = self._histogram.cumsum(0)
        digit = int(torch.searchsorted(upto, self._go))
        equal = int(self._histogram[digit])
        self._go -= int(upto[digit]) - equal
        self._prefix = self._prefix << self._digits[self._known][1] | digit
        self._stay = equal - self._go
        self._known, self._histogram = self._known + 1, None
        self.counts = self._known < len(self._digits)

    def lowest(self, scores: torch.Tensor) -> torch.Tensor:
        bits = _bits(scores)
        if not self._known:  # nothing goes
            return torch.zeros(scores.shape, dtype=torch.bool)
        if not self._stay:
            return torch.from_numpy(bits <= self._prefix)
        removed, equal = bits < self._prefix, numpy.flatnonzero(bits == self._prefix)
        removed.ravel()[equal[self._stay :]] = True
        self._stay = max(0, self._stay - len(equal))
        return torch.from_numpy(removed)


class LowestInGroups(Choice):
    """The ``count`` lowest of every ``m`` consecutive scores of a row; m divides the rows."""

    counts = False

    def __init__(self, count: int, m: int) -> None:
        self._count, self._m = count, m

    def count(self, scores: torch.Tensor) -> None:
        raise AssertionError("groups are chosen in one pass")

    narrow = count  # type: ignore[assignment]

    def lowest(self, scores: torch.Tensor) -> torch.Tensor:
        bits = _bits(scores)
        if int(bits.max(initial=0)) >= _infinite(scores.dtype):
            _refuse()
        planes = numpy.ascontiguousarray(bits.reshape(-1, self._m).T)  # [m, groups]
        before = numpy.zeros(planes.shape, numpy.uint8)  # how many of its group go before a score
        for first in range(self._m):
            for second in range(first + 1, self._m):
                goes = (planes[second] <= planes[first]).view(numpy.uint8)  # the second before the first
                before[first] += goes
                before[second] += goes ^ 1
        removed = numpy.ascontiguousarray((before < self._count).T)
        return torch.from_numpy(removed.reshape(bits.shape))


def _bits(scores: torch.Tensor) -> numpy.ndarray:
    """Scores as integers of the same order, without their signs: a NaN may have one."""
    bits = scores.view(_INTEGERS[scores.itemsize]).numpy()
    return bits & numpy.iinfo(bits.dtype).max


def _infinite(dtype: torch.dtype) -> int:
    """The bits of infinity: no finite score's are as high, and no NaN's lower."""
    return int(torch.tensor(torch.inf, dtype=dtype).view(_INTEGERS[dtype.itemsize]))


def _refuse() -> None:
    raise CheckpointError("its weights are not finite: they cannot be ranked")
