"""Which rows of a matrix this rank holds, and the lowest scores among all ranks' rows.

The lowest of a whole matrix are found by radix selection: a score that is not negative has the order
of its bits, so a histogram of their first digit, summed over ranks, says where the last score to go
lies, then one of the second digit among those, and one of the third. No rank sees another's scores,
and nothing is sorted, so that one process and many find the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch

from megatron_prune.errors import CheckpointError

_DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, width) of the 31 bits of a float that is not negative
_INFINITE = 0x7F800000 >> 20  # first digit of the lowest that is not finite


@dataclass(frozen=True)
class Rows:
    """This rank's consecutive rows of a matrix: from ``first``, of ``total``.

    Every rank of ``group`` holds other rows, higher ranks of it higher ones. Without a group this process
    holds all of them.
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

        Exact; between equal scores the lower index, row by row over the whole matrix, is not chosen.
        Collective over the group: every rank gives the same ``count`` and number of columns.
        """
        if count == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        bits = scores.view(torch.int32)
        # Their order does not matter here, and a transposed block need not be copied.
        left = (bits if bits.is_contiguous() else bits.t()).flatten()
        threshold = equal = 0
        for shift, width in _DIGITS:
            digits = (left >> shift) & ((1 << width) - 1)
            histogram = torch.bincount(digits, minlength=1 << width)  # [2^width]
            if self.group is not None:
                torch.distributed.all_reduce(histogram, group=self.group)
            if shift == _DIGITS[0][0] and bool(histogram[_INFINITE:].any()):
                raise CheckpointError("weights or the inputs they see are not finite: they cannot be ranked")
            upto = histogram.cumsum(0)
            digit = int(torch.searchsorted(upto, count))  # of the count-th lowest
            equal = int(histogram[digit])
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
        """How many of its ``own`` equal scores this rank chooses so that all choose the last ``count``."""
        if self.group is None:
            return count
        mine = torch.tensor([own], device=device)
        everybody = [torch.empty_like(mine) for _ in range(self.group.size())]
        torch.distributed.all_gather(everybody, mine, group=self.group)
        higher = sum(int(n) for n in everybody[self.group.rank() + 1 :])
        return min(own, max(0, count - higher))
