"""Which rows of a matrix this rank holds, and the lowest scores among all ranks' rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed


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
        raise NotImplementedError
