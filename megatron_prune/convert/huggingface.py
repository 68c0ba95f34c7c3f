"""Models in Hugging Face format ⇄ Megatron checkpoints, tensor by tensor.

``tensors.py`` maps every Megatron weight to rows of Hugging Face tensors; import and export both use it. Both stream
blocks of rows, so memory is bounded by a few blocks (an export of matrices stored as [in, out] holds one whole). Import
pads the vocabulary, export removes the padding, and every tensor keeps its type, so an import followed by an export is
bit-exact.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_prune.artifacts import atomic_directory, check_space, explain_full_disk, read_json, write_json
from megatron_prune.checkpoint.layout import ModelShape, WeightLayout, vocabulary, weights
from megatron_prune.checkpoint.model_arguments import refuse_unrestored
from megatron_prune.checkpoint.parallel import Blocks
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.checkpoint.tracker import is_megatron, refuse_inside_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter, copy_side_files
from megatron_prune.convert import gguf_file, safetensors_io
from megatron_prune.convert.config import (
    args_from_config,
    config_from_args,
    family_of,
    kind_of,
    why_unexportable,
)
from megatron_prune.convert.families import ALL_FAMILIES, layered_llama
from megatron_prune.convert.families.model_family import ModelFamily
from megatron_prune.convert.masks import HUGGINGFACE_MASKS, export_masks, import_masks
from megatron_prune.convert.tensors import Segment, is_transposed, rows_of_tensors, rows_of_weight, segments
from megatron_prune.errors import CheckpointError
from megatron_prune.masks import MASKS, Masks, open_masks
from megatron_prune.masks.with_weights import guarded, masks_of

BLOCK_BYTES = 8 << 20
# Constants that old files hold next to the weights.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
_DOWNLOAD = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


def import_hf(
    hf: str | Path,
    save: str | Path,
    *,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    max_position_embeddings: int | None = None,
    workers: int = 1,
    allow_non_finite: bool = False,
) -> Checkpoint:
    """Write the Hugging Face model ``hf`` (a directory, or a name on the Hub) as the checkpoint ``save``.

    ``dtype`` casts every tensor; by default each keeps its type. ``workers`` processes share the work. Tokenizer files
    and config are copied to ``save/huggingface``; a ``masks.safetensors`` becomes ``save/masks``. Raises
    CheckpointError, before writing, for a model that cannot be represented or whose files are missing or truncated; for
    weights that are not finite, unless ``allow_non_finite``; and MasksError for masks that do not fit the model.
    """
    source = local_directory(hf)
    config = read_json(source / "config.json")
    args = args_from_config(
        config,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        tensor_model_parallel_size=tensor_model_parallel_size,
        max_position_embeddings=max_position_embeddings,
    )
    shape, family = ModelShape.from_args(args), family_of(config)
    tensors = safetensors_io.Tensors(source, family.other_names)
    if shape.tied and _head_differs(tensors, family, args["vocab_size"]):
        args["untie_embeddings_and_output_weights"] = True
        shape = ModelShape.from_args(args)
    _check_tensors(tensors, shape, args, source, family, one_type=dtype is None)
    main = dtype or tensors.dtype(family.tensor("embedding.word_embeddings.weight", None))
    with CheckpointWriter(save, args=args, dtype=main, huggingface=source) as writer:
        masks = None
        if (source / HUGGINGFACE_MASKS).is_file():
            masks = import_masks(source / HUGGINGFACE_MASKS, shape, family, writer.beside(MASKS)).folder
        imported = Imported(source, shape, family.kind, args["vocab_size"], dtype, masks)
        writer.add_all(imported.allowing(allow_non_finite), workers)
    return open_checkpoint(save)


@dataclass
class Imported(Blocks):
    """Megatron's weights from a Hugging Face directory, checked against the masks in the folder ``masks``, if any."""

    source: Path
    shape: ModelShape
    family: str
    vocabulary_size: int
    cast: torch.dtype | None
    masks: Path | None

    @cached_property
    def _tensors(self) -> safetensors_io.Tensors:
        return safetensors_io.Tensors(self.source, ALL_FAMILIES[self.family].other_names)

    @cached_property
    def _layouts(self) -> dict[str, WeightLayout]:
        return {layout.name: layout for layout in weights(self.shape)}

    @cached_property
    def _masks(self) -> Masks | None:
        return None if self.masks is None else open_masks(self.masks)

    def _pieces(self, name: str) -> list[Segment]:
        return segments(self._layouts[name], self.shape, self.vocabulary_size, ALL_FAMILIES[self.family])

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        layout = self._layouts[name]
        read = self._tensors.columns if is_transposed(layout, ALL_FAMILIES[self.family]) else self._tensors.rows
        blocks = _blocks(layout, self._pieces(name), read, self.dtype(name))
        return blocks if self._masks is None else guarded(self._masks, name, blocks)

    def dtype(self, name: str) -> torch.dtype:
        return self.cast or self._tensors.dtype(self._pieces(name)[0].name or "")


def export_hf(
    load: str | Path,
    hf: str | Path,
    *,
    max_shard_bytes: int = 5 << 30,
    workers: int = 1,
    files: Mapping[str, bytes] | None = None,
    allow_non_finite: bool = False,
    allow_missing_masks: bool = False,
    gguf: bool = False,
) -> Path:
    """Write the checkpoint ``load`` as a Hugging Face directory ``hf`` (new or empty), its masks as
    ``masks.safetensors``. ``workers`` processes share the files. ``files`` are additional files, content by name.
    ``gguf``: write the model a second time, as ``gguf_file.NAME`` in the directory.

    Raises CheckpointError for a model that no supported family can represent and for weights that are not finite
    (unless ``allow_non_finite``), MasksError for masks that do not fit the weights or
    are missing (unless ``allow_missing_masks``), UsageError for a ``gguf`` that
    cannot be written.
    """
    checkpoint = open_checkpoint(load)
    refuse_unrestored(checkpoint.args, str(load))
    masks = masks_of(checkpoint, allow_missing=allow_missing_masks)
    side = checkpoint.huggingface
    original = side / "config.json" if side is not None else None
    try:
        config = config_from_args(
            checkpoint.args,
            checkpoint.spec("embedding.word_embeddings.weight").dtype,
            read_json(original) if original is not None and original.is_file() else None,
        )
    except CheckpointError as error:
        settings = [one.get("settings") for one in checkpoint.pruning]
        added = any(isinstance(own, dict) and own.get("compensate") for own in settings)
        if not added or why_unexportable({**checkpoint.args, "add_bias_linear": False}, kind_of(checkpoint)):
            raise
        raise CheckpointError(f"{error}; flap added biases: prune with --no-compensate for a model without") from error
    if gguf:
        gguf_file.refuse(config, side)
    family = family_of(config)
    exported = Exported(checkpoint.directory, family.kind, None if masks is None else masks.folder)
    exported.allowing(allow_non_finite)
    target = Path(hf)
    refuse_inside_checkpoint("--hf", target)
    check_space(target, sum(checkpoint.spec(name).nbytes for name in checkpoint.names) * (1 + gguf))
    with explain_full_disk(target), atomic_directory(target) as folder:
        safetensors_io.write_sharded(folder, exported.entries, exported, max_shard_bytes, workers)
        if masks is not None:
            export_masks(masks, family, folder / HUGGINGFACE_MASKS)
        if side is not None:
            copy_side_files(side, folder)
        if family.unsaid is not None:
            shutil.copyfile(layered_llama.MODELING, folder / layered_llama.MODELING.name)
        for name, payload in (files or {}).items():
            (folder / name).write_bytes(payload)
        write_json(folder / "config.json", config)
        if gguf:
            gguf_file.write(folder)
    return target


@dataclass
class Exported(Blocks):
    """Hugging Face tensors from the checkpoint ``load``, checked against the masks in the folder ``masks``, if any."""

    load: Path
    family: str
    masks: Path | None

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.load)

    @cached_property
    def _masks(self) -> Masks | None:
        return None if self.masks is None else open_masks(self.masks)

    @cached_property
    def _made_of(self) -> dict[str, list[tuple[Segment, str, int]]]:
        shape = self._checkpoint.shape
        return rows_of_tensors(weights(shape), shape, vocabulary(self._checkpoint.args), ALL_FAMILIES[self.family])

    @cached_property
    def _transposed(self) -> frozenset[str]:
        """Megatron weights whose tensors are stored as [in, out]."""
        layouts = weights(self._checkpoint.shape)
        return frozenset(layout.name for layout in layouts if is_transposed(layout, ALL_FAMILIES[self.family]))

    @cached_property
    def entries(self) -> safetensors_io.Entries:
        """Type and shape of every tensor."""
        entries = {}
        for name, parts in self._made_of.items():
            spec = self._checkpoint.spec(parts[0][1])
            shape = (parts[-1][0].stop, *spec.shape[1:])
            entries[name] = (spec.dtype, shape[::-1] if parts[0][1] in self._transposed else shape)
        return entries

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        if self._made_of[name][0][1] in self._transposed:
            yield torch.cat(list(self._outputs(name))).T
        else:
            yield from self._outputs(name)

    def _outputs(self, name: str) -> Iterator[torch.Tensor]:
        step = _rows_per_block(*self.entries[name])
        for segment, weight, first in self._made_of[name]:
            last = first + segment.stop - segment.start
            rows = (self._checkpoint.read_rows(weight, at, min(at + step, last)) for at in range(first, last, step))
            yield from rows if self._masks is None else guarded(self._masks, weight, rows, first)

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name][0]


def _rows_per_block(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return max(1, BLOCK_BYTES // max(1, torch.Size(shape[1:]).numel() * dtype.itemsize))


def _blocks(
    layout: WeightLayout,
    pieces: list[Segment],
    read: Callable[[str, int, int], torch.Tensor],
    dtype: torch.dtype,
) -> Iterator[torch.Tensor]:
    """Rows of a Megatron weight in blocks of about BLOCK_BYTES; short segments are joined. ``read``: rows of a
    tensor."""
    step = _rows_per_block(dtype, layout.shape)
    held: list[torch.Tensor] = []
    for piece in pieces:
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            if held and sum(map(len, held)) + stop - start > step:
                yield torch.cat(held)
                held = []
            if piece.name is None:
                held.append(torch.zeros((stop - start, *layout.shape[1:]), dtype=dtype))
            else:
                held.append(read(piece.name, start, stop).to(dtype))
    if held:
        yield torch.cat(held)


def _head_differs(tensors: safetensors_io.Tensors, family: ModelFamily, vocabulary_size: int) -> bool:
    """True if a model whose config ties the output layer has one that is not the embedding: transformers keeps both."""
    head, embedding = (
        family.tensor("output_layer.weight", None),
        family.tensor("embedding.word_embeddings.weight", None),
    )
    if not {head, embedding} <= tensors.names or tensors.shape(head) != tensors.shape(embedding):
        return False
    for start in range(0, vocabulary_size, 4096):
        stop = min(start + 4096, vocabulary_size)
        if not torch.equal(*(tensors.rows(name, start, stop).double() for name in (head, embedding))):
            return True
    return False


def _check_tensors(
    tensors: safetensors_io.Tensors,
    shape: ModelShape,
    args: dict[str, Any],
    source: Path,
    family: ModelFamily,
    *,
    one_type: bool,
) -> None:
    """Raises CheckpointError if a tensor is missing, has the wrong shape or type, or is unknown."""
    known = set()
    for layout in weights(shape):
        rows = rows_of_weight(layout, shape, args["vocab_size"], family)
        for name, count in rows.items():
            expected = (count, *layout.shape[1:])
            expected = expected[::-1] if is_transposed(layout, family) else expected
            if name not in tensors.names:
                raise CheckpointError(f"{source} lacks the tensor {name}")
            if tensors.shape(name) != expected:
                raise CheckpointError(
                    f"{source}: {name} has shape {list(tensors.shape(name))}, expected {list(expected)} by config.json"
                )
        types = {tensors.dtype(name) for name in rows}
        if one_type and len(types) != 1:
            raise CheckpointError(f"{source}: {', '.join(rows)} differ in type; pass --dtype")
        known |= set(rows)
    ignored = {family.tensor("output_layer.weight", None)} if shape.tied else set()
    left = sorted(name for name in tensors.names - known - ignored if not name.endswith(_BUFFERS))
    if left:
        raise CheckpointError(
            f"{source} holds tensors that are not part of its model, {family.architecture}: {', '.join(left[:4])}"
        )


def local_directory(hf: str | Path) -> Path:
    """The directory ``hf``, or the local copy of the Hub's model of that name, downloaded if necessary. Raises
    CheckpointError if there is none or the download fails."""
    if Path(hf).is_dir():
        if is_megatron(Path(hf)):
            raise CheckpointError(
                f"{hf}: expected a Hugging Face model directory, got a Megatron checkpoint; export it with "
                f"`megatron-prune convert export --load {hf} --hf HF_DIR`"
            )
        if not (Path(hf) / "config.json").is_file():
            raise CheckpointError(f"{hf}: expected a Hugging Face model directory, got one without config.json")
        return Path(hf)
    if str(hf).count("/") != 1 or str(hf).startswith((".", "/", "~")):
        raise CheckpointError(f"{hf} is neither a directory nor a name on the Hugging Face Hub (owner/model)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(hf), allow_patterns=list(_DOWNLOAD)))
    except Exception as error:  # no network, no such model, no permission: the library's message says which
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{hf} could not be downloaded from the Hugging Face Hub: {reason}") from error
