"""The lowest scores of each row, or of each group of M consecutive inputs: exact, and no sorting.

Scores are fp32 and never negative. Between equal scores the lower index is not chosen: it stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_prune.errors import CheckpointError

_PAIRS = 1 << 18  # compared at a time, which a core's cache holds


def lowest_in_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True for the ``count`` lowest scores of each row; [rows, in] both."""
    refuse_infinite(scores)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values  # [rows, 1]
    chosen = scores <= threshold
    excess = chosen.sum(1) - count  # [rows]
    tied = excess.nonzero().flatten()  # few rows: where more scores equal the threshold than may go
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
    # Bits of floats that are not negative have their order; the index makes every key another.
    index = torch.arange(m, device=planes.device)[:, None]
    keys = planes.view(torch.int32).long().mul_(m).sub_(index)  # [m, groups]
    before = keys[:, None] < keys  # [m, m, groups]: the first goes before the second
    return before.view(torch.uint8).sum(0, dtype=torch.uint8) < count


def refuse_infinite(scores: torch.Tensor) -> None:
    """CheckpointError where a score is infinite or no number: weights or inputs are broken."""
    if not bool(scores.isfinite().all()):
        raise CheckpointError("weights or the inputs they see are not finite: they cannot be ranked")


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 matrix products in fp32: no TF32, no bf16, whatever the process has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
