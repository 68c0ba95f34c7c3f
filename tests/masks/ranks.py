"""What ranks do in these tests: build a small GPT at a layout, write masks, read masks.

The position of a rank's parameter in the whole weight is written by hand here, from Megatron's description.
"""

from __future__ import annotations

import errno
import os
from typing import Any

import torch

from megatron_prune.checkpoint.layout import ModelShape, weights

# Widths that are not multiples of 8 at TP=2 (heads 36, ffn 30), at TP=3 (ffn 20), and as a whole (hidden 36, ffn 60).
SIZES = {
    "num_layers": 4,
    "hidden_size": 36,
    "num_attention_heads": 12,
    "num_query_groups": 6,
    "kv_channels": 6,
    "ffn_hidden_size": 60,
    "padded_vocab_size": 384,
}
SHAPE = ModelShape(**SIZES, tied=False)
_FLAGS = (
    "--group-query-attention --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--max-position-embeddings 32 --untie-embeddings-and-output-weights --seq-length 8 --micro-batch-size 1 "
    "--train-iters 1 --lr 1.0"
).split()
VPP = ("--num-layers-per-virtual-pipeline-stage", "1")


def random_masks(pattern: str = "unstructured", seed: int = 0, shape: ModelShape = SHAPE) -> dict[str, torch.Tensor]:
    """Random masks of all linears except the second layer's fc1: a linear can stay dense."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for weight in weights(shape):
        if weight.is_linear and weight.name != "decoder.layers.1.mlp.linear_fc1.weight":
            scores = torch.rand(weight.shape, generator=generator)
            if pattern == "unstructured":
                masks[weight.name] = scores < 0.5
            else:
                n, m = map(int, pattern.split(":"))
                groups = scores.view(weight.shape[0], -1, m)  # [out, in / M, M]
                masks[weight.name] = (groups.argsort(-1).argsort(-1) < n).view(weight.shape)
    return masks


def slice_of(name: str, whole: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """Rank ``rank``'s part of a weight under tensor parallelism, by hand."""
    if name.endswith("linear_fc1.weight"):
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(tp, dim=1)[rank]
    return whole.chunk(tp)[rank]


def build(tp: int, pp: int, more: tuple[str, ...] = ()) -> list[torch.nn.Module]:
    """This rank's stages of a small GPT, as our verbs build them."""
    from megatron_prune.engine import cpu, runtime

    cpu.prepare()
    words = [*_FLAGS, "--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    words += [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", size)]
    words += more  # the last occurrence of a flag counts
    args = runtime.start("masks", [str(word) for word in words])
    runtime.initialize(args)
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = runtime.model_config(args)
    return config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )


def linears(model: list[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's linears by logical name, from the modules themselves."""
    from megatron.core.utils import unwrap_model

    found = {}
    for chunk in model:
        for block in unwrap_model(chunk).decoder.layers:
            prefix = f"decoder.layers.{block.layer_number - 1}"
            found[f"{prefix}.self_attention.linear_qkv.weight"] = block.self_attention.linear_qkv.weight
            found[f"{prefix}.self_attention.linear_proj.weight"] = block.self_attention.linear_proj.weight
            found[f"{prefix}.mlp.linear_fc1.weight"] = block.mlp.linear_fc1.weight
            found[f"{prefix}.mlp.linear_fc2.weight"] = block.mlp.linear_fc2.weight
    return found


def write(folder: str, tp: int, pp: int, whole: dict[str, torch.Tensor], pattern: str, *more: str) -> list[str]:
    """Write ``whole`` at a layout, every rank its own parts; returns the names of this rank's masks."""
    model = build(tp, pp, more)
    from megatron.core import parallel_state as mpu

    from megatron_prune.masks import megatron

    rank = mpu.get_tensor_model_parallel_rank()
    mine = {name: p for name, p in linears(model).items() if name in whole}
    kept = {p: slice_of(name, whole[name], tp, rank).contiguous() for name, p in mine.items()}
    megatron.save(folder, model, kept, dict.fromkeys(mine, pattern))
    return list(mine)


def read(folders: list[str], tp: int, pp: int, *more: str) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """This rank's masks of every folder, at a layout: its tensor-parallel rank, and them by name."""
    model = build(tp, pp, more)
    from megatron.core import parallel_state as mpu

    from megatron_prune.masks import megatron, open_masks

    parameters = linears(model)
    found = []
    for folder in folders:
        local = megatron.local(model, open_masks(folder))
        assert all(parameter is parameters[name] for name, parameter, _ in local)
        assert all(kept.shape == parameter.shape for _, parameter, kept in local)
        found.append({name: kept for name, _, kept in local})
    return mpu.get_tensor_model_parallel_rank(), found


def load_by_megatron(folder: str, sizes: dict[str, tuple[int, int]]) -> Any:
    """Whole stored tensors, read by Megatron's own loader."""
    build(1, 1)
    from megatron.core import dist_checkpointing

    wanted = {
        name: dist_checkpointing.ShardedTensor.from_rank_offsets(name, torch.zeros(size, dtype=torch.uint8))
        for name, size in sizes.items()
    }
    return dist_checkpointing.load(wanted, folder)


def fail_to_write(folder: str, how: str) -> tuple[str, bool]:
    """Write masks that are wrong on one rank, or whose disk is full there; this rank's error, and if all is gone."""
    model = build(2, 1)
    from pathlib import Path

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_prune.errors import MasksError
    from megatron_prune.masks import megatron

    rank = torch.distributed.get_rank()
    kept = {p: torch.ones(p.shape, dtype=torch.bool) for p in linears(model).values()}
    pattern = "unstructured"
    if how == "disk" and rank == 1:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        filesystem_async._write_item = full
    if how == "pattern":
        pattern = "2:4"
        for mask in kept.values():
            mask[:, ::2] = False
            mask[-1, 8:12] = rank == 0  # rank 1: a group that keeps nothing
    try:
        megatron.save(folder, model, kept, dict.fromkeys(linears(model), pattern))
        error = ""
    except MasksError as caught:
        error = str(caught)
    torch.distributed.barrier()
    return error, list(Path(folder).parent.iterdir()) == []


def read_of_another_model(folder: str) -> str:
    """The error of reading masks of another model."""
    model = build(1, 1)
    from megatron_prune.errors import MasksError
    from megatron_prune.masks import megatron, open_masks

    try:
        megatron.local(model, open_masks(folder))
    except MasksError as error:
        return str(error)
    return ""
