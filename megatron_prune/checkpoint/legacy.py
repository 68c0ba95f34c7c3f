"""The weights of a checkpoint in Megatron's legacy format: one ``mp_rank_XX[_YYY]/model_optim_rng.pt`` per rank.

Each file holds the state of one tensor-parallel rank of one pipeline stage, with local layer numbers. Counting layers
in the order of the forward pass (with virtual pipeline: chunk ``model0`` over all stages, then ``model1``, …) gives
the global numbers for even, uneven and interleaved splits. Tensors are memory-mapped; nothing in the files is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megatron_prune import storage
from megatron_prune.checkpoint.index import Box, Piece, StoredTensor
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout
from megatron_prune.checkpoint.safe_objects import load_legacy, vet_file
from megatron_prune.errors import CheckpointError

RANK_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?")
_CHUNK = re.compile(r"model(\d{0,3})")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,5})\.(.+)")
# Megatron's local layer names → Transformer Engine's, which the layout table uses.
_RENAMED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored: pipeline stage, model chunk of that stage, and key in that chunk."""

    stage: int
    chunk: str
    key: str


def is_legacy(directory: Path) -> bool:
    """True for a directory of per-rank files."""
    return directory.is_dir() and any(_RANK.fullmatch(folder.name) for folder in directory.iterdir())


class LegacySource:
    """A ``Checkpoint``'s source of per-rank files. Raises CheckpointError if a rank is missing or damaged."""

    format = "torch"

    def __init__(self, directory: Path) -> None:
        if storage.is_stored(directory):
            raise CheckpointError(
                f"{directory} holds legacy per-rank files, which can only be read from a disk, also by Megatron: copy "
                "it to a disk, or convert it to a torch_dist checkpoint with `megatron-prune convert rewrite`"
            )
        self._directory = directory
        self._files = {rank: f"{name}/{RANK_FILE}" for rank, name in self._folders().items()}
        self._states = {rank: load_legacy(directory / file) for rank, file in self._files.items()}
        self.refuse_damaged()
        first = self._states.get((0, 0))
        if first is None:
            raise CheckpointError(
                f"{directory}: expected the folder of rank (0, 0), got none; copy the checkpoint again"
            )
        self.common: dict[str, Any] = first
        args = first.get("args") or {}
        self._tp, self._pp = (
            args.get(f"{name}_model_parallel_size") or 1 + max(rank[axis] for rank in self._states)
            for axis, name in enumerate(("tensor", "pipeline"))
        )
        self._refuse_missing_ranks()
        self._rank_of = {file: rank for rank, file in self._files.items()}
        self.stored: dict[str, StoredTensor] = {}

    def refuse_damaged(self) -> None:
        """Raises CheckpointError if another file of a rank (its optimizer) asks for code: Megatron loads those too."""
        for file in sorted(self._directory.glob("mp_rank_*/*.pt")):
            if file.name != RANK_FILE:
                vet_file(file)

    def _folders(self) -> dict[tuple[int, int], str]:
        """Folder of every (tensor-parallel rank, pipeline stage)."""
        found: dict[tuple[int, int], str] = {}
        for folder in sorted(self._directory.glob("mp_rank_*")):
            match = _RANK.fullmatch(folder.name)
            if match is None:
                raise CheckpointError(
                    f"{folder}: expected mp_rank_TT or mp_rank_TT_PPP, of a tensor and pipeline rank, got another name"
                )
            rank = (int(match[1]), int(match[2] or 0))
            if rank in found:
                raise CheckpointError(
                    f"{self._directory}: expected one folder per rank, got {found[rank]} and {folder.name}; remove "
                    "one of them"
                )
            found[rank] = folder.name
        return found

    def _refuse_missing_ranks(self) -> None:
        if not all(type(size) is int and 1 <= size <= 10_000 for size in (self._tp, self._pp)):
            raise CheckpointError(
                f"{self._directory}: its stored args: expected sizes from 1 to 10000, got TP={self._tp}, PP={self._pp}"
            )
        said = f"{self._directory}: expected the ranks of TP={self._tp}, PP={self._pp}, as its stored args say, got"
        for tp, stage in self._states:
            if tp >= self._tp or stage >= self._pp:
                raise CheckpointError(f"{said} tensor-parallel rank {tp} of stage {stage} too")
        for tp, stage in product(range(self._tp), range(self._pp)):
            if (tp, stage) not in self._states:
                raise CheckpointError(f"{said} none for tensor-parallel rank {tp} of stage {stage}")

    @property
    def layout(self) -> tuple[int, int, int]:
        """Tensor-parallel size, pipeline stages, and model chunks per stage."""
        return self._tp, self._pp, len(self._chunks) // self._pp

    # -- where the weights are -------------------------------------------------------------------

    def locate(self, layouts: Mapping[str, WeightLayout], shape: ModelShape) -> dict[str, tuple[Box, ...]]:
        """The boxes of every logical weight. Raises CheckpointError if a weight is missing or unknown, or its shape
        contradicts the stored args."""
        places = self._places(shape)
        unknown = sorted(places.keys() - layouts.keys())
        if unknown:
            raise CheckpointError(
                f"{self._directory}: expected the weights of a dense GPT of Megatron Core, got others too: "
                f"{', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}"
            )
        missing = [name for name in layouts if name not in places]
        if missing:
            raise CheckpointError(
                f"{self._directory}: expected {missing[0]}, which its stored args require, got a checkpoint without it"
            )
        return {name: self._boxes(layout, places[name], shape) for name, layout in layouts.items()}

    def _places(self, shape: ModelShape) -> dict[str, _Place]:
        """Place by logical name. Pipeline stages are visited in the order of the forward pass."""
        places: dict[str, _Place] = {}
        before = 0
        for chunk, stage in self._chunks:
            layers = set()
            for key in self._state(0, stage, chunk):
                name = key
                if match := _LAYER.fullmatch(key):
                    layers.add(int(match[1]))
                    name = f"decoder.layers.{before + int(match[1])}.{match[2]}"
                for ours, theirs in _RENAMED.items():
                    name = name.replace(f".{ours}", f".{theirs}") if match else name
                last_stage_of_tied = shape.tied and name == "output_layer.weight"  # a copy of the embedding
                if name.endswith("_extra_state") or last_stage_of_tied:
                    continue
                if name in places:
                    raise CheckpointError(
                        f"{self._directory}: expected {name} in one place, got it in two; copy the checkpoint again"
                    )
                places[name] = _Place(stage, chunk, key)
            if layers != set(range(len(layers))):
                raise CheckpointError(
                    f"{self._directory}: stage {stage} ({chunk}): expected layers 0, 1, …, got {sorted(layers)}"
                )
            before += len(layers)
        if before != shape.num_layers:
            raise CheckpointError(
                f"{self._directory}: expected {shape.num_layers} layers in all stages, as its stored args say, "
                f"got {before}"
            )
        return places

    @cached_property
    def _chunks(self) -> list[tuple[str, int]]:
        """(chunk, stage) in the order of the forward pass. Raises CheckpointError if ranks have different chunks."""
        kinds = {tuple(sorted((key for key in state if _CHUNK.fullmatch(key)), key=_number))
                 for state in self._states.values()}  # fmt: skip
        if len(kinds) != 1 or not (chunks := kinds.pop()):
            raise CheckpointError(
                f"{self._directory}: expected the same model chunks in every rank, got different ones or none"
            )
        if list(chunks) not in (["model"], [f"model{i}" for i in range(len(chunks))]):
            raise CheckpointError(
                f"{self._directory}: expected the model chunks model0, model1, …, got {', '.join(chunks)}"
            )
        return [(chunk, stage) for chunk in chunks for stage in range(self._pp)]

    def _state(self, tp: int, stage: int, chunk: str) -> Mapping[str, Any]:
        state = self._states[tp, stage][chunk]
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise CheckpointError(
                f"{self._directory}: {chunk} of rank ({tp}, {stage}): expected tensors by name, got something else"
            )
        if "language_model" in state:
            raise CheckpointError(
                f"{self._directory}: expected a model of Megatron Core, got one from before it (language_model)"
            )
        return state

    def _boxes(self, layout: WeightLayout, place: _Place, shape: ModelShape) -> tuple[Box, ...]:
        axis = layout.tp_axis
        ranks = range(self._tp if axis is not None else 1)  # replicated: one rank is enough
        expected = list(layout.shape)
        if axis is not None:
            if layout.shape[axis] % self._tp:
                raise CheckpointError(
                    f"{self._directory}: {layout.name}: expected a size that {self._tp} ranks divide, got {expected}"
                )
            expected[axis] //= self._tp
        boxes: list[Box] = []
        for tp in ranks:
            tensor = self._state(tp, place.stage, place.chunk).get(place.key)
            file = self._files[tp, place.stage]
            if not isinstance(tensor, torch.Tensor) or list(tensor.shape) != expected:
                found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise CheckpointError(
                    f"{self._directory / file}: {place.key}: expected {expected} from the stored args, got {found}"
                )
            piece = Piece(
                f"{place.chunk}.{place.key}", tensor.dtype, (0,) * tensor.ndim, tuple(tensor.shape), file, 0, 0
            )
            if boxes and boxes[0].piece.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{self._directory}: {layout.name}: expected one type, got {boxes[0].piece.dtype} and "
                    f"{tensor.dtype}"
                )
            boxes += _in_whole(piece, layout, shape, axis, tp)
        return tuple(boxes)

    # -- numbers ---------------------------------------------------------------------------------

    def _tensor(self, piece: Piece) -> torch.Tensor:
        chunk, _, key = piece.key.partition(".")
        tensor: torch.Tensor = self._states[self._rank_of[piece.file]][chunk][key]
        return tensor

    def fill(self, target: torch.Tensor, box: Box, first: int) -> None:
        """Copy rows of a box, starting at its row ``first``, into ``target`` [rows, ...]."""
        begin = box.skip + first * torch.Size(box.sizes[1:]).numel()
        target.copy_(self._tensor(box.piece).reshape(-1)[begin : begin + target.numel()].view(target.shape))

    def element(self, box: Box, number: int) -> bytes:
        """The bytes of one element of a box, by row-major index."""
        flat = self._tensor(box.piece).reshape(-1)
        return flat[box.skip + number].reshape(1).view(torch.uint8).numpy().tobytes()


def _number(chunk: str) -> int:
    return int(chunk.removeprefix("model") or 0)


def _in_whole(piece: Piece, layout: WeightLayout, shape: ModelShape, axis: int | None, tp: int) -> Sequence[Box]:
    """The rectangles of the whole weight that a rank's shard covers."""
    if axis == 0 and layout.axes[0] == "fc1" and shape.gated:  # [gate_r; up_r], one slice of each half
        rows, width = piece.sizes[0] // 2, torch.Size(piece.sizes[1:]).numel()
        sizes, rest = (rows, *piece.sizes[1:]), (0,) * (len(piece.sizes) - 1)
        return [
            Box(piece, (half * layout.shape[0] // 2 + tp * rows, *rest), sizes, half * rows * width) for half in (0, 1)
        ]
    offsets = tuple(tp * extent if number == axis else 0 for number, extent in enumerate(piece.sizes))
    return [Box(piece, offsets, piece.sizes, 0)]
