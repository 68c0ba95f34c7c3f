"""Read any rectangle of any mask by byte range, whatever its layout. Needs no Megatron and no process group.

``open_masks`` reads ``masks.json`` and the index, and raises MasksError if something is missing, damaged or
inconsistent. The bits are read only on request (``with_weights.py`` reads them all).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron_prune import storage
from megatron_prune.artifacts import read_json, sha256_json
from megatron_prune.checkpoint import index, safe, torch_dist
from megatron_prune.checkpoint.layout import LINEARS, ModelShape, weights_of_layer
from megatron_prune.checkpoint.torch_dist import StoredFiles
from megatron_prune.errors import MasksError, MegatronPruneError
from megatron_prune.masks.pattern import Pattern, bytes_of, unpack
from megatron_prune.untrusted import show

MASKS = "masks"  # the folder next to a checkpoint's tracker
MASKS_FILE = "masks.json"
VERSION = 1
BLOCK_BYTES = 8 << 20  # of unpacked mask per block, one byte per weight
_NAME = re.compile(r"decoder\.layers\.(0|[1-9]\d{0,5})\.(\S+)")
# The parts of a model's shape that its linears depend on; the padding of the vocabulary may differ.
_OF_LINEARS = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "gated",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One mask: the shape (out, in) of its weight, its pattern, and the number of weights it removes.

    ``digest`` is the SHA-256 of its packed rows; ``packed`` says whether it is stored packed.
    """

    shape: tuple[int, int]
    pattern: str
    removed: int
    digest: str
    packed: bool

    @property
    def ratio(self) -> float:
        """The fraction of weights removed."""
        return self.removed / (self.shape[0] * self.shape[1])


class Masks:
    """Open masks, made by ``open_masks``. Thread-safe.

    ``entries`` are in the order of the forward pass; ``model`` is the shape of their model.
    """

    def __init__(
        self, folder: Path, model: ModelShape, entries: Mapping[str, Entry], *, label: Path | None = None
    ) -> None:
        self.folder, self.model = folder, model
        self.label = label or folder  # name in errors
        self.entries = {name: entries[name] for name in sorted(entries, key=_place)}
        if not entries:
            raise MasksError(f"{self.label}: expected masks, got none")
        self._files = StoredFiles(folder)
        metadata = safe.load_metadata(folder)
        torch_dist.vet_objects(metadata, self._files, folder)
        stored = index.stored_tensors(metadata, folder)
        if stored.keys() != self.entries.keys():
            odd = sorted(stored.keys() ^ self.entries.keys())[0]
            raise MasksError(
                f"{folder}: expected the same weights in {MASKS_FILE} and in the index, got {odd} in only one; "
                "restore them"
            )
        self._boxes = {name: _boxes(folder, entry, stored[name]) for name, entry in self.entries.items()}
        needed: dict[str, int] = defaultdict(int)
        for boxes in self._boxes.values():
            for box in boxes:
                needed[box.piece.file] = max(needed[box.piece.file], box.piece.start + box.piece.length)
        index.check_files(folder, needed)

    @property
    def hash(self) -> str:
        """Layout-independent identity of the masks: a hash over names, shapes, patterns and all bits."""
        return sha256_json([[n, list(e.shape), e.pattern, e.digest] for n, e in self.entries.items()])

    @property
    def removed(self) -> int:
        """Number of weights that all masks remove."""
        return sum(entry.removed for entry in self.entries.values())

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """A rectangle of a mask: bool [rows, columns] on the CPU, True means kept. Rows are read by byte range."""
        first, last, _ = rows.indices(self._entry(name).shape[0])
        left, right, _ = columns.indices(self._entry(name).shape[1])
        kept = torch.empty(max(0, last - first), max(0, right - left), dtype=torch.bool)
        for box in self._boxes[name]:
            start = box.offsets[1] * self._per_byte(name)  # the box's first input
            top, bottom = max(first, box.offsets[0]), min(last, box.offsets[0] + box.sizes[0])
            west, east = max(left, start), min(right, start + box.sizes[1] * self._per_byte(name))
            if top < bottom and west < east:
                part = self._read(name, box, top, bottom, west - start, east - start)
                kept[top - first : bottom - first, west - left : east - left] = part
        return kept

    def row_blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A mask in consecutive blocks of rows, bool [rows, in], a few megabytes each."""
        out, inputs = self._entry(name).shape
        step = max(1, BLOCK_BYTES // inputs)
        for start in range(0, out, step):
            yield self.read(name, slice(start, min(start + step, out)))

    def shape_of(self, name: str) -> ModelShape:
        """The shape by which the axes of a mask go."""
        return self.model.of_layer(_place(name)[0])

    def check_model(self, shape: ModelShape, whose: str) -> None:
        """Raises MasksError, naming what differs, for a model of another shape. ``whose`` names that model."""
        differs = [field for field in _OF_LINEARS if getattr(self.model, field) != getattr(shape, field)]
        if not differs and self.model.by_layer() != shape.by_layer():
            raise MasksError(
                f"{self.label}: expected masks of this model, got those of one with other layers in {whose}"
            )
        if differs:
            pairs = (f"{field} is {getattr(self.model, field)} there and {getattr(shape, field)}" for field in differs)
            raise MasksError(
                f"{self.label}: expected masks of this model, got those of another: {', '.join(pairs)} in {whose}"
            )

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise MasksError(f"{self.label}: expected a mask for {name}, got none")
        return self.entries[name]

    def _per_byte(self, name: str) -> int:
        return 8 if self.entries[name].packed else 1

    def _read(self, name: str, box: index.Box, top: int, bottom: int, west: int, east: int) -> torch.Tensor:
        """Rows [top, bottom) of the mask, inputs [west, east) of the box."""
        numbers = torch.empty(bottom - top, box.sizes[1], dtype=torch.uint8)
        with as_masks_error():
            self._files.fill(numbers, box, top - box.offsets[0])
        if self.entries[name].packed:
            return unpack(numbers, west, east)
        if int(numbers.max()) > 1:
            raise MasksError(f"{self.label}: {name} is damaged: expected the bytes 0 and 1, got {int(numbers.max())}")
        return numbers[:, west:east].view(torch.bool)


def open_masks(path: str | Path) -> Masks:
    """Open a ``masks`` folder. Raises MasksError if it is missing, truncated, malicious, or inconsistent."""
    folder = storage.path(path).absolute()
    if not (folder / MASKS_FILE).is_file():
        raise MasksError(
            f"{folder}: expected masks with a {MASKS_FILE}, got none: they are elsewhere, or writing them was "
            "interrupted"
        )
    with as_masks_error():
        found = read_json(folder / MASKS_FILE)
        try:
            if found["version"] != VERSION:
                raise ValueError(f"version {show(found['version'])}, expected {VERSION}")
            model = _model(found["model"])
            entries = {str(name): _parse(entry) for name, entry in found["masks"].items()}
            recorded = str(found["hash"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MasksError(
                f"{folder / MASKS_FILE} is damaged ({type(error).__name__}: {error}): restore the file"
            ) from error
        for name, entry in entries.items():
            check_shape(folder, model, name, entry)
            _check_count(folder, name, entry)
        masks = Masks(folder, model, entries)
    if masks.hash != recorded:
        raise MasksError(
            f"{folder / MASKS_FILE} is damaged: expected the hash of its entries, got another; restore the file"
        )
    return masks


def find_masks(root: str | Path) -> Path | None:
    """The masks folder of the checkpoint ``root`` (a root, or one of its iterations), if it has one.

    Raises MasksError for a link that leads nowhere: the model would be taken for a dense one."""
    root = storage.path(root)
    for folder in (root, *([root.parent] if (root / "metadata.json").is_file() else [])):
        if (folder / MASKS).is_dir():
            return folder / MASKS
        if not storage.is_stored(folder) and os.path.lexists(folder / MASKS):
            raise MasksError(
                f"{folder / MASKS} is a file, or a link that leads nowhere: expected the folder of the model's masks; "
                "restore it, or remove it if the model is dense"
            )
    return None


def check_shape(folder: Path, model: ModelShape, name: str, entry: Entry) -> None:
    """Raises MasksError for a mask that is not of a linear of the model, has the wrong shape, or whose pattern does
    not divide its inputs."""
    match = _NAME.fullmatch(name)
    shapes = {}
    if match is not None and int(match[1]) < model.num_layers:
        shapes = {w.suffix: w.shape for w in weights_of_layer(model, int(match[1])) if w.is_linear}
    if match is None or match[2] not in shapes:
        raise MasksError(f"{folder}: expected masks of the model's linears, got one of {name}")
    if entry.shape != shapes[match[2]]:
        expected = list(shapes[match[2]])
        raise MasksError(f"{folder}: the mask of {name}: expected shape {expected}, got {list(entry.shape)}")
    if not Pattern.parse(entry.pattern).divides(entry.shape[1]):
        raise MasksError(
            f"{folder}: {name}: expected a pattern that divides its {entry.shape[1]} inputs, got {entry.pattern}"
        )


def _check_count(folder: Path, name: str, entry: Entry) -> None:
    pattern, size = Pattern.parse(entry.pattern), entry.shape[0] * entry.shape[1]
    exactly = None if pattern.n is None or pattern.m is None else size - size // pattern.m * pattern.n
    if not 0 <= entry.removed <= size or exactly not in (None, entry.removed):
        raise MasksError(
            f"{folder}: {name}: its entry says {entry.removed} of {size} weights removed, which {entry.pattern} "
            "cannot be"
        )


def entries_json(masks: Masks) -> dict[str, Any]:
    """The content of ``masks.json``."""
    entries = {name: asdict(entry) for name, entry in masks.entries.items()}
    return {"version": VERSION, "hash": masks.hash, "model": asdict(masks.model), "masks": entries}


@contextlib.contextmanager
def as_masks_error() -> Iterator[None]:
    """Turn other errors of this package in the block, such as CheckpointError, into MasksError."""
    try:
        yield
    except MasksError:
        raise
    except MegatronPruneError as error:
        raise MasksError(str(error)) from error


def _place(name: str) -> tuple[int, int]:
    """Sort key: the order of the forward pass."""
    match = _NAME.fullmatch(name)
    assert match is not None  # guaranteed by check_shape
    return int(match[1]), LINEARS.index(match[2])


def _model(found: Any) -> ModelShape:
    if set(found) - {"layers"} != {field.name for field in fields(ModelShape)}:
        raise ValueError(f"the model's shape has the keys {sorted(found)}")
    for key, value in found.items():
        if key != "layers" and (type(value) not in (int, bool) or not 0 <= value < 1 << 31):
            raise ValueError(f"the model's {key} is {show(value)}")
    return ModelShape.read(found)


def _parse(found: Any) -> Entry:
    out, inputs = found["shape"]
    numbers, texts = (out, inputs, found["removed"]), (found["pattern"], found["digest"])
    if set(found) != {field.name for field in fields(Entry)}:
        raise ValueError(f"an entry has the keys {sorted(found)}")
    if any(type(n) is not int for n in numbers) or any(type(t) is not str for t in texts):
        raise ValueError("an entry has other types than it should")
    if type(found["packed"]) is not bool:
        raise ValueError(f"packed is {show(found['packed'])}")
    return Entry((out, inputs), found["pattern"], found["removed"], found["digest"], found["packed"])


def _boxes(folder: Path, entry: Entry, stored: index.StoredTensor) -> tuple[index.Box, ...]:
    """The rectangles of a stored mask, in bytes. Raises MasksError if they do not cover it exactly."""
    width = bytes_of(entry.shape[1]) if entry.packed else entry.shape[1]
    expected = (entry.shape[0], width)
    if (stored.shape, stored.dtype) != (expected, torch.uint8):
        raise MasksError(
            f"{folder}: {stored.key}: expected uint8 {list(expected)}, got {stored.dtype} {list(stored.shape)}"
        )
    if any(piece.length < math.prod(piece.sizes) for piece in stored.pieces):
        raise MasksError(f"{folder}: a record of {stored.key} is truncated: copy the masks again")
    boxes = tuple(index.Box(piece, piece.offsets, piece.sizes, 0) for piece in stored.pieces)
    if not index.covers(boxes, expected):
        raise MasksError(
            f"{folder}: the shards of {stored.key}: expected the mask exactly once, got one too few or too many"
        )
    return boxes
