"""Which part of which weight is where in the distributed optimizer's buckets: stored with them, compared on loading.

Megatron saves its optimizer's flat buckets as they are, and reads them back into the weights that its own model has at
these positions. It refuses another tensor or pipeline parallelism, but may not notice another order of weights (a spec
with other names, virtual stages, other flags of gradient buckets). ``install`` makes every save record what its
buckets hold, so that ``checkpoint/reshard.py`` can split them, and makes every load compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
from collections.abc import Mapping
from typing import Any

import torch

from megatron_prune import storage
from megatron_prune.checkpoint import safe
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.reshard import BUCKETS, COMMAND, LAYOUT_OBJECT
from megatron_prune.checkpoint.torch_dist import StoredFiles
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.engine import runtime
from megatron_prune.errors import CheckpointError, UsageError

_MODEL_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


def install(args: argparse.Namespace) -> None:
    """Wrap ``DistributedOptimizer``, for a run with ``args``; harmless to call twice."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_dp_reshardable
    if hasattr(original, "_says_its_layout"):
        return

    @functools.wraps(original)
    def with_layout(self: Any, model_state: Any, is_loading: bool = False, metadata: Any = None) -> Any:
        state = original(self, model_state, is_loading, metadata)
        buckets = describe(self, model_state)
        key = f"optimizer.distributed.dp_group_idx_{self.data_parallel_group_idx}.{LAYOUT_OBJECT}"
        if is_loading:
            _refuse_other(args, key, buckets)
        else:
            replica = (self.distributed_optimizer_instance_id, 0, self.data_parallel_group.rank())
            state[LAYOUT_OBJECT] = ShardedObject(key, json.dumps({"buckets": buckets}), (1,), (0,), replica_id=replica)
        return state

    with_layout._says_its_layout = True  # type: ignore[attr-defined]
    DistributedOptimizer.sharded_param_state_dp_reshardable = with_layout


def prepare(args: argparse.Namespace) -> None:
    """Refuse (UsageError) to resume from a state that does not load at this TP and PP; allow any DP.

    If gradients are reduced bucket by bucket, Megatron's buckets grow with the data-parallel ranks from 41 on: a run
    that resumes with another number of ranks keeps the saved size. Call before Megatron validates.
    """
    if args.load is None or not args.use_distributed_optimizer or args.finetune or args.no_load_optim:
        return
    if not storage.path(args.load).is_dir() or find_iteration(args.load) is None:
        return
    checkpoint = open_checkpoint(runtime.loaded_directory(args))
    if checkpoint.release or checkpoint.optimizer_form != BUCKETS:
        return
    stored = checkpoint.args
    was, wanted = ([of.get(name, 1) for name in _MODEL_PARALLEL] for of in (stored, vars(args)))
    if was != wanted:
        raise UsageError(
            ", ".join(f"--{name.replace('_', '-')}" for name in _MODEL_PARALLEL), got=", ".join(map(str, wanted)),
            expected=f"{', '.join(map(str, was))}, as when {args.load} was saved",
            why="its optimizer state is stored per model-parallel rank",
            do=f"give those, or run first: {COMMAND} {args.load}",
        )  # fmt: skip
    replicas = stored.get("data_parallel_size", 1) * stored.get("context_parallel_size", 1)
    if stored.get("overlap_grad_reduce") and stored.get("ddp_num_buckets") is None and args.ddp_num_buckets is None:
        args.ddp_bucket_size = stored.get("ddp_bucket_size") or max(40_000_000, 1_000_000 * replicas)


def describe(optimizer: Any, model_state: Any) -> dict[str, list[dict[str, Any]]]:
    """By bucket, named as in a checkpoint: its parts of weights, without those that another rank saves too.

    ``model_state`` is the model's sharded state, whose entries locate a parameter in the whole weight.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    entries, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {entry.data: entry for entry in nested_values(entries)}
    found: dict[str, list[dict[str, Any]]] = {}
    for number, (buffer, maps) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
        (dtype,) = maps
        names = [
            f"optimizer.distributed.dp_group_idx_{optimizer.data_parallel_group_idx}"
            f".gbuf_idx_{number}.dtype_{dtype}.bucket_idx_{bucket}"
            for bucket in range(len(buffer.buckets))
        ]
        found |= {name: [] for name in names}
        for parameter, (start, _, bucket) in buffer.param_index_map.items():
            entry = by_parameter[parameter]
            if any(entry.replica_id[:2]):  # another model-parallel rank saves the same state
                continue
            shape = torch.empty(parameter.shape, device="meta")  # its parts know their offset in the whole
            parts = dataclasses.replace(entry, data=shape).build() if isinstance(entry, ShardedTensorFactory) else None
            for part in [entry] if parts is None else nested_values(parts):
                within = 0 if parts is None else part.data.storage_offset()
                layers = (1,) * part.prepend_axis_num
                found[names[bucket]].append({
                    "key": part.key, "shape": list(part.global_shape), "offsets": list(part.global_offset),
                    "sizes": [*layers, *part.local_shape], "start": start - buffer.buckets[bucket].offset + within,
                })  # fmt: skip
    return found


def _refuse_other(args: argparse.Namespace, key: str, buckets: Mapping[str, Any]) -> None:
    """CheckpointError if the save being loaded has other parts in these buckets. A save without this record is left
    for Megatron to check."""
    directory = open_checkpoint(runtime.loaded_directory(args)).directory
    for place, info in safe.load_metadata(directory).storage_data.items():
        if place.fqn == f"{key}/shard_0_1":
            payload = StoredFiles(directory).read_bytes(info.relative_path, info.offset, info.length)
            (text,) = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            if json.loads(text)["buckets"] != json.loads(json.dumps(buckets)):
                raise CheckpointError(
                    f"--load {args.load}: the optimizer state was saved with its weights in another order (another "
                    "--transformer-impl, virtual stages, --overlap-grad-reduce or --ddp-bucket-size). Give the same "
                    f"flags as then, or run first: {COMMAND} {args.load}"
                )
