"""Stream logical weights from a Megatron checkpoint saved at any parallel layout.

``open_checkpoint(path)`` reads the index and the stored arguments, checks that every file exists and
is long enough, and returns a ``Checkpoint`` whose weights have logical per-layer names
(``decoder.layers.3.mlp.linear_fc2.weight``). It reads `torch_dist` directories and legacy per-rank
files. Rows are read by byte range, so memory is bounded by the request. It needs no model, process
group, GPU or Megatron, and executes no code from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_prune import storage
from megatron_prune.artifacts import read_json, sha256_file
from megatron_prune.checkpoint import index, tracker
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout, weights
from megatron_prune.checkpoint.legacy import LegacySource, is_legacy
from megatron_prune.checkpoint.torch_dist import TorchDistSource
from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import MOST_JSON_BYTES, refuse_irregular, show

PRUNING_FILE = "pruning.json"
INTEGRITY_FILE = "integrity.json"
HUGGINGFACE_FOLDER = "huggingface"  # next to the tracker: tokenizer files and the model's Hugging Face config
FINGERPRINT_ELEMENTS = 64  # per logical tensor
# Blocks of this size stay in the caches and the allocator reuses their memory: half the CPU time of 64 MB blocks.
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorSpec:
    """A logical weight as stored: its per-layer name, global shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """An open checkpoint, made by ``open_checkpoint``. Thread-safe.

    ``root`` holds the tracker, ``directory`` the files. ``args`` are the stored Megatron arguments
    (values of Megatron's own classes are ``Opaque``) and ``shape`` the model they describe. ``names``
    are the logical weights in the order of the forward pass. ``format`` is Megatron's name of the
    format (``torch_dist``, or ``torch`` for per-rank files). ``stored`` are all tensors of a
    `torch_dist` checkpoint by stored key, including optimizer state.
    """

    def __init__(self, directory: Path, *, root: Path, iteration: int | None, release: bool) -> None:
        self.directory, self.root, self.release = directory, root, release
        source = LegacySource if is_legacy(directory) else TorchDistSource
        self._source: LegacySource | TorchDistSource = source(directory)
        self.format = self._source.format
        common = self._source.common
        self.args: dict[str, Any] = common.get("args") or {}
        if not self.args:
            raise CheckpointError(
                f"{directory}: expected Megatron's args in it, which say the model's shape, got none; save with "
                "Megatron's trainer"
            )
        self.iteration = _iteration(common, directory) if iteration is None else iteration
        self.shape = ModelShape.from_args(self.args)
        self.stored = self._source.stored
        self._layouts: dict[str, WeightLayout] = {w.name: w for w in weights(self.shape)}
        self.names = tuple(self._layouts)
        self._boxes = self._source.locate(self._layouts, self.shape)
        self.verify()

    # -- weights --------------------------------------------------------------------------------

    def spec(self, name: str) -> TensorSpec:
        """Shape and type of a logical weight."""
        return TensorSpec(name, self._layouts[name].shape, self._boxes[name][0].piece.dtype)

    def layout(self, name: str) -> WeightLayout:
        """Axes of a logical weight."""
        return self._layouts[name]

    def boxes(self, name: str) -> tuple[index.Box, ...]:
        """Where a logical weight is stored."""
        return self._boxes[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole weight."""
        return self.read_rows(name, 0, self._layouts[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a weight: [stop - start, ...], a new contiguous CPU tensor."""
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name} {list(spec.shape)}")
        out = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        for box in self._boxes[name]:
            first = max(start, box.offsets[0])
            last = min(stop, box.offsets[0] + box.sizes[0])
            if first < last:
                columns = (slice(o, o + s) for o, s in zip(box.offsets[1:], box.sizes[1:], strict=True))
                self._source.fill(out[(slice(first - start, last - start), *columns)], box, first - box.offsets[0])
        return out

    def row_blocks(self, name: str, max_bytes: int = _BLOCK_BYTES) -> Iterator[torch.Tensor]:
        """The weight in consecutive blocks of rows, each at most ``max_bytes`` but at least one row."""
        spec = self.spec(name)
        rows = max(1, min(max_bytes, _BLOCK_BYTES) // max(1, spec.nbytes // spec.shape[0]))
        for start in range(0, spec.shape[0], rows):
            yield self.read_rows(name, start, min(start + rows, spec.shape[0]))

    # -- metadata and hashes --------------------------------------------------------------------

    @cached_property
    def pruning(self) -> list[dict[str, Any]]:
        """The prunings that produced this checkpoint, oldest first; empty if none."""
        path = self.directory / PRUNING_FILE
        if not path.is_file():
            return []
        found = read_json(path)
        chain = found.get("chain", []) if isinstance(found, dict) else None
        if not isinstance(chain, list) or not all(isinstance(entry, dict) for entry in chain):
            raise CheckpointError(
                f"{path}: expected a list of prunings in 'chain', got something else; restore the file"
            )
        return chain

    @property
    def optimizer_form(self) -> str | None:
        """Megatron's name for the form of the optimizer state (see checkpoint/reshard.py); None if not stored."""
        content = self._source.common.get("content_metadata")
        found = content.get("distrib_optim_sharding_type") if isinstance(content, dict) else None
        return found if isinstance(found, str) else None

    @property
    def huggingface(self) -> Path | None:
        """The folder with the model's tokenizer files and Hugging Face config, next to the tracker, if any.

        The path in the stored args is not followed: it is from another machine, or from a stranger.
        """
        own = self.root / HUGGINGFACE_FOLDER
        if not own.is_dir():
            return None
        return storage.fetched(own) if storage.is_stored(own) else own  # tokenizer libraries read local files only

    def fingerprint(self) -> str:
        """Identity of the weights: SHA-256 over name, shape, type and evenly spaced elements of every logical
        tensor, in the order of ``names``. It does not depend on the layout or the stored keys."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in storage.each(self._sample, list(self.names), self.directory):
            digest.update(part)
        return digest.hexdigest()

    def _sample(self, name: str) -> bytes:
        """A weight's name, shape, type and evenly spaced elements."""
        spec = self.spec(name)
        numel = torch.Size(spec.shape).numel()
        count = min(FINGERPRINT_ELEMENTS, numel)
        elements = (self._element(name, i * (numel - 1) // max(1, count - 1)) for i in range(count))
        return json.dumps([name, list(spec.shape), str(spec.dtype)]).encode() + b"".join(elements)

    def full_hash(self, weights: Mapping[str, str] | None = None) -> str:
        """SHA-256 over the ``weight_hash`` of every logical tensor: like ``fingerprint``, but over all elements.

        ``weights``: those hashes by name, if several processes computed them.
        """
        found = {name: self.weight_hash(name) for name in self.names} if weights is None else weights
        return hashlib.sha256("".join(found[name] for name in self.names).encode()).hexdigest()

    def weight_hash(self, name: str) -> str:
        """SHA-256 over a logical tensor's name, shape, type and all its elements."""
        spec = self.spec(name)
        digest = hashlib.sha256(json.dumps([name, list(spec.shape), str(spec.dtype)]).encode())
        for block in self.row_blocks(name):
            digest.update(block.view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _element(self, name: str, number: int) -> bytes:
        """The bytes of one element of a weight, by row-major index."""
        row, column = divmod(number, torch.Size(self._layouts[name].shape[1:]).numel())
        for box in self._boxes[name]:
            first, left = box.offsets[0], box.offsets[1] if len(box.sizes) > 1 else 0
            width = box.sizes[1] if len(box.sizes) > 1 else 1
            if first <= row < first + box.sizes[0] and left <= column < left + width:
                return self._source.element(box, (row - first) * width + column - left)
        raise AssertionError((name, number))

    @property
    def rank_layout(self) -> tuple[int, int, int] | None:
        """Tensor-parallel size, pipeline stages and virtual stages of per-rank files; None for `torch_dist`, which
        loads at any layout."""
        return self._source.layout if isinstance(self._source, LegacySource) else None

    def verify(self, hashes: bool = False) -> None:
        """Check that every weight file exists and is long enough; with ``hashes``, also check SHA-256 against
        ``integrity.json``. Raises CheckpointError naming the file."""
        needed: dict[str, int] = defaultdict(int)
        for boxes in self._boxes.values():
            for box in boxes:
                needed[box.piece.file] = max(needed[box.piece.file], box.piece.start + box.piece.length)
        index.check_files(self.directory, needed)
        if hashes:
            self._verify_hashes(self.directory / INTEGRITY_FILE, needed)

    def refuse_damaged(self) -> None:
        """Check the record of every stored tensor, including optimizer state, without reading its elements. Raises
        CheckpointError naming a record that is damaged or asks for code."""
        self._source.refuse_damaged()

    def _verify_hashes(self, path: Path, needed: Iterable[str]) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: expected the hashes of the checkpoint's files, got no such file; omit --verify-integrity"
            )
        found = read_json(path)
        files = found.get("files") if isinstance(found, dict) else None
        if not isinstance(files, dict) or found.get("algorithm", "sha256") != "sha256":
            raise CheckpointError(f"{path}: expected SHA-256 hashes in 'files', got something else; restore the file")
        if unlisted := sorted(set(needed) - set(files)):
            raise CheckpointError(
                f"{path}: expected the hash of {unlisted[0]}, which holds weights, got none; restore the file"
            )
        for name, expected in files.items():
            file = self.directory / name
            if Path(name).name != name or not file.is_file():
                raise CheckpointError(f"{file} is missing, but {INTEGRITY_FILE} lists it: copy the checkpoint again")
            if file.suffix == ".json":
                refuse_irregular(file, MOST_JSON_BYTES)  # it would be hashed for long, and is never read
            if sha256_file(file) != expected:
                raise CheckpointError(
                    f"{file} is damaged: its SHA-256 is not the one in {INTEGRITY_FILE}; copy the checkpoint again"
                )


def _iteration(common: dict[str, Any], directory: Path) -> int:
    found = common.get("iteration", 0)
    if type(found) is not int or not 0 <= found < 1 << 62:
        raise CheckpointError(f"{directory} is damaged: its iteration is {show(found)}")
    return found


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory with a tracker file, or one of its ``iter_…``/``release`` directories.

    Raises CheckpointError, before any weight is read, if the checkpoint is missing, incomplete, truncated,
    malicious, or not a dense GPT.
    """
    storage.refuse_unusable("--load", path)
    found = tracker.resolve(storage.path(path))
    return Checkpoint(found.directory, root=found.root, iteration=found.iteration, release=found.release)
