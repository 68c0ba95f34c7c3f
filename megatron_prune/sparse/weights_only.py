"""Prune by the weights alone, without a model: stream matrices from the checkpoint and write them back pruned.

    for every linear of a block:  read its rows and count scores   (once or twice; N:M needs no count)
                                  read them again, choose, and write the pruned rows and mask to the scratch folder

Memory is bounded by a few blocks of rows and one block's packed masks, whatever the model's size. The source may have
any layout. A matrix is always whole here, so the result does not depend on the number of ranks. Ranks divide the
blocks and return when theirs are done; the first waits for all blocks by watching their files.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy
import torch

from megatron_prune.checkpoint.layout import layer_name
from megatron_prune.checkpoint.parallel import keep_freed_memory
from megatron_prune.engine import network
from megatron_prune.errors import CheckpointError
from megatron_prune.masks import write_single
from megatron_prune.methods.allocation import GlobalRanking
from megatron_prune.methods.base import Sparsity, WeightMethod
from megatron_prune.methods.selection import filled_bins, histogram
from megatron_prune.sparse.matrices import SUFFIXES, Matrix, RowRun, matrices, runs
from megatron_prune.sparse.request import SparsifyTask, Sums
from megatron_prune.sparse.result import allocated
from megatron_prune.sparse.scratch import Progress, Pruned, Scratch

RECORD_BYTES = 8 << 20  # of rows read and written at a time
MEETING = timedelta(hours=2)  # each rank has read its part of the parent before: some disks are slower than others
CHUNK_BYTES = 1 << 20  # of rows processed at a time: they and the intermediate results fit a core's cache


def run(task: SparsifyTask, params_dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> None:
    """Prune every chosen block and leave weights and masks in the scratch folder of ``task.save``.

    ``params_dtype`` is the type that the model computes in: weights are rounded to it, then to the type that they are
    stored in. Each of ``ranks`` calls this; the work is complete when the call returns on the first.
    """
    keep_freed_memory()
    scratch = Scratch(task.save)
    if rank == 0:
        scratch.open(task.question)
    done = scratch.done(task.layers) if rank == 0 else []
    if ranks > 1:
        done = _from_first(done)
        scratch.refuse_unseen()
    if isinstance(task.request.allocation, GlobalRanking):
        task = _rank(task, params_dtype, scratch, rank, ranks)
    with Progress(task.request.name, len(task.layers)) as progress:
        for row in done:
            progress.block(row, resumed=True)
        finished = {row["layer"] for row in done}
        for layer in [layer for layer in task.layers if layer not in finished][rank::ranks]:
            _prune_block(task, layer, params_dtype, scratch)
            for row in scratch.done(task.layers) if rank == 0 else ():
                progress.block(row)
        if rank == 0:
            scratch.wait_for_blocks(task.layers, progress.block)
    if rank == 0:
        write_single(scratch.masks, task.parent.shape, _masks(task, scratch))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _from_first(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first rank's value, on all ranks. When it arrives, the scratch folder is open."""
    if not torch.distributed.is_initialized():  # it is where a model was run to allocate ratios
        torch.distributed.init_process_group("gloo", timeout=MEETING)
        network.refuse_strangers()
    held = [done]
    torch.distributed.broadcast_object_list(held, src=0)
    torch.distributed.barrier()  # a first rank without work might otherwise return before the others have the value
    return held[0]


def _rank(task: SparsifyTask, params_dtype: torch.dtype, scratch: Scratch, rank: int, ranks: int) -> SparsifyTask:
    """``task`` with every layer's ratio, by one ranking of all magnitudes. Layers that an earlier attempt counted are
    not read again; ranks divide the layers, and each waits for all."""
    if scratch.counts(task.layers) is None:
        with Progress("counting", len(task.layers)) as progress:
            for layer in task.layers[rank::ranks]:
                if scratch.counts([layer]) is None:
                    progress.counted(scratch.keep_counts(layer, {"scores": _magnitudes(task, layer, params_dtype)}))
            scratch.wait_for_counts(task.layers, progress.counted)
    return allocated(task, scratch)


def _magnitudes(task: SparsifyTask, layer: int, params_dtype: torch.dtype) -> list[list[int]]:
    """The filled bins of a layer's |W_ij|. CheckpointError if weights are not finite."""
    names = [layer_name(layer, SUFFIXES[module]) for module in task.request.modules_of(task.parent.shape, layer)]
    counts = torch.zeros((), dtype=torch.int64)
    for rows in (rows for name in names for rows in task.parent.row_blocks(name)):
        counts = counts + histogram(rows.to(params_dtype).abs())
    try:
        return filled_bins(counts)
    except CheckpointError as error:
        raise CheckpointError(f"layer {layer}: {error}") from error


def _prune_block(task: SparsifyTask, layer: int, params_dtype: torch.dtype, scratch: Scratch) -> None:
    began = time.monotonic()
    modules = task.request.modules_of(task.parent.shape, layer)
    linears = [_Linear(task, layer, module, params_dtype) for module in modules]
    scratch.write(layer, 0, (piece for linear in linears for piece in linear.prune()))
    found = [sums.row() for linear in linears for sums in linear.sums()]
    scratch.finish(layer, 1, {"layer": layer, "seconds": time.monotonic() - began, "matrices": found})


class _Linear:
    """One linear of a block. Exhaust ``prune``; ``sums`` then says what it did."""

    def __init__(self, task: SparsifyTask, layer: int, module: str, params_dtype: torch.dtype) -> None:
        assert isinstance(task.request.method, WeightMethod)
        self._method = task.request.method
        self._parent, self._name = task.parent, layer_name(layer, SUFFIXES[module])
        self._stored = self._parent.spec(self._name).dtype
        # Choosing among bf16 or fp16 numbers themselves takes half the memory of fp32 and one count.
        exact = params_dtype == torch.float32 and self._stored.itemsize == 2
        self._dtype = self._stored if exact else params_dtype
        shape, sparsity = self._parent.shape.of_layer(layer), task.request.sparsity(layer, module)
        self._runs = runs(module, shape)
        self._matrices = matrices(module, shape)
        self._choices = {matrix: choice(sparsity, matrix.rows * matrix.inputs) for matrix in self._matrices}
        self._seeds = {matrix: (task.request.seed or 0, layer, matrix.number) for matrix in self._matrices}
        self._removed = dict.fromkeys(self._matrices, 0)
        self._lost = dict.fromkeys(self._matrices, 0.0)  # tr(ΔW·ΔWᵀ)
        self._held = dict.fromkeys(self._matrices, 0.0)  # tr(W·Wᵀ)

    @torch.no_grad()
    def prune(self) -> Pruned:
        """The pruned rows, in order, with their masks. CheckpointError if they cannot be ranked."""
        try:
            while any(choice.counts for choice in self._choices.values()):
                for run in self._runs:
                    if self._choices[run.matrix].counts:
                        self._count(run)
                for choice in self._choices.values():
                    if choice.counts:
                        choice.narrow()
            for run in self._runs:
                for start, weight in self._rows(run, RECORD_BYTES):
                    kept = self._choose(run.matrix, run.first + start - run.start, weight)
                    yield self._name, (start, 0), weight.to(self._stored), kept
        except CheckpointError as error:
            raise CheckpointError(f"{self._name}: {error}") from error

    def sums(self) -> list[Sums]:
        found = []
        for matrix in self._matrices:
            lost, held = self._lost[matrix], self._held[matrix]
            found.append(Sums(matrix, self._removed[matrix], lost / held if 0 < held < math.inf else None))
        return found

    def _count(self, run: RowRun) -> None:
        for start, weight in self._rows(run, CHUNK_BYTES):
            scores = self._method.scores(weight, run.first + start - run.start, self._seeds[run.matrix])
            self._choices[run.matrix].count(scores)

    def _choose(self, matrix: Matrix, first: int, weight: torch.Tensor) -> torch.Tensor:
        """Zero the removed weights of the matrix's rows from ``first`` on, in place; returns their mask."""
        kept = torch.empty(weight.shape, dtype=torch.bool)
        step = max(1, CHUNK_BYTES // weight[0].nbytes)
        for start in range(0, len(weight), step):
            chunk, stays = weight[start : start + step], kept[start : start + step]
            removed = self._choices[matrix].lowest(self._method.scores(chunk, first + start, self._seeds[matrix]))
            torch.logical_not(removed, out=stays)
            before = chunk.to(torch.float32, copy=True)
            _zero(chunk, stays)
            after = chunk.to(self._stored).float()
            self._removed[matrix] += int(numpy.count_nonzero(removed.numpy()))
            self._lost[matrix] += _squares(before - after)
            self._held[matrix] += _squares(before)
        return kept

    def _rows(self, run: RowRun, most: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of a run, at most ``most`` bytes at a time: (number of the first row, [rows, in])."""
        step = max(1, most // (run.matrix.inputs * self._dtype.itemsize))
        for start in range(run.start, run.stop, step):
            yield start, self._parent.read_rows(self._name, start, min(start + step, run.stop)).to(self._dtype)


def _zero(weight: torch.Tensor, kept: torch.Tensor) -> None:
    """Set removed weights to +0 in place, by bit products: the branches would be unpredictable."""
    bits = weight.view(_INTEGERS[weight.itemsize]).numpy()
    numpy.multiply(bits, kept.numpy(), out=bits)


def _squares(values: torch.Tensor) -> float:
    """The sum of squares of fp32 numbers, in float64."""
    return float(values.square_().numpy().sum(dtype=numpy.float64))


def _masks(task: SparsifyTask, scratch: Scratch) -> Iterator[tuple[str, Iterator[torch.Tensor], str]]:
    """The masks of the pruned weights, and the parent's elsewhere, in the form that ``write_single`` takes."""
    held, patterns = task.held_masks(), task.patterns
    if held is not None:
        for name, entry in held.entries.items():
            if name not in patterns:
                yield name, held.row_blocks(name), entry.pattern
    for layer in task.layers:
        for module in task.request.modules_of(task.parent.shape, layer):
            name = layer_name(layer, SUFFIXES[module])
            yield name, scratch.mask_rows(layer, name), patterns[name]


# Choosing in a matrix that is streamed in blocks of rows, as often as needed: exact, in bounded memory, on the CPU.
# The bits of the scores (bf16, fp16 or fp32, never negative) sort like the scores. Radix selection, as in
# ``methods/selection.py``: one pass over the matrix makes a histogram of the first digit, which locates the
# threshold; fp32 scores need a second pass for the second digit. Among equal scores the lower index stays.


_INTEGERS = {2: torch.int16, 4: torch.int32}  # by the bytes of a score
_DIGITS = {2: ((0, 15),), 4: ((16, 15), (0, 16))}  # (shift, width) of each, without the sign


class BlockChoice(ABC):
    """Which weights of one matrix are removed, by their scores.

        while choice.counts:
            for scores in blocks(): choice.count(scores)
            choice.narrow()
        for scores in blocks(): removed = choice.lowest(scores)

    ``blocks()`` are the same every time: consecutive rows [rows, in], from the first to the last.
    """

    counts: bool  # another counting pass is needed before the choice

    @abstractmethod
    def count(self, scores: torch.Tensor) -> None:
        """Count a block. CheckpointError if scores are not finite."""

    @abstractmethod
    def narrow(self) -> None:
        """End a pass: all blocks were counted."""

    @abstractmethod
    def lowest(self, scores: torch.Tensor) -> torch.Tensor:
        """True for the removed weights of the next block, bool [rows, in]."""


def choice(sparsity: Sparsity, size: int) -> BlockChoice:
    """The choice that implements ``sparsity`` in a matrix of ``size`` weights."""
    n, m = sparsity.pattern.n, sparsity.pattern.m
    return LowestOfAll(sparsity.removed(size)) if n is None or m is None else LowestInGroups(m - n, m)


class LowestOfAll(BlockChoice):
    """The ``count`` lowest scores of the whole matrix."""

    def __init__(self, count: int) -> None:
        self.counts = count > 0
        self._go = count  # to remove among scores that begin with ``_prefix``; all below are removed
        self._stay = 0  # to keep among scores equal to the threshold that ``lowest`` has not seen yet
        self._prefix = 0  # the known digits of the threshold
        self._known = 0  # their number
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
        if not self._known:  # nothing is removed
            return torch.zeros(scores.shape, dtype=torch.bool)
        if not self._stay:
            return torch.from_numpy(bits <= self._prefix)
        removed, equal = bits < self._prefix, numpy.flatnonzero(bits == self._prefix)
        removed.ravel()[equal[self._stay :]] = True
        self._stay = max(0, self._stay - len(equal))
        return torch.from_numpy(removed)


class LowestInGroups(BlockChoice):
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
        before = numpy.zeros(planes.shape, numpy.uint8)  # how many of the group are removed before a score
        for first in range(self._m):
            for second in range(first + 1, self._m):
                goes = (planes[second] <= planes[first]).view(numpy.uint8)  # the second is removed before the first
                before[first] += goes
                before[second] += goes ^ 1
        removed = numpy.ascontiguousarray((before < self._count).T)
        return torch.from_numpy(removed.reshape(bits.shape))


def _bits(scores: torch.Tensor) -> numpy.ndarray:
    """Scores as integers in the same order, without their signs, because a NaN may have one."""
    bits = scores.view(_INTEGERS[scores.itemsize]).numpy()
    return bits & numpy.iinfo(bits.dtype).max


def _infinite(dtype: torch.dtype) -> int:
    """The bits of infinity: above those of every finite score, at most those of a NaN."""
    return int(torch.tensor(torch.inf, dtype=dtype).view(_INTEGERS[dtype.itemsize]))


def _refuse() -> None:
    raise CheckpointError("its weights are not finite, expected ones that can be ranked: check the parent checkpoint")
