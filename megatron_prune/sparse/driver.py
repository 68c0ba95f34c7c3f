"""Prune block by block: calibrate each block on the output of the pruned blocks before it, then prune it.

    for every block of the stage:  if it is to be pruned: run the stream through it, dense, while ``Inputs`` records;
                                   ``prune_block``; save the result in the scratch folder
                                   if a later block needs it: run the stream through it again, pruned

A stage waits until the previous stage has its windows ready, receives them, and later sends its own to the next
stage. A block that an earlier attempt finished is read back and only run. Methods that read no inputs take another
path, without a model (``weights_only.py``).

Where outliers or a ranking of all weights decide a layer's ratio, a pass through the dense model counts first. Every
stage writes its layers' counts to the scratch folder, and every rank reads all of them: so all compute the same ratios.
Where a search decides them, the same pass makes masks of every ratio (``level_masks.py``), and whole models with such
masks are run.
Import after ``runtime.start``: Megatron must be ready.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune import screen
from megatron_prune.checkpoint.layout import layer_name
from megatron_prune.engine import cpu, fp8, runtime, spec
from megatron_prune.masks import megatron as megatron_masks
from megatron_prune.methods import evolution
from megatron_prune.methods.allocation import OutlierWeighing
from megatron_prune.methods.evolution import Evolution, Found
from megatron_prune.methods.level_search import Levels
from megatron_prune.sparse.block import Inputs, Statistic, count_outliers, count_scores, prune_block
from megatron_prune.sparse.level_masks import LevelMasks
from megatron_prune.sparse.matrices import SUFFIXES
from megatron_prune.sparse.request import SparsifyTask
from megatron_prune.sparse.result import allocated
from megatron_prune.sparse.scratch import Progress, Pruned, Scratch
from megatron_prune.training.zeros import check_loaded


def run(args: argparse.Namespace, task: SparsifyTask) -> None:
    """Prune every chosen block and leave weights and masks in the scratch folder of ``task.save``. Collective.

    Destroys the process group before it returns.
    """
    model, scratch = _begin(args, task)
    known: list[Any] = [scratch.done(task.layers)] if args.rank == 0 else [None]
    torch.distributed.broadcast_object_list(known, src=0)
    if task.request.allocation is not None:
        task = _allocate(args, model, task, scratch)
    with Progress(task.request.name, len(task.layers)) as progress:
        for row in known[0]:
            progress.block(row, resumed=True)
        stage = _Stage(model, task, scratch, [row["layer"] for row in known[0]], progress)
        stage.run()
        scratch.wait_for_blocks(task.layers, progress.block)
    megatron_masks.save(scratch.masks, model, *stage.masks())
    torch.distributed.destroy_process_group()


def allocate(args: argparse.Namespace, task: SparsifyTask) -> SparsifyTask:
    """``task`` with every layer's ratio, for a method that reads no inputs itself. Collective.

    The process group stays.
    """
    model, scratch = _begin(args, task)
    return _allocate(args, model, task, scratch)


def _begin(args: argparse.Namespace, task: SparsifyTask) -> tuple[list[Any], Scratch]:
    """The loaded model and the opened scratch folder."""
    runtime.initialize(args)
    model = runtime.load_model(args)
    check_loaded(model, runtime.loaded_directory(args), allow_missing=args.allow_missing_masks)
    cpu.fuse(model)
    scratch = Scratch(task.save)
    if args.rank == 0:
        scratch.open(task.question)
    torch.distributed.barrier()
    scratch.refuse_unseen()
    return model, scratch


def _allocate(args: argparse.Namespace, model: list[Any], task: SparsifyTask, scratch: Scratch) -> SparsifyTask:
    """``task`` with every layer's ratio. Counts outliers or scores, or searches, if an earlier attempt has not."""
    if isinstance(task.request.allocation, Evolution):
        _search(args, model, task, task.request.allocation, scratch)
        return allocated(task, scratch)
    counted: list[Any] = [scratch.counts(task.layers) is not None] if args.rank == 0 else [None]
    if counted == [False]:
        scratch.forget_counts()
    torch.distributed.broadcast_object_list(counted, src=0)
    if not counted[0]:
        with Progress("counting", len(task.layers)) as progress:
            _Stage(model, task, scratch, [], progress).count()
            scratch.wait_for_counts(task.layers, progress.counted)
    return allocated(task, scratch)


def _search(
    args: argparse.Namespace, model: list[Any], task: SparsifyTask, search: Evolution, scratch: Scratch
) -> None:
    """Leave the result of the search in the scratch folder; it goes on where an earlier attempt was stopped."""
    grid = task.request.grid(task.parent.shape)
    kept: list[Found[Levels] | None] = [scratch.levels() if args.rank == 0 else None]
    torch.distributed.broadcast_object_list(kept, src=0)
    (found,) = kept
    if found is not None and found.generation == search.generations:
        return
    masks = LevelMasks(model, task, grid)
    with Progress("masks of every level", len(task.layers)) as progress:
        _Stage(model, task, scratch, [], progress).walk_dense(masks.add)
    assert task.windows is not None
    windows = len(task.windows)
    with screen.Bar(search.generations, "searching ratios of layers", "generation") as bar:
        if found is None:
            found = evolution.begin([(0,) * len(task.layers)], windows, masks.losses)
        bar.reach(found.generation)
        while found.generation < search.generations:
            found = evolution.generation(found, search, grid.offspring, windows, masks.losses)
            if args.rank == 0:
                scratch.keep_levels(found)
            bar.advance(note=f"loss {found.loss:.4f}, uniform {found.uniform:.4f}")
    masks.restore()
    torch.distributed.barrier()  # the first rank has written what all read


class _Stage:
    """This rank's part of the work: the blocks of its pipeline stage."""

    def __init__(self, model: list[Any], task: SparsifyTask, scratch: Scratch, done: list[int], progress: Progress):
        self.task, self.scratch, self.done, self.progress = task, scratch, set(done), progress
        self.model = model
        self.blocks: list[Any] = list(unwrap_model(model[0]).decoder.layers)
        self.shards = {shard.name: shard for shard in megatron_masks.shards(model)}
        self.kept: dict[str, torch.Tensor] = {}  # by logical name, on the CPU
        assert task.windows is not None
        self.windows = task.windows
        replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        self.stream = ResidualStream(model[0], self.windows[replica::replicas])
        # The stream stops at the last block that is still to be pruned.
        self.last = max((layer for layer in task.layers if layer not in self.done), default=-1)

    def run(self) -> None:
        self._walk("pruning", self._visit)

    def count(self) -> None:
        """Leave in the scratch folder what decides the layers' ratios, of every block that is pruned."""
        self._walk("counting", partial(self._dense, self._count))

    def walk_dense(self, see: Callable[[int, Any, Mapping[str, Statistic]], None]) -> None:
        """Call ``see`` for every block that is pruned, with statistics of its inputs in the dense model."""
        self._walk("levels", partial(self._dense, see))

    def _walk(self, purpose: str, visit: Callable[[int, Any], bool]) -> None:
        """Carry the stream through the stage. ``visit`` gets every block and its number, and says if it carried it."""
        stage, stages = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
        numbers = [block.layer_number - 1 for block in self.blocks]  # Megatron counts layers of all stages from 1
        needed = bool(numbers) and numbers[0] <= self.last
        if needed:
            if stage > 0:
                self.scratch.wait_for_stage(stage - 1, purpose)
            self.stream.enter(self.windows.seq_length)
        for layer, block in zip(numbers, self.blocks, strict=True):
            if not visit(layer, block) and layer < self.last:
                self.stream.advance(block)
        if needed and stage < stages - 1 and numbers[-1] < self.last:
            if mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_data_parallel_rank() == 0:
                self.scratch.leave(stage, purpose)
            self.stream.leave()

    def _visit(self, layer: int, block: Any) -> bool:
        if layer in self.done:
            self._read(layer, block)
        elif layer in self.task.layers:
            self._prune(layer, block)
        return False

    def _dense(self, see: Callable[[int, Any, Mapping[str, Statistic]], None], layer: int, block: Any) -> bool:
        if layer not in self.task.layers:
            return False
        tokens = len(self.windows) * self.windows.seq_length
        with Inputs(block, self._modules(layer), "square_sums", tokens, advancing=True) as inputs:
            self.stream.advance(block)
        inputs.reduce(len(self.windows))
        see(layer, block, inputs.of)
        return True

    def _count(self, layer: int, block: Any, statistics: Mapping[str, Statistic]) -> None:
        allocation, counted = self.task.request.allocation, dict[str, Any]()
        if isinstance(allocation, OutlierWeighing):
            counted["outliers"], counted["weights"] = count_outliers(block, statistics, allocation.threshold)
        else:
            counted["scores"] = count_scores(block, statistics)
        if mpu.get_data_parallel_rank() == 0 and mpu.get_tensor_model_parallel_rank() == 0:
            self.progress.counted(self.scratch.keep_counts(layer, counted))

    def _prune(self, layer: int, block: Any) -> None:
        began = time.monotonic()
        request = self.task.request
        tokens = len(self.windows) * self.windows.seq_length
        modules = self._modules(layer)
        with Inputs(block, modules, request.method.statistic, tokens) as inputs:
            self.stream.run(block)
        inputs.reduce(len(self.windows))
        parent, names = self.task.parent, {module: layer_name(layer, SUFFIXES[module]) for module in modules}
        stored = parent.spec(names[modules[0]]).dtype
        masks, sums = prune_block(block, parent.shape.of_layer(layer), request, layer, inputs.of, stored)
        self.kept |= {names[module]: mask.cpu() for module, mask in masks.items()}
        group = mpu.get_tensor_model_parallel_group()
        if mpu.get_data_parallel_rank() == 0:
            self.scratch.write(layer, group.rank(), self._pieces(names.values(), stored))
            torch.distributed.barrier(group)
            if group.rank() == 0:
                row = {"layer": layer, "seconds": time.monotonic() - began, "matrices": [s.row() for s in sums]}
                self.scratch.finish(layer, group.size(), row)
                self.progress.block(row)

    def _modules(self, layer: int) -> tuple[str, ...]:
        return self.task.request.modules_of(self.task.parent.shape, layer)

    def _read(self, layer: int, block: Any) -> None:
        """Load a block that an earlier attempt pruned."""
        found = spec.linears(block)
        names = {module: layer_name(layer, SUFFIXES[module]) for module in self._modules(layer)}
        for module, name in names.items():
            self.kept[name] = self._filled(name, torch.bool, lambda t: self.scratch.read_masks(layer, t))
            weight = found[module].weight
            weight.data.copy_(self._filled(name, weight.dtype, lambda t: self.scratch.read_weights(layer, t)))

    def _filled(self, name: str, dtype: torch.dtype, fill: Any) -> torch.Tensor:
        """This rank's shard of a linear; ``fill`` writes its pieces."""
        shard = self.shards[name]
        pieces = shard.pieces(torch.empty((), dtype=dtype).expand(shard.parameter.shape))
        parts = [torch.empty(piece.local_shape, dtype=dtype) for piece in pieces]
        fill([(name, tuple(piece.global_offset), part) for piece, part in zip(pieces, parts, strict=True)])
        return shard.merge(parts)

    def _pieces(self, names: Iterable[str], stored: torch.dtype) -> Pruned:
        """Pruned shards as rectangles of the whole weights, split as Megatron's own saving splits them."""
        for name in names:
            shard = self.shards[name]
            weights, masks = shard.pieces(shard.parameter.data.to("cpu", stored)), shard.pieces(self.kept[name])
            for weight, mask in zip(weights, masks, strict=True):
                yield name, tuple(weight.global_offset), weight.data, mask.data

    def masks(self) -> tuple[dict[torch.nn.Parameter, torch.Tensor], dict[str, str]]:
        """Masks of this rank's shards and patterns of all pruned weights: the new ones, and the parent's elsewhere."""
        kept = {self.shards[name].parameter: mask for name, mask in self.kept.items()}
        held, patterns = self.task.held_masks(), self.task.patterns
        if held is not None:
            for _, parameter, mask in megatron_masks.local(self.model, held):
                kept.setdefault(parameter, mask)
            patterns = {name: entry.pattern for name, entry in held.entries.items()} | patterns
        return kept, patterns


# The residual stream of the calibration windows, carried through a pipeline stage block by block. All windows of this
# data-parallel replica stay on the CPU, each [s, 1, h] ([s/TP, 1, h], this rank's tokens, in a sequence-parallel
# model); one at a time is on the device. Blocks run inside Megatron's own ``GPTModel.forward`` with everything else
# removed, so embedding, rotary embeddings, attention masks and precision contexts match any other forward pass.
# Stages send windows point to point.


class ResidualStream:
    """The input of the stage's next block: ``states``, one [s, 1, h] per window, on the CPU."""

    def __init__(self, stage: Any, windows: Sequence[torch.Tensor]):
        """``windows`` are this replica's, int64 [s + 1] each; only their number matters on later stages."""
        self._model = unwrap_model(stage)  # without the wrapper's casts, which are for whole models
        self._windows = windows
        self.states: list[torch.Tensor] = []

    @torch.no_grad()
    def enter(self, seq_length: int) -> None:
        """Embed the windows on the first stage; receive them from the previous stage on the others."""
        if mpu.is_pipeline_first_stage(ignore_virtual=True):
            self.states = []
            with _only(self._model, []):
                for window in self._windows:
                    tokens = window[None, :-1].cuda()  # [1, s]
                    positions = torch.arange(seq_length, device=tokens.device)[None]  # [1, s]
                    self.states.append(self._model(tokens, positions, None).cpu())
            return
        config = self._model.config
        dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
        group = mpu.get_pipeline_model_parallel_group()
        tokens_here = seq_length // spec.sequence_ranks(config)
        received = torch.empty(
            tokens_here, 1, config.hidden_size, dtype=dtype, device=torch.cuda.current_device()
        )  # [s, 1, h] or [s/TP, 1, h]
        self.states = []
        for _ in self._windows:
            torch.distributed.recv(received, group=group, group_src=group.rank() - 1)
            self.states.append(received.clone() if received.device.type == "cpu" else received.cpu())

    @torch.no_grad()
    def run(self, block: Any) -> None:
        """Run ``block`` on every window and discard its output: the hooks on it read the inputs."""
        fp8.cast_weights_again(block)
        with _only(self._model, [block]):
            for state in self.states:
                self._forward(state)

    @torch.no_grad()
    def advance(self, block: Any) -> None:
        """Replace the states by the output of ``block`` with its current weights."""
        fp8.cast_weights_again(block)
        with _only(self._model, [block]):
            for number, state in enumerate(self.states):
                self.states[number] = self._forward(state).cpu()

    def leave(self) -> None:
        """Send the states to the next stage and free them."""
        group = mpu.get_pipeline_model_parallel_group()
        for state in self.states:
            torch.distributed.send(state.cuda().contiguous(), group=group, group_dst=group.rank() + 1)
        self.states = []

    def _forward(self, state: torch.Tensor) -> torch.Tensor:
        state = state.cuda()
        self._model.set_input_tensor(state)  # read by stages without an embedding
        output: torch.Tensor = self._model(None, None, None, decoder_input=state)
        return output


@contextlib.contextmanager
def _only(model: Any, blocks: Sequence[Any]) -> Iterator[None]:
    """``model`` returns the output of these blocks alone: no other block, final norm or output layer."""
    decoder = model.decoder
    whole = decoder.layers, decoder.final_layernorm, model.post_process
    decoder.layers, decoder.final_layernorm, model.post_process = torch.nn.ModuleList(blocks), None, False
    try:
        yield
    finally:
        decoder.layers, decoder.final_layernorm, model.post_process = whole
        model.set_input_tensor(None)
