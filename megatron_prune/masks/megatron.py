"""Read and write this rank's shards of masks. Imports Megatron.

The model's ``sharded_state_dict`` says where each parameter is in the whole weight, for any layer spec, pipeline
stage, virtual stage and tensor-parallel slice; its factories split the gate and up halves of SwiGLU. The mask takes
the parameter's place there, so masks are sharded like the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prune import storage
from megatron_prune.artifacts import atomic_directory, check_space
from megatron_prune.checkpoint.layout import LINEARS, ModelShape
from megatron_prune.errors import MasksError
from megatron_prune.masks.mask_reader import Entry, Masks
from megatron_prune.masks.mask_writer import finish, unmeasured
from megatron_prune.masks.pattern import bytes_of, pack


@dataclass(frozen=True)
class MaskShard:
    """This rank's shard of one linear: the weight's logical name, the parameter, and Megatron's entry for it."""

    name: str
    parameter: torch.nn.Parameter
    entry: Any  # ShardedTensor, or ShardedTensorFactory

    def pieces(self, kept: torch.Tensor) -> list[Any]:
        """``kept``, in the parameter's shape, as ShardedTensors [rows, columns], split like the saved parameter."""
        if isinstance(self.entry, ShardedTensorFactory):
            return list(dataclasses.replace(self.entry, data=kept).build())
        return [dataclasses.replace(self.entry, data=kept, dtype=kept.dtype)]

    def merge(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of ``pieces``."""
        return self.entry.merge_fn(parts) if isinstance(self.entry, ShardedTensorFactory) else parts[0]


def shards(model_chunks: Sequence[torch.nn.Module]) -> list[MaskShard]:
    """This rank's shards of the blocks' linears, in layer order."""
    metadata = {
        "non_homogeneous_layers": True,  # keys are logical names with global layer numbers
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    found = []
    for chunk in model_chunks:
        model: Any = unwrap_model(chunk)
        parameters = dict(model.named_parameters())
        for local_name, entry in model.decoder.sharded_state_dict("decoder.", metadata=metadata).items():
            if local_name.endswith(LINEARS):
                found.append(MaskShard(entry.key, parameters[local_name], entry))
    return found


def local(model_chunks: Sequence[torch.nn.Module], masks: Masks) -> list[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """This rank's masks: (logical name, parameter, bool tensor in the parameter's shape and on its device).

    Parameters without a mask are omitted. Raises MasksError for masks of another model.
    """
    masks.check_model(ModelShape.from_args(vars(get_args())), "this one")
    found = []
    for shard in shards(model_chunks):
        if shard.name in masks.entries:
            asked = shard.pieces(torch.empty((), dtype=torch.bool).expand(shard.parameter.shape))  # takes no memory
            kept = shard.merge([_read(masks, piece) for piece in asked])
            found.append((shard.name, shard.parameter, kept.to(shard.parameter.device)))
    return found


def _read(masks: Masks, piece: Any) -> torch.Tensor:
    if piece.global_shape != masks.entries[piece.key].shape:
        shape = list(masks.entries[piece.key].shape)
        raise MasksError(
            f"{masks.label}: {piece.key}: expected shape {list(piece.global_shape)}, that of this model, got {shape}"
        )
    rows, columns = piece.global_slice()
    return masks.read(piece.key, rows, columns)


def save(
    folder: str | Path,
    model_chunks: Sequence[torch.nn.Module],
    kept: Mapping[torch.nn.Parameter, torch.Tensor],
    patterns: Mapping[str, str],
) -> None:
    """Write ``folder`` atomically, each rank its own shards. Collective.

    ``kept`` maps every pruned parameter of this rank to a bool tensor in its shape, equal on all data-parallel ranks;
    ``patterns`` has the pattern of each pruned weight by logical name.

    Raises MasksError on all ranks if a mask breaks its pattern or a write fails (for example, on a full disk).
    """
    state: dict[str, list[Any]] = {}
    entries: dict[str, Entry] = {}
    for shard in shards(model_chunks):
        if shard.parameter in kept:
            state[shard.name], entries[shard.name] = _stored(shard, kept[shard.parameter], patterns[shard.name])
    shape = ModelShape.from_args(vars(get_args()))
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, entries)
    together = {name: entry for of_rank in everywhere for name, entry in of_rank.items()}
    target = storage.path(folder).absolute()
    needed = sum(e.shape[0] * (bytes_of(e.shape[1]) if e.packed else e.shape[1]) for e in together.values())
    _on_first_rank(lambda: check_space(target, needed))
    with _atomic_together(target) as scratch:
        _save(state, scratch, target)
        _on_first_rank(lambda: finish(scratch, target, shape, together))


def _stored(shard: MaskShard, kept: torch.Tensor, pattern: str) -> tuple[list[Any], Entry]:
    """A rank's shards in stored form: eight inputs per byte, if every rank's columns are whole bytes."""
    expected = shard.parameter.shape
    if kept.dtype != torch.bool or kept.shape != expected:
        raise MasksError(
            f"the mask of {shard.name}: expected bool {list(expected)}, got {kept.dtype} {list(kept.shape)}"
        )
    stored = []
    for piece in shard.pieces(kept):
        out, inputs = piece.global_shape
        columns = piece.local_shape[1]
        packed = columns == inputs or columns % 8 == 0
        data = pack(piece.data) if packed else piece.data.to("cpu", torch.uint8)
        stored.append(
            ShardedTensor(
                piece.key,
                data.contiguous(),
                torch.uint8,
                tuple(data.shape),
                (out, bytes_of(inputs) if packed else inputs),
                (piece.global_offset[0], piece.global_offset[1] // 8 if packed else piece.global_offset[1]),
                piece.axis_fragmentations,
                piece.replica_id,
            )
        )
    return stored, unmeasured((out, inputs), pattern, packed=packed)


def _save(state: dict[str, list[Any]], scratch: Path, target: Path) -> None:
    try:
        dist_checkpointing.save(state, str(scratch), async_strategy="mcore")
    except CheckpointException as error:  # not an Exception; has details only on rank 0
        where = f"on rank {', '.join(map(str, error.failures))}" if error.failures else "on another rank"
        free, why = shutil.disk_usage(target.parent).free / 1e9, str(error).strip().splitlines()[-1]
        raise MasksError(
            f"{target}: masks could not be written {where}, nothing was kept ({free:.2f} GB are free there): {why}"
        ) from error


@contextlib.contextmanager
def _atomic_together(folder: Path) -> Iterator[Path]:
    """Rank 0's ``atomic_directory``, shared by all ranks: an error on rank 0 is raised on all of them. Collective.

    In an object store, yields ``folder`` itself: ``masks.json`` is written last and marks it complete."""
    if storage.is_stored(folder):
        yield folder
        return
    with contextlib.ExitStack() as stack:
        scratch = _on_first_rank(lambda: str(stack.enter_context(atomic_directory(folder))))
        yield Path(scratch)
        _on_first_rank(stack.close)


def _on_first_rank[T](work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and broadcast its result; an error there is raised on all ranks. Collective."""
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            failure, outcome[1] = error, f"rank 0: {error}"
    torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise MasksError(outcome[1])
    result: T = outcome[0]
    return result
