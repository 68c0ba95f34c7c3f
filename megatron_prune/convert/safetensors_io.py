"""Safetensors by blocks of rows: read slices of sharded files, write sharded files in bounded memory.

Reading uses the safetensors library (memory-mapped). Its writer needs whole tensors in memory, so this
module writes files itself; the format is a length, a JSON header, and the raw data.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_prune import screen
from megatron_prune.artifacts import read_json, write_json
from megatron_prune.checkpoint.parallel import Blocks, check_workers, run
from megatron_prune.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _TYPES.items()} | {torch.uint8: "U8"}
Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Tensors:
    """The tensors of a Hugging Face directory, in one or more files. Raises CheckpointError for a missing or
    truncated file, and for an index that names files outside the directory.

    ``other_names``: prefixes of names, and what replaces them."""

    def __init__(self, directory: Path, other_names: Mapping[str, str] | None = None) -> None:
        import safetensors

        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._slices: dict[str, Any] = {}
        for name, keys in self._files().items():
            path = directory / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(f"{path} is missing, but {INDEX} lists it")
            try:
                handle = self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
            found = set(handle.keys())
            for key in found if keys is None else keys:
                if key not in found:
                    raise CheckpointError(f"{path} lacks {key}, which {INDEX} lists")
                prefix = next((prefix for prefix in other_names or {} if key.startswith(prefix)), "")
                known = (other_names or {}).get(prefix, "") + key.removeprefix(prefix)
                self._slices[known] = handle.get_slice(key)
        self.names = frozenset(self._slices)

    def _files(self) -> dict[str, list[str] | None]:
        if (self._directory / SINGLE).is_file():  # also where an index is there too, as in transformers
            return {SINGLE: None}
        if (self._directory / INDEX).is_file():
            files: dict[str, list[str] | None] = {}
            found = read_json(self._directory / INDEX)
            names = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise CheckpointError(f"{self._directory / INDEX} is damaged: it does not say which file holds what")
            for key, name in names.items():
                files.setdefault(name, []).append(key)  # type: ignore[union-attr]
            return files
        raise CheckpointError(
            f"{self._directory} has neither {SINGLE} nor {INDEX}: only safetensors are read (pickled "
            "pytorch_model.bin files are not; save the model again with transformers to convert it)"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor. Raises CheckpointError if it is missing or not a supported floating-point type."""
        if name not in self._slices:
            raise CheckpointError(f"{self._directory} lacks the tensor {name}")
        code = self._slices[name].get_dtype()
        if code not in _TYPES:
            raise CheckpointError(f"{self._directory}: {name} is stored as {code}, expected one of {', '.join(_TYPES)}")
        return _TYPES[code]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop): [stop - start, ...]."""
        found: torch.Tensor = self._slices[name][start:stop]
        return found

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns [start, stop) of a matrix, as rows: [stop - start, rows of the matrix]."""
        found: torch.Tensor = self._slices[name][:, start:stop]
        return found.T.contiguous()


def write_sharded(
    directory: Path,
    entries: Entries,
    blocks: Blocks,
    max_shard_bytes: int,
    workers: int = 1,
) -> None:
    """Write tensors (name → type and shape, in order) as one safetensors file, or as several with an index, shared
    among ``workers`` processes."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, entry in entries.items():
        nbytes = _nbytes(entry)
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += nbytes
    total = sum(map(_nbytes, entries.values()))
    with screen.Bar(total, f"writing {directory}", "B") as bar:
        if len(shards) == 1:
            write_file(directory / SINGLE, shards[0], lambda name: bar.over(blocks.checked_rows(name), None))
            return
        files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
        workers = check_workers(workers)
        if workers == 1:
            for name, shard in files.items():
                write_file(directory / name, shard, lambda key: bar.over(blocks.checked_rows(key), None))
    if workers > 1:
        work = [(directory / name, shard, blocks) for name, shard in files.items()]
        run(_write_one, work, workers, writing=directory, size=total)
    where = {key: name for name, shard in files.items() for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(directory / INDEX, index)


def _write_one(path: Path, shard: Entries, blocks: Blocks) -> None:
    write_file(path, shard, blocks.checked_rows)


def _nbytes(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return torch.Size(entry[1]).numel() * entry[0].itemsize


def write_file(
    path: Path,
    entries: Entries,
    blocks: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as one safetensors file; ``blocks(name)`` yields a tensor's consecutive blocks of rows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    # Wider types first, so that every tensor is aligned.
    names = sorted(entries, key=lambda name: -entries[name][0].itemsize)
    for name in names:
        dtype, shape = entries[name]
        end = offset + _nbytes(entries[name])
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        start = handle.tell()
        for name in names:
            for block in blocks(name):
                handle.write(memoryview(block.contiguous().view(-1).view(torch.uint8).numpy()))
            if handle.tell() - start != header[name]["data_offsets"][1]:
                raise CheckpointError(f"{path}: the size of {name} differs from its header")
