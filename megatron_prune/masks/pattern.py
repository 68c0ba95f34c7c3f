"""What a mask may be and how it is stored: sparsity patterns, and bits packed eight to a byte.

A pattern is ``unstructured``, or ``N:M``, which keeps N of every M consecutive inputs of a row. Of packed bits, bit k
of byte j is input 8·j + k, and each row is zero-padded to whole bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy
import torch

from megatron_prune.errors import UsageError

LARGEST_M = 32
_ALLOWED = f"unstructured, or N:M with 0 < N < M <= {LARGEST_M}"


@dataclass(frozen=True)
class Pattern:
    """``unstructured`` (both None), or N of every M consecutive inputs kept."""

    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if self.n is None and self.m is None:
            return
        if self.n is None or self.m is None or not 0 < self.n < self.m <= LARGEST_M:
            raise UsageError("--pattern", got=f"{self.n}:{self.m}", expected=_ALLOWED)

    @staticmethod
    def parse(text: str) -> Pattern:
        """Parse ``unstructured`` or ``N:M``; raises UsageError for anything else."""
        if text == "unstructured":
            return Pattern()
        found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
        if found is None:
            raise UsageError("--pattern", got=text, expected=_ALLOWED)
        return Pattern(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return "unstructured" if self.m is None else f"{self.n}:{self.m}"

    @property
    def ratio(self) -> float | None:
        """The fraction removed; None for ``unstructured``."""
        return None if self.m is None or self.n is None else 1 - self.n / self.m

    def divides(self, inputs: int) -> bool:
        """True if a row of ``inputs`` weights consists of whole groups."""
        return self.m is None or inputs % self.m == 0

    def check_inputs(self, name: str, inputs: int) -> None:
        """Raises UsageError if M does not divide the inputs of the matrix ``name``."""
        if not self.divides(inputs):
            raise UsageError("--pattern", got=self, expected="an M that divides the inputs of every matrix",
                             why=f"{name} has {inputs}")  # fmt: skip

    def broken(self, kept: torch.Tensor) -> tuple[int, int] | None:
        """The first (row, group) of ``kept`` (bool [rows, in]) that does not keep exactly N of its M inputs; None
        if there is none, and for unstructured masks."""
        if self.n is None or self.m is None:
            return None
        inputs = kept.cpu().view(torch.uint8).numpy()
        counts = inputs[:, :: self.m].copy()  # [rows, in / M]
        for place in range(1, self.m):
            counts += inputs[:, place :: self.m]
        wrong = numpy.argwhere(counts != self.n)
        return None if len(wrong) == 0 else (int(wrong[0, 0]), int(wrong[0, 1]))


def pack(kept: torch.Tensor) -> torch.Tensor:
    """bool [rows, in] → uint8 [rows, ceil(in / 8)], on the CPU."""
    return torch.from_numpy(numpy.packbits(kept.cpu().numpy(), axis=1, bitorder="little"))


def unpack(packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Inputs [start, stop) of uint8 [rows, bytes] → bool [rows, stop - start]."""
    first = start // 8
    some = packed[:, first : bytes_of(stop)].numpy()
    bits = numpy.unpackbits(some, axis=1, count=stop - 8 * first, bitorder="little")
    return torch.from_numpy(bits[:, start - 8 * first :]).view(torch.bool)


def bytes_of(inputs: int) -> int:
    """Bytes of a packed row."""
    return -(-inputs // 8)
