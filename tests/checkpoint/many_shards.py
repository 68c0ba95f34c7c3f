"""A small checkpoint whose optimizer state has as many shards as that of a hundred GPUs.

Megatron's distributed optimizer cuts every bucket over the data-parallel ranks, and each parameter's part of a rank is
a shard of three tensors: an 8B model at TP2 x DP64 has about 31,000, a 70B model at TP8 x DP64 about 250,000.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from tests.checkpoint import small

_PER_TENSOR = 128  # shards of one stored tensor
_ELEMENTS = 4  # of a shard


def write(root: Path, shards: int, *, real: bool = False) -> Path:
    """Write the checkpoint and return ``root``. ``real``: torch writes the shards' records and their index; else only
    the index exists, over a file with holes, which takes no room."""
    directory = small.write(root) / "release"
    index = pickle.loads((directory / ".metadata").read_bytes())
    added = _saved(directory, shards) if real else _made(directory, shards)
    index.state_dict_metadata |= added.state_dict_metadata
    index.storage_data |= added.storage_data
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    return root


def _places(shards: int) -> list[tuple[str, torch.Size]]:
    return [
        (f"optimizer.state.exp_avg.decoder.layers.{number // _PER_TENSOR}.weight",
         torch.Size([number % _PER_TENSOR * _ELEMENTS]))
        for number in range(shards)
    ]  # fmt: skip


def _extent(shards: int, key: str) -> torch.Size:
    layer = int(key.split(".")[-2])
    return torch.Size([min(_PER_TENSOR, shards - layer * _PER_TENSOR) * _ELEMENTS])


def _made(directory: Path, shards: int, length: int = 1200) -> dcp.Metadata:
    index = dcp.Metadata(state_dict_metadata={}, storage_data={})
    for number, (key, offsets) in enumerate(_places(shards)):
        entry = index.state_dict_metadata.setdefault(
            key, dcp.TensorStorageMetadata(dcp.TensorProperties(), _extent(shards, key), [])
        )
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size([_ELEMENTS])))
        index.storage_data[dcp.MetadataIndex(key, offsets)] = _StorageInfo("__9_0.distcp", number * length, length)
    with open(directory / "__9_0.distcp", "wb") as file:
        file.truncate(shards * length)
    return index


class _Planner(DefaultSavePlanner):
    def __init__(self, shards: int) -> None:
        super().__init__(flatten_state_dict=False)
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        properties = dcp.TensorProperties()
        self.plan = SavePlan([
            WriteItem(
                dcp.MetadataIndex(key, offsets), WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    dcp.ChunkStorageMetadata(offsets, torch.Size([_ELEMENTS])), properties, _extent(self._shards, key)
                ),
            )
            for key, offsets in _places(self._shards)
        ])  # fmt: skip
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        return torch.zeros(_ELEMENTS)


def _saved(directory: Path, shards: int) -> dcp.Metadata:
    folder = directory / "torch"
    torch_checkpoint.save(
        {}, storage_writer=FileSystemWriter(folder, sync_files=False), planner=_Planner(shards), no_dist=True
    )
    index: dcp.Metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").unlink()
    for path in folder.iterdir():
        path.rename(directory / path.name.replace("__0_", "__9_"))
    folder.rmdir()
    for place, info in index.storage_data.items():
        index.storage_data[place] = _StorageInfo(info.relative_path.replace("__0_", "__9_"), info.offset, info.length)
    return index
