"""Prune by the weights alone: no model is built, matrices are read from the checkpoint and written as they pass by.

    for every linear of a block:  read its rows and count scores   (once or twice; N:M needs no count)
                                  read them again, choose, and write what is left, with its mask, to the scratch folder

Memory is bounded by a few blocks of rows and one block's packed masks, whatever the model's size. The source may lie in
any layout; a matrix is always whole here, so that the result is the same for any number of ranks. These share out the
blocks, and leave when theirs are done; the first waits for all, and finds them by their files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy
import torch

from megatron_prune.checkpoint.layout import layer_name
from megatron_prune.checkpoint.memory import keep_freed_memory
from megatron_prune.errors import CheckpointError
from megatron_prune.masks import write_single
from megatron_prune.methods import WeightMethod
from megatron_prune.sparse.blocks import choice
from megatron_prune.sparse.matrices import SUFFIXES, Matrix, Run, matrices, runs
from megatron_prune.sparse.progress import Progress
from megatron_prune.sparse.scratch import Pruned, Scratch
from megatron_prune.sparse.task import Sums, Task

RECORD_BYTES = 8 << 20  # of rows that are read and written at a time
CHUNK_BYTES = 1 << 20  # of rows that are worked on at a time: a core's cache holds them and what is made of them


def run(task: Task, params_dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> None:
    """Prune every chosen block and leave weights and masks in the scratch folder of ``task.save``.

    ``params_dtype`` is the type that the model computes in: weights are rounded to it, and back to that they are stored
    in. Every one of ``ranks`` calls this; what the first returns from is complete.
    """
    keep_freed_memory()
    scratch = Scratch(task.save)
    if rank == 0:
        scratch.open(task.question)
    done = scratch.done(task.layers) if rank == 0 else []
    if ranks > 1:
        done = _from_first(done)
        scratch.refuse_unseen()
    with Progress(task.request.name, len(task.layers), shown=rank == 0) as progress:
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
    if ranks > 1:
        torch.distributed.destroy_process_group()


def _from_first(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first rank's value, on all of them. Whoever has it knows that the scratch folder is open."""
    torch.distributed.init_process_group("gloo")
    held = [done]
    torch.distributed.broadcast_object_list(held, src=0)
    torch.distributed.barrier()  # or a first rank without work might leave before the others have heard it
    return held[0]


def _prune_block(task: Task, layer: int, params_dtype: torch.dtype, scratch: Scratch) -> None:
    began = time.monotonic()
    linears = [_Linear(task, layer, module, params_dtype) for module in task.request.modules]
    scratch.write(layer, 0, (piece for linear in linears for piece in linear.prune()))
    found = [sums.row() for linear in linears for sums in linear.sums()]
    scratch.finish(layer, 1, {"layer": layer, "seconds": time.monotonic() - began, "matrices": found})


class _Linear:
    """One linear of a block. ``prune`` is to be run to its end, then ``sums`` says what it did."""

    def __init__(self, task: Task, layer: int, module: str, params_dtype: torch.dtype) -> None:
        assert isinstance(task.request.method, WeightMethod)
        self._method = task.request.method
        self._parent, self._name = task.parent, layer_name(layer, SUFFIXES[module])
        self._stored = self._parent.spec(self._name).dtype
        # fp32 holds every bf16 and fp16 number: choosing among these themselves takes half the memory and one count.
        exact = params_dtype == torch.float32 and self._stored.itemsize == 2
        self._dtype = self._stored if exact else params_dtype
        shape, sparsity = self._parent.shape, task.request.sparsity(module)
        self._runs = runs(module, shape)
        self._matrices = matrices(module, shape)
        self._choices = {matrix: choice(sparsity, matrix.rows * matrix.inputs) for matrix in self._matrices}
        self._seeds = {matrix: (task.request.seed or 0, layer, matrix.number) for matrix in self._matrices}
        self._removed = dict.fromkeys(self._matrices, 0)
        self._lost = dict.fromkeys(self._matrices, 0.0)  # tr(ΔW·ΔWᵀ)
        self._held = dict.fromkeys(self._matrices, 0.0)  # tr(W·Wᵀ)

    @torch.no_grad()
    def prune(self) -> Pruned:
        """What is left of the rows, in their order, with their masks. CheckpointError where they cannot be ranked."""
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

    def _count(self, run: Run) -> None:
        for start, weight in self._rows(run, CHUNK_BYTES):
            scores = self._method.scores(weight, run.first + start - run.start, self._seeds[run.matrix])
            self._choices[run.matrix].count(scores)

    def _choose(self, matrix: Matrix, first: int, weight: torch.Tensor) -> torch.Tensor:
        """Zero what goes of the matrix's rows from ``first`` on, in place; their mask."""
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

    def _rows(self, run: Run, most: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows of a run, at most that many bytes at a time: (the first's number, [rows, in])."""
        step = max(1, most // (run.matrix.inputs * self._dtype.itemsize))
        for start in range(run.start, run.stop, step):
            yield start, self._parent.read_rows(self._name, start, min(start + step, run.stop)).to(self._dtype)




def _zero(weight: torch.Tensor, kept: torch.Tensor) -> None:
    """Make +0 of what is not kept, in place; by products of bits, since no branch can be foretold."""
    bits = weight.view(_INTEGERS[weight.itemsize]).numpy()
    numpy.multiply(bits, kept.numpy(), out=bits)


def _squares(values: torch.Tensor) -> float:
    """The sum of squares of fp32 numbers, in float64."""
    return float(values.square_().numpy().sum(dtype=numpy.float64))


def _masks(task: Task, scratch: Scratch) -> Iterator[tuple[str, Iterator[torch.Tensor], str]]:
    """The masks of what was pruned, and the parent's elsewhere, as ``write_single`` takes them."""
    held, patterns = task.held_masks(), task.patterns
    if held is not None:
        for name, entry in held.entries.items():
            if name not in patterns:
                yield name, held.row_blocks(name), entry.pattern
    for layer in task.layers:
        for module in task.request.modules:
            name = layer_name(layer, SUFFIXES[module])
            yield name, scratch.mask_rows(layer, name), patterns[name]
