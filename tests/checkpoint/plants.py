"""Checkpoints with a pickle planted in them: code that runs it creates a file."""

from __future__ import annotations

import contextlib
import io
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_prune.checkpoint.safe import load_metadata
from tests.checkpoint import small
from tests.checkpoint.test_safe import Touches, replace_record, saved

# Objects that Megatron stores in a checkpoint of a training run in addition to those of our writer.
OF_TRAINING = {
    "rng_state/shard_0.0_1.1": [[{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.ones(8)}]],
    "rerun_state_machine_state/shard_0_1": [{"rerun_requested": False}],
    "optimizer.state.param_state_sharding_type/shard_0_1": ["fully_sharded_model_space"],
    "dataloader_state/shard_0_1": [{"offset": 3}],
    "common_state/shard_0_2": [{"args": Namespace(**small.ARGS)}],
    "anything": [None],
}
MODULE_STATE = "decoder.layers.mlp.linear_fc1._extra_state/shard_1_4"


def write(root: Path) -> Path:
    """A checkpoint with the records of our writer and those of a training run; its directory of files."""
    folder = small.write(root) / "release"
    for number, (key, value) in enumerate(OF_TRAINING.items()):
        put(folder, key, saved(value), f"__1_{number}.distcp")
    return folder


def put(folder: Path, key: str, payload: bytes, file: str = "__planted.distcp") -> None:
    """Store the object ``payload`` (of ``torch.save``) under ``key``, whether or not there is one."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file, 0, len(payload))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / file).write_bytes(payload)


def objects(folder: Path) -> list[str]:
    """Keys of all object records."""
    return sorted(entry.fqn for entry in load_metadata(folder).storage_data if entry.offset is None)


def inside_bytes(proof: Path) -> torch.Tensor:
    """A module's state as Transformer Engine writes it: it would unpickle these bytes."""
    return torch.frombuffer(bytearray(pickle.dumps({"recipe": Touches(proof)})), dtype=torch.uint8)


def inside_signed(proof: Path) -> torch.Tensor:
    """The same bytes as signed numbers, which Transformer Engine takes for the same."""
    return inside_bytes(proof).view(torch.int8)


def inside_stream(proof: Path) -> io.BytesIO:
    """The same, of Transformer Engine 1."""
    return io.BytesIO(saved(Touches(proof)))


def in_object(key: str, make: Any = Touches) -> Any:
    """An attack: ``attack(folder, proof)`` plants ``make(proof)`` in the object record ``key``."""
    return lambda folder, proof: put(folder, key, saved([make(proof)]))


def in_common(key: str) -> Any:
    """An attack: next to the arguments, as a value of the common state."""

    def attack(folder: Path, proof: Path) -> None:
        state = {"args": Namespace(**small.ARGS), "iteration": 0, "checkpoint_version": 3.0}
        put(folder, "common_state/shard_0_1", saved([state | {key: {"x": Touches(proof)}}]))

    return attack


def in_tensor(key: str) -> Any:
    """An attack: in place of a tensor's record."""
    return lambda folder, proof: replace_record(folder, key, saved(Touches(proof)))


def in_index(folder: Path, proof: Path) -> None:
    """An attack: in the index itself, as data of the planner."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"x": Touches(proof)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS = {
    "the index": in_index,
    "a second common state": in_object("common_state/shard_0_2"),
    "the optimizer's part of the common state": in_common("optimizer"),
    "the scheduler's part of the common state": in_common("opt_param_scheduler"),
    "a key that nobody knows": in_object("zzz/shard_0_1"),
    "a module's state": in_object(MODULE_STATE),
    "the bytes of a module's state": in_object(MODULE_STATE, inside_bytes),
    "the signed bytes of a module's state": in_object(MODULE_STATE, inside_signed),
    "the stream of a module's state": in_object(MODULE_STATE, inside_stream),
    "random states": in_object("rng_state/shard_0.0_1.1"),
}


def write_legacy(root: Path) -> Path:
    """The same model as legacy files of one rank; the folder of the rank."""
    folder = root / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    model = small.tensors() | {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(0, dtype=torch.uint8)}
    state = {
        "args": Namespace(**small.ARGS, tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": model,
        "optimizer": {"param_groups": [{"lr": 0.1}]},
        "opt_param_scheduler": {"max_lr": 0.1},
        "rng_state": [{"random_rng_state": (3, (1, 2), None)}],
        "rerun_state_machine": {"rerun_requested": False},
    }
    torch.save(state, folder / "model_optim_rng.pt")
    torch.save({0: {"float32": {"param": torch.ones(3)}}}, folder / "distrib_optim.pt")
    return folder


def run_verbs(cases: list[tuple[str, list[str], str]]) -> list[tuple[int, str]]:
    """In a rank: exit code and error of every verb that runs a model; each ends while it reads its input."""
    from megatron_prune.__main__ import main

    found = []
    for verb, words, _ in cases:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main([verb, *words])
        found.append((code, said.getvalue()))
    return found


def load_objects(folder: str, keys: list[str]) -> list[tuple[str, str]]:
    """In a rank: Megatron's own loading of each object record, without our checks before; (key, the error)."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron_prune.engine import runtime

    runtime.start("planted", ["--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1", "--seq-length",
                  "8", "--max-position-embeddings", "8", "--micro-batch-size", "1", "--vocab-size", "8",
                  "--train-iters", "1", "--lr", "1"])  # fmt: skip
    runtime.initialize(None)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from torch.distributed.checkpoint.api import CheckpointException

    found = []
    for key in keys:
        name, _, shard = key.partition("/shard_")
        offset, shape = (tuple(map(int, part.split("."))) for part in shard.split("_"))
        try:
            loaded = dist_checkpointing.load(
                {"x": ShardedObject(name, None, shape, offset)}, folder, validate_access_integrity=False
            )
            found.append((key, f"loaded {type(loaded['x']).__name__}"))
        except CheckpointException as error:
            found.append((key, str(error)))
        except Exception as error:
            found.append((key, f"{type(error).__name__}: {error}"))
    return found
