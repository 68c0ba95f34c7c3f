"""The lowest scores of each row, or of each group of M consecutive inputs: exact, without sorting.

Scores are fp32 and never negative. Among equal scores the lower index stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_prune.errors import CheckpointError
from megatron_prune.methods.allocation import SCORE_BINS

_PAIRS = 1 << 18  # compared at a time: fits a core's cache
_INFINITE_BIN = 0x7F800000 >> 16


def lowest_in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the ``count`` lowest scores of each row; [rows, in] both."""
    refuse_infinite(scores)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values  # [rows, 1]
    chosen = scores <= threshold
    excess = chosen.sum(1) - count  # [rows]
    tied = excess.nonzero().flatten()  # only rows where more scores equal the threshold than are to be removed
    if len(tied):
        equal = scores[tied] == threshold[tied]  # [tied, in]
        stay = equal & (equal.cumsum(1) <= excess[tied, None])
        chosen[tied] &= ~stay
    return chosen


def lowest_in_groups(scores: torch.Tensor, count: int, m: int) -> torch.Tensor:
    """True for the ``count`` lowest scores of every ``m`` consecutive ones of a row; [rows, in] both."""
    refuse_infinite(scores)
    groups = scores.reshape(-1, m)  # [rows * in / m, m]
    chosen = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    step = _PAIRS // (m * m)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        chosen[part] = lowest_of_planes(groups[part].t().contiguous(), count).t()
    return chosen.view(scores.shape)


def lowest_of_planes(planes: torch.Tensor, count: int) -> torch.Tensor:
    """True for the ``count`` lowest along the first dimension; [m, groups] both, m at most 255.

    Every pair of a group is compared: for small groups that is far cheaper than any sort.
    """
    m = len(planes)
    # The bits of non-negative floats sort like the floats; the index makes every key unique.
    index = torch.arange(m, device=planes.device)[:, None]
    keys = planes.view(torch.int32).long().mul_(m).sub_(index)  # [m, groups]
    before = keys[:, None] < keys  # [m, m, groups]: the first is removed before the second
    return before.view(torch.uint8).sum(0, dtype=torch.uint8) < count


def refuse_infinite(scores: torch.Tensor) -> None:
    """CheckpointError if a score is infinite or NaN: weights or inputs are broken."""
    if not bool(scores.isfinite().all()):
        _refuse()


def _refuse() -> None:
    raise CheckpointError("weights or the inputs they see are not finite: they cannot be ranked")


def histogram(scores: torch.Tensor) -> torch.Tensor:
    """How many scores have each value of the upper 16 bits of their fp32 representation: int64 [SCORE_BINS]."""
    upper = (scores.float().flatten().view(torch.int32) >> 16) & (SCORE_BINS - 1)  # a NaN may have a sign
    return torch.bincount(upper, minlength=SCORE_BINS)


def filled_bins(counts: torch.Tensor) -> list[list[int]]:
    """The bins of a ``histogram`` that are not empty, with their counts; CheckpointError if scores were not finite."""
    filled = counts.nonzero().flatten()
    if len(filled) and int(filled[-1]) >= _INFINITE_BIN:
        _refuse()
    return torch.stack((filled, counts[filled]), dim=1).tolist()


@contextmanager
def full_precision() -> Iterator[None]:
    """Run fp32 matrix products in fp32, without TF32 or bf16, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Which rows of a matrix this rank holds, and the lowest scores over all ranks' rows, by radix selection. The bits of
# a non-negative float sort like the float, so a histogram of the first digit, summed over ranks, locates the threshold.
# Histograms of the second and third digit refine it. Ranks exchange no scores and sort nothing, so any number of
# processes finds the same bits.


_DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, width) of the 31 bits of a non-negative float
_INFINITE = 0x7F800000 >> 20  # first digit of infinity


@dataclass(frozen=True)
class Rows:
    """This rank's consecutive rows of a matrix: from ``first``, out of ``total``.

    Ranks of ``group`` hold different rows, in rank order. Without a group this process holds all rows.
    """

    first: int
    total: int
    group: torch.distributed.ProcessGroup | None = None

    @staticmethod
    def all(total: int) -> Rows:
        """All rows of a matrix, in one process."""
        return Rows(0, total)

    def lowest(self, scores: torch.Tensor, count: int) -> torch.Tensor:
        """True for the ``count`` lowest of all ranks' ``scores`` (fp32, never negative) [rows, columns].

        Exact; among equal scores the lower index, row by row over the whole matrix, is not chosen.
        Collective over the group: every rank passes the same ``count`` and number of columns.
        """
        if count == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        bits = scores.view(torch.int32)
        # Their order does not matter here, so a transposed block is not copied.
        left = (bits if bits.is_contiguous() else bits.t()).flatten()
        threshold = equal = 0
        for shift, width in _DIGITS:
            digits = (left >> shift) & ((1 << width) - 1)
            counts = torch.bincount(digits, minlength=1 << width)  # [2^width]
            if self.group is not None:
                torch.distributed.all_reduce(counts, group=self.group)
            if shift == _DIGITS[0][0] and bool(counts[_INFINITE:].any()):
                _refuse()
            upto = counts.cumsum(0)
            digit = int(torch.searchsorted(upto, count))  # of the count-th lowest
            equal = int(counts[digit])
            count -= int(upto[digit]) - equal
            threshold |= digit << shift
            left = left[digits == digit]
        if count == equal:
            return bits <= threshold
        chosen = bits < threshold
        places = (bits == threshold).nonzero()  # [own, 2], row by row
        last = len(places) - self._share(count, len(places), scores.device)
        chosen[places[last:, 0], places[last:, 1]] = True
        return chosen

    def _share(self, count: int, own: int, device: torch.device) -> int:
        """How many of its ``own`` tied scores this rank chooses, so that all ranks choose the last ``count``."""
        if self.group is None:
            return count
        mine = torch.tensor([own], device=device)
        everybody = [torch.empty_like(mine) for _ in range(self.group.size())]
        torch.distributed.all_gather(everybody, mine, group=self.group)
        higher = sum(int(n) for n in everybody[self.group.rank() + 1 :])
        return min(own, max(0, count - higher))
