"""Packed bits, eight inputs per byte: bit k of byte j is input 8·j + k. Each row is zero-padded to whole bytes."""

from __future__ import annotations

import numpy
import torch


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
