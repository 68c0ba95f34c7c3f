"""Read what a checkpoint holds without running what it holds.

A `torch_dist` checkpoint contains two kinds of pickle: ``.metadata`` (a plain pickle of torch's
``Metadata``) and records written by ``torch.save``. Both are read here through allow-lists. The few
classes that are needed are real; classes that Megatron writes beside them become inert ``Opaque``
stand-ins, so that Megatron need not be imported; any other name is refused before it is looked up.

* ``load_metadata``  the index of tensors and byte ranges, validated
* ``load_common``    ``args``, iteration and version
* ``Record``         where in a file the raw numbers of one stored tensor lie
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune.errors import CheckpointError


class Opaque:
    """Stands for an object that a checkpoint mentions and that nothing here looks at."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"Opaque{self.arguments}"


_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(dcp, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    # Properties of older torch versions lived here.
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): dcp.TensorProperties,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): dcp._MEM_FORMAT_ENCODING,
    ("collections", "OrderedDict"): dict,
}
# Saving plans that Megatron caches in the metadata; nothing here needs them.
_METADATA_IGNORED = {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
} | {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
}

# Classes that Megatron (megatron.core.safe_globals) allows in the common state. Inert here.
_COMMON_IGNORED = (
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "_io.BytesIO",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "torch._C.Generator",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    *(
        f"megatron.core.transformer.enums.{name}"
        for name in ("AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")
    ),
)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return _METADATA_CLASSES[module, name]
        if (module, name) in _METADATA_IGNORED:
            return Opaque
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint index needs")


def load_metadata(directory: Path) -> dcp.Metadata:
    """The index ``.metadata`` of a `torch_dist` directory, with every byte range validated.

    Raises CheckpointError when it is missing, broken, asks for code, or names a file outside
    ``directory``.
    """
    path = directory / ".metadata"
    try:
        with open(path, "rb") as handle:
            metadata = _MetadataUnpickler(handle).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: not a (complete) torch_dist checkpoint") from error
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{path} is refused: {error}") from error
    if not isinstance(metadata, dcp.Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is refused: it holds no checkpoint index")
    try:
        for key, entry in metadata.state_dict_metadata.items():
            _check(isinstance(key, str), f"a key is {key!r}")
            if isinstance(entry, dcp.TensorStorageMetadata):
                _check(isinstance(entry.properties.dtype, torch.dtype), f"{key} has no dtype")
                _check_sizes(entry.size, key)
                for chunk in entry.chunks:
                    _check_sizes(chunk.offsets, key)
                    _check_sizes(chunk.sizes, key)
                    sides = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
                    _check(
                        all(offset + size <= extent for offset, size, extent in sides),
                        f"{key} has a shard outside of it",
                    )
        for index, info in metadata.storage_data.items():
            _check(isinstance(index, dcp.MetadataIndex), f"a record is named {index!r}")
            _check_sizes((info.offset, info.length), index.fqn)
            name = info.relative_path
            _check(
                isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name,
                f"{index.fqn} names the file {name!r}, which is not inside the checkpoint",
            )
            _check(not getattr(info, "transform_descriptors", None), f"{index.fqn} is stored compressed")
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    return metadata


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _check_sizes(values: Any, key: str) -> None:
    _check(all(isinstance(v, int) and 0 <= v < 1 << 62 for v in values), f"{key} has sizes {values}")


def load_common(payload: bytes, origin: str) -> dict[str, Any]:
    """The common state of a checkpoint (a ``torch.save`` payload), read with ``weights_only``.

    ``args`` in it comes back as a plain dictionary; values of Megatron's own classes in it are
    ``Opaque``. ``origin`` names the source in errors.
    """
    allowed: list[Any] = [
        (argparse.Namespace, "argparse.Namespace"),
        (types.SimpleNamespace, "types.SimpleNamespace"),
        *((Opaque, name) for name in _COMMON_IGNORED),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # refused globals, broken archives
        reason = str(error).strip().splitlines() or ["unreadable"]
        detail = next((line.strip() for line in reason if "GLOBAL" in line), reason[0])
        raise CheckpointError(f"{origin}: the common state is refused: {detail}") from error
    if isinstance(state, list) and len(state) == 1:
        state = state[0]
    if not isinstance(state, dict):
        raise CheckpointError(f"{origin}: the common state is a {type(state).__name__}, expected a dictionary")
    if isinstance(state.get("args"), (argparse.Namespace, types.SimpleNamespace)):
        state["args"] = vars(state["args"])
    return state


@dataclass(frozen=True)
class Record:
    """Where the numbers of one stored tensor lie: byte ``offset`` in its file, and their strides."""

    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for extent, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file as a seekable stream, read by position."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = max(0, min(len(view), self._length - self._position))
        got = os.preadv(self._descriptor, [view[:count]], self._start + self._position) if count else 0
        self._position += got
        return got


_STORAGE_DTYPES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}


class _TensorUnpickler(pickle.Unpickler):
    """Understands exactly what ``torch.save(tensor)`` writes, and builds no tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *rest: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return dtype, str(key), int(numel)


def locate(descriptor: int, start: int, length: int, origin: str) -> Record:
    """Find the raw numbers of the ``torch.save`` record in bytes [start, start + length) of an open file.

    Nothing in the record is executed. Raises CheckpointError naming ``origin`` for a record that is
    truncated, compressed, big-endian, or not one plain tensor.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(descriptor, start, length))) as archive:
            entries = {name.split("/", 1)[-1]: entry for name, entry in archive.NameToInfo.items()}
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError("its numbers are big-endian")
            (dtype, key, numel), first, size, stride = _TensorUnpickler(
                io.BytesIO(archive.read(entries["data.pkl"]))
            ).load()
            entry = entries[f"data/{key}"]
        # The local header says how much padding precedes the numbers.
        header = os.pread(descriptor, 30, start + entry.header_offset)
        if header[:4] != b"PK\x03\x04" or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its numbers are compressed or missing")
        begin = (
            entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        last = first + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) + 1
        empty = 0 in size
        if numel * dtype.itemsize != entry.file_size or begin + entry.file_size > length:
            raise ValueError("it is shorter than it says")
        if not all(isinstance(v, int) and v >= 0 for v in (first, *size, *stride)) or (not empty and last > numel):
            raise ValueError("its view reaches beyond its storage")
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(f"{origin} is truncated or damaged: {error}") from error
    return Record(start + begin + first * dtype.itemsize, dtype, size, stride)
