"""The lowest scores of each row, or of each group of M consecutive inputs: exact, and no sorting.

Scores are fp32 and never negative. Between equal scores the lower index is not chosen: it stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_prune.errors import CheckpointError

_CACHED = 1 << 18  # scores whose comparisons stay in a core's cache


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
    for start in range(0, len(groups), _CACHED // m):
        part = slice(start, start + _CACHED // m)
        chosen[part] = lowest_of_planes(groups[part].t().contiguous(), count).t()
    return chosen.view(scores.shape)


def lowest_of_planes(planes: torch.Tensor, count: int) -> torch.Tensor:
    """True for the ``count`` lowest along the first dimension; [m, groups] both, m at most 255.

    Every pair of a group is compared: for small groups that is far cheaper than any sort.
    """
    m = len(planes)
    # How many of its group go before it: at first, as if all scores were equal, all those of higher index.
    before = torch.arange(m - 1, -1, -1, dtype=torch.uint8, device=planes.device)[:, None].repeat(1, planes.shape[1])
    for k in range(m - 1):
        lower = (planes[k] < planes[k + 1 :]).view(torch.uint8)  # [m - 1 - k, groups]: k goes before these
        before[k + 1 :] += lower
        before[k] -= lower.sum(0, dtype=torch.uint8)
    return before < count


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
