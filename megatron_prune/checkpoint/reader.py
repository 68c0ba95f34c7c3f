"""Stream logical weights out of a `torch_dist` checkpoint, whatever layout it was saved at.

``open_checkpoint(path)`` reads the index and the stored arguments, checks that every file is there
and long enough, and gives a ``Checkpoint`` whose weights are addressed by logical per-layer names
(``decoder.layers.3.mlp.linear_fc2.weight``), stacked or not, sharded in any way. Rows are read by
byte range, so memory is bounded by what is asked for. No model, no process group, no GPU, no
Megatron, and no code from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_prune.artifacts import read_json, sha256_file
from megatron_prune.checkpoint import safe, tracker
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout, stacked_name, weights
from megatron_prune.errors import CheckpointError

PRUNING_FILE = "pruning.json"
INTEGRITY_FILE = "integrity.json"
HUGGINGFACE_FOLDER = "huggingface"  # beside the tracker: tokenizer files and the model's Hugging Face config
FINGERPRINT_ELEMENTS = 64  # of each logical tensor
# What Megatron stores beside the weights; everything else must be a weight that the layout table knows.
_NOT_WEIGHTS = (
    "optimizer",
    "chained_",
    "rng_state",
    "rerun_state_machine",
    "common_state",
    "opt_param_scheduler",
)


@dataclass(frozen=True)
class TensorSpec:
    """A logical weight as stored: its per-layer name, global shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """A rectangle of a stored tensor: its place in the global tensor, and its record in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor under its stored key (a stacked one holds all layers along its first axis)."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class _Part:
    """Where rows of a logical weight, from ``row`` on, lie: in a ``layer`` (None: unstacked) of a key."""

    stored: StoredTensor
    layer: int | None
    row: int


class Checkpoint:
    """A readable checkpoint; make one with ``open_checkpoint``. Usable from several threads.

    ``root`` holds the tracker, ``directory`` the files; ``args`` are the stored Megatron arguments
    (values of Megatron's own classes are ``safe.Opaque``), ``shape`` what they describe, ``names``
    the logical weights in the order of the forward pass.
    """

    def __init__(self, directory: Path, *, root: Path, iteration: int | None, release: bool) -> None:
        self.directory, self.root, self.release = directory, root, release
        self._metadata = safe.load_metadata(directory)
        self._files: dict[str, int] = {}
        self._records: dict[tuple[str, int], safe.Record] = {}
        self.common = self._load_common()
        self.args: dict[str, Any] = self.common.get("args") or {}
        if not self.args:
            raise CheckpointError(f"{directory} stores no Megatron args: the shape of its model is unknown")
        self.iteration = int(self.common.get("iteration", 0)) if iteration is None else iteration
        self.shape = ModelShape.from_args(self.args)
        self.stored = self._index()
        self._layouts: dict[str, WeightLayout] = {w.name: w for w in weights(self.shape)}
        self.names = tuple(self._layouts)
        self._parts = {name: self._find(layout) for name, layout in self._layouts.items()}
        self._refuse_unknown()
        self.verify()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    # -- the index ------------------------------------------------------------------------------

    def _load_common(self) -> dict[str, Any]:
        legacy = self.directory / "common.pt"
        if legacy.is_file():
            return safe.load_common(legacy.read_bytes(), str(legacy))
        for index, info in self._metadata.storage_data.items():
            if index.fqn.split("/")[0] == "common_state":
                payload = self._read_bytes(info.relative_path, info.offset, info.length)
                return safe.load_common(payload, str(self.directory / info.relative_path))
        raise CheckpointError(
            f"{self.directory} holds neither common_state nor common.pt: it was not saved by Megatron"
        )

    def _index(self) -> dict[str, StoredTensor]:
        records: dict[str, dict[tuple[int, ...], Any]] = defaultdict(dict)
        for index, info in self._metadata.storage_data.items():
            if index.offset is not None:
                records[index.fqn][tuple(index.offset)] = info
        stored = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            pieces = []
            for chunk in entry.chunks:
                info = records[key].get(tuple(chunk.offsets))
                if info is None:
                    raise CheckpointError(
                        f"{self.directory}: {key} has no record for its shard at {tuple(chunk.offsets)}"
                    )
                pieces.append(
                    Piece(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
                )
            stored[key] = StoredTensor(key, tuple(entry.size), entry.properties.dtype, tuple(pieces))
        return stored

    @cached_property
    def _by_layer(self) -> dict[str, dict[int, tuple[Piece, ...]]]:
        """Pieces of each stacked key, by the layers that they hold."""
        result = {}
        for key, stored in self.stored.items():
            if not _is_weight(key):
                continue
            layers: dict[int, list[Piece]] = defaultdict(list)
            for piece in stored.pieces:
                for layer in range(piece.offsets[0], piece.offsets[0] + piece.sizes[0]) if piece.offsets else ():
                    layers[layer].append(piece)
            result[key] = {layer: tuple(pieces) for layer, pieces in layers.items()}
        return result

    def _find(self, layout: WeightLayout) -> tuple[_Part, ...]:
        """The stored parts of a logical weight, checked for shape, type and full coverage."""
        candidates: list[tuple[list[str], int | None]] = [([layout.name], None)]
        if layout.layer is not None:
            candidates.append(([stacked_name(layout.suffix)], layout.layer))
        if layout.axes[0] == "fc1" and self.shape.gated:
            # Megatron's `singleton_local_shards` keeps gate and up under keys of their own.
            candidates += [([f"{key}_w", f"{key}_v"], layer) for (key,), layer in tuple(candidates)]
        found = next((c for c in candidates if all(key in self.stored for key in c[0])), None)
        if found is None:
            raise CheckpointError(
                f"{self.directory} lacks {layout.name}, which its stored args "
                f"(num_layers={self.shape.num_layers}, tied={self.shape.tied}) promise"
            )
        keys, layer = found
        rows = layout.shape[0] // len(keys)
        parts = tuple(_Part(self.stored[key], layer, i * rows) for i, key in enumerate(keys))
        for part in parts:
            lead = () if layer is None else (self.shape.num_layers,)
            expected = (*lead, rows, *layout.shape[1:])
            if part.stored.shape != expected:
                raise CheckpointError(
                    f"{self.directory}: {part.stored.key} has shape {list(part.stored.shape)}, "
                    f"its stored args say {list(expected)}"
                )
            if part.stored.dtype != parts[0].stored.dtype:
                raise CheckpointError(f"{self.directory}: the halves of {layout.name} differ in type")
            self._check_coverage(part, expected[len(lead) :])
        return parts

    def _check_coverage(self, part: _Part, shape: tuple[int, ...]) -> None:
        boxes = [_box(piece, part.layer) for piece in self._pieces(part)]
        volume = sum(torch.Size(sizes).numel() for _, sizes in boxes)
        inside = all(
            o + s <= extent for offsets, sizes in boxes for o, s, extent in zip(offsets, sizes, shape, strict=True)
        )
        if not inside or volume != torch.Size(shape).numel() or _overlapping(boxes):
            where = "" if part.layer is None else f" of layer {part.layer}"
            raise CheckpointError(
                f"{self.directory}: the shards of {part.stored.key}{where} do not cover "
                f"{list(shape)} exactly once: a shard is missing or doubled"
            )

    def _pieces(self, part: _Part) -> tuple[Piece, ...]:
        return part.stored.pieces if part.layer is None else self._by_layer[part.stored.key].get(part.layer, ())

    def _refuse_unknown(self) -> None:
        known = {part.stored.key for parts in self._parts.values() for part in parts}
        unknown = sorted(key for key in self.stored if _is_weight(key) and key not in known)
        if unknown:
            raise CheckpointError(
                f"{self.directory} holds weights that this package does not know "
                f"({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}): "
                "only dense GPT models are supported"
            )

    def shards(self, name: str) -> int:
        """Number of records that hold the weight."""
        return sum(len(self._pieces(part)) for part in self._parts[name])

    def stored_keys(self, name: str) -> tuple[str, ...]:
        """Keys of ``stored`` that hold the weight."""
        return tuple(part.stored.key for part in self._parts[name])

    # -- reading --------------------------------------------------------------------------------

    def spec(self, name: str) -> TensorSpec:
        """Shape and type of a logical weight."""
        return TensorSpec(name, self._layouts[name].shape, self._parts[name][0].stored.dtype)

    def layout(self, name: str) -> WeightLayout:
        """Axes of a logical weight."""
        return self._layouts[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole weight."""
        return self.read_rows(name, 0, self._layouts[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a weight: [stop - start, ...], a fresh contiguous CPU tensor."""
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name} {list(spec.shape)}")
        out = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        for part in self._parts[name]:
            for piece in self._pieces(part):
                offsets, sizes = _box(piece, part.layer)
                first = max(start, part.row + offsets[0])
                last = min(stop, part.row + offsets[0] + sizes[0])
                if first < last:
                    columns = tuple(slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True))
                    target = out[(slice(first - start, last - start), *columns)]
                    self._fill(target, piece, part, first - part.row - offsets[0], last - part.row - offsets[0])
        return out

    def row_blocks(self, name: str, max_bytes: int = 64 << 20) -> Iterator[torch.Tensor]:
        """The weight in consecutive blocks of rows of at most ``max_bytes`` (at least one row) each."""
        spec = self.spec(name)
        rows = max(1, max_bytes // max(1, spec.nbytes // spec.shape[0]))
        for start in range(0, spec.shape[0], rows):
            yield self.read_rows(name, start, min(start + rows, spec.shape[0]))

    def _fill(self, target: torch.Tensor, piece: Piece, part: _Part, first: int, last: int) -> None:
        """Copy rows [first, last) of a piece (counted inside it) into ``target``."""
        record = self._record(piece, part.stored)
        lead = 0 if part.layer is None else part.layer - piece.offsets[0]
        sizes = piece.sizes if part.layer is None else piece.sizes[1:]
        row = torch.Size(sizes[1:]).numel()
        if not record.contiguous:
            storage = torch.empty(
                sum((e - 1) * s for e, s in zip(record.size, record.stride, strict=True)) + 1,
                dtype=record.dtype,
            )
            self._read_into(storage, piece.file, record.offset)
            view = storage.as_strided(record.size, record.stride).reshape(piece.sizes)
            target.copy_((view if part.layer is None else view[lead])[first:last])
            return
        begin = record.offset + (lead * sizes[0] + first) * row * record.dtype.itemsize
        if target.is_contiguous():
            self._read_into(target, piece.file, begin)
        else:
            buffer = torch.empty((last - first, *sizes[1:]), dtype=record.dtype)
            self._read_into(buffer, piece.file, begin)
            target.copy_(buffer)

    def _record(self, piece: Piece, stored: StoredTensor) -> safe.Record:
        key = (piece.file, piece.start)
        if key not in self._records:
            origin = f"{self.directory / piece.file} (the shard of {stored.key} at {list(piece.offsets)})"
            record = safe.locate(self._open(piece.file), piece.start, piece.length, origin)
            if record.dtype != stored.dtype or torch.Size(record.size).numel() != torch.Size(piece.sizes).numel():
                raise CheckpointError(
                    f"{origin} holds {record.dtype} {list(record.size)}, "
                    f"the index says {stored.dtype} {list(piece.sizes)}"
                )
            self._records[key] = record
        return self._records[key]

    def _open(self, name: str) -> int:
        if name not in self._files:
            try:
                self._files[name] = os.open(self.directory / name, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{self.directory / name} cannot be read: {error.strerror}") from error
        return self._files[name]

    def _read_bytes(self, name: str, start: int, length: int) -> bytes:
        buffer = torch.empty(min(length, os.fstat(self._open(name)).st_size), dtype=torch.uint8)
        self._read_into(buffer, name, start)
        return buffer.numpy().tobytes()

    def _read_into(self, target: torch.Tensor, name: str, start: int) -> None:
        if target.numel() == 0:
            return
        view = memoryview(target.view(-1).view(torch.uint8).numpy())
        descriptor = self._open(name)
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + (1 << 30)]], start + done)
            if got == 0:
                raise CheckpointError(
                    f"{self.directory / name} is truncated: {len(view) - done} bytes are missing at {start + done}"
                )
            done += got

    # -- what surrounds the weights -------------------------------------------------------------

    @cached_property
    def pruning(self) -> list[dict[str, Any]]:
        """The chain of prunings that made this checkpoint, oldest first; empty if none."""
        path = self.directory / PRUNING_FILE
        return list(read_json(path).get("chain", [])) if path.is_file() else []

    @property
    def huggingface(self) -> Path | None:
        """The folder with tokenizer files and Hugging Face config that came with the model, if any."""
        folder = self.root / HUGGINGFACE_FOLDER
        return folder if folder.is_dir() else None

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:
            spec = self.spec(name)
            digest.update(json.dumps([name, list(spec.shape), str(spec.dtype)]).encode())
            numel = torch.Size(spec.shape).numel()
            count = min(FINGERPRINT_ELEMENTS, numel)
            row = numel // spec.shape[0]
            for i in range(count):
                at = i * (numel - 1) // max(1, count - 1)
                digest.update(self._element(name, at // row, at % row))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Identity of the weights: SHA-256 over every logical tensor's name, shape, type and evenly spaced
        elements, in the order of ``names``. The same for every layout and naming of the same weights."""
        return self._fingerprint

    def _element(self, name: str, row: int, column: int) -> bytes:
        for part in self._parts[name]:
            for piece in self._pieces(part):
                offsets, sizes = _box(piece, part.layer)
                at = (row - part.row - offsets[0], *((column - offsets[1],) if len(sizes) > 1 else ()))
                if all(0 <= a < s for a, s in zip(at, sizes, strict=True)):
                    record = self._record(piece, part.stored)
                    if not record.contiguous:
                        return (
                            self.read_rows(name, row, row + 1)
                            .view(-1)[column : column + 1]
                            .view(torch.uint8)
                            .numpy()
                            .tobytes()
                        )
                    lead = 0 if part.layer is None else part.layer - piece.offsets[0]
                    flat = lead * torch.Size(sizes).numel() + at[0] * (sizes[1] if len(sizes) > 1 else 1) + sum(at[1:])
                    return self._read_bytes(
                        piece.file, record.offset + flat * record.dtype.itemsize, record.dtype.itemsize
                    )
        raise AssertionError((name, row, column))

    def verify(self, hashes: bool = False) -> None:
        """Check that every file of the weights is there and long enough; with ``hashes``, also its SHA-256
        against ``integrity.json``. Raises CheckpointError naming the file."""
        needed: dict[str, int] = defaultdict(int)
        for parts in self._parts.values():
            for part in parts:
                for piece in self._pieces(part):
                    needed[piece.file] = max(needed[piece.file], piece.start + piece.length)
        check_files(self.directory, needed)
        if hashes:
            path = self.directory / INTEGRITY_FILE
            if not path.is_file():
                raise CheckpointError(f"{path} does not exist: this checkpoint was saved without hashes")
            for name, expected in read_json(path)["files"].items():
                if Path(name).name != name or not (self.directory / name).is_file():
                    raise CheckpointError(f"{self.directory / name} is missing, {INTEGRITY_FILE} lists it")
                if sha256_file(self.directory / name) != expected:
                    raise CheckpointError(
                        f"{self.directory / name} is damaged: its SHA-256 is not the one in {INTEGRITY_FILE}"
                    )


def _is_weight(key: str) -> bool:
    return not key.startswith(_NOT_WEIGHTS)


def _box(piece: Piece, layer: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of a piece inside its logical weight."""
    return (piece.offsets, piece.sizes) if layer is None else (piece.offsets[1:], piece.sizes[1:])


def _overlapping(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    for i, (a, a_sizes) in enumerate(boxes):
        for b, b_sizes in boxes[:i]:
            if all(x < y + t and y < x + s for x, s, y, t in zip(a, a_sizes, b, b_sizes, strict=True)):
                return True
    return False


def check_files(directory: Path, needed: dict[str, int]) -> None:
    """Refuse a directory in which a file is missing or shorter than ``needed`` bytes."""
    for name, size in needed.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
        if path.stat().st_size < size:
            raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes, the index needs {size}")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory with a tracker file, or one of its ``iter_…``/``release`` directories.

    Raises CheckpointError, before any weight is read, when it is missing, incomplete, truncated,
    hostile, or not a dense GPT.
    """
    found = tracker.resolve(Path(path))
    return Checkpoint(found.directory, root=found.root, iteration=found.iteration, release=found.release)
