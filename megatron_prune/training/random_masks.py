"""Masks drawn at random with the pattern and the counts of others: what ``--random-masks SEED`` trains under.

An unstructured mask keeps in every row as many weights as the given one does, anywhere in the row; an
N:M mask as many in every group of M inputs. A row's draw depends on the seed, the weight's name and the
row's number alone, so every layout draws the same masks, each rank only the rows that it holds.
"""

from __future__ import annotations

import hashlib

import numpy
import torch

from megatron_prune.masks import Masks, Pattern

_AT_A_TIME = 1 << 22  # numbers drawn; 64 MB with their order
_PER_COUNT = 4  # numbers that Philox makes at each count


class RandomMasks(Masks):
    """Has the entries of ``masks``, and reads like them; which weights stay is drawn anew."""

    def __init__(self, masks: Masks, seed: int) -> None:
        super().__init__(masks.folder, masks.model, masks.entries, label=masks.label)
        self._seed = seed

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """A rectangle of a mask: bool [rows, columns] on the CPU, True is kept. Whole rows are drawn to get it."""
        out, inputs = self.entries[name].shape
        first, last, _ = rows.indices(out)
        group = Pattern.parse(self.entries[name].pattern).m or inputs
        step = max(1, _AT_A_TIME // inputs)
        parts = [torch.empty(0, len(range(*columns.indices(inputs))), dtype=torch.bool)]
        for start in range(first, last, step):
            stop = min(start + step, last)
            given = super().read(name, slice(start, stop))
            drawn = permuted(given.numpy(), self._numbers(name, start, stop), group)
            parts.append(torch.from_numpy(drawn)[:, columns])
        return torch.cat(parts)

    def _numbers(self, name: str, start: int, stop: int) -> numpy.ndarray:
        """Random uint64 [stop - start, inputs] of these rows, whichever rows are drawn together."""
        counts = -(-self.entries[name].shape[1] // _PER_COUNT)  # of Philox's counter in a row
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:16]
        philox = numpy.random.Philox(key=int.from_bytes(key, "little"), counter=start * counts)
        numbers = philox.random_raw((stop - start) * counts * _PER_COUNT)
        return numbers.reshape(stop - start, -1)[:, : self.entries[name].shape[1]]


def permuted(kept: numpy.ndarray, numbers: numpy.ndarray, group: int) -> numpy.ndarray:
    """Bool [rows, inputs] with as many True in every ``group`` consecutive inputs as ``kept`` has: where the
    largest of ``numbers`` [rows, inputs] are."""
    rows, inputs = kept.shape
    removed = group - kept.reshape(rows, inputs // group, group).sum(-1, keepdims=True)
    order = numbers.reshape(rows, inputs // group, group).argsort(-1)
    drawn = numpy.empty(order.shape, dtype=bool)  # [rows, inputs / group, group]
    numpy.put_along_axis(drawn, order, numpy.arange(group) >= removed, -1)
    return drawn.reshape(rows, inputs)
