"""Write a `torch_dist` checkpoint weight by weight, so that unmodified Megatron loads it.

``CheckpointWriter`` takes logical weights as blocks of rows and stores each block as one record, with
layers stacked under Megatron's homogeneous names. The directory is written atomically, with tracker,
index, rewritten ``args``, ``integrity.json`` and ``pruning.json``. Memory is bounded by a few blocks.
The result is a *release*: iteration 0, no samples consumed.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prune import screen
from megatron_prune.artifacts import atomic_directory, check_space, explain_full_disk, sha256_file, versions, write_json
from megatron_prune.checkpoint.layer_shapes import ENCODED, PATH, canonical
from megatron_prune.checkpoint.layout import (
    HeterogeneousShape,
    ModelShape,
    WeightLayout,
    layer_name,
    stacked_name,
    weights,
)
from megatron_prune.checkpoint.parallel import RECORD_BYTES, Blocks, Part, check_workers, write_shares
from megatron_prune.checkpoint.reader import (
    HUGGINGFACE_FOLDER,
    INTEGRITY_FILE,
    PRUNING_FILE,
    Checkpoint,
    open_checkpoint,
)
from megatron_prune.checkpoint.record import RecordFiles, Segment, object_record, tensor_record
from megatron_prune.checkpoint.tracker import TRACKER_FILE, refuse_inside_checkpoint, refuse_remote
from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import refuse_link_outside

# Files of a Hugging Face model that are copied along with its weights.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "merges.txt", "chat_template.jinja", "chat_template.json", *TOKENIZER_FILES,
)  # fmt: skip


class CheckpointWriter:
    """Context manager that writes ``root`` (``release/`` and the tracker) atomically.

        with CheckpointWriter("out", args=args, dtype=torch.bfloat16) as writer:
            for layout in weights(ModelShape.from_args(args)):
                writer.add(layout.name, layout.shape, blocks_of_rows)

    ``args`` are the Megatron arguments to store (after ``rewrite_args``). They define the weights that must be
    added, in any order. ``pruning`` is the provenance chain. ``huggingface`` is a folder of tokenizer files and
    config to copy; the stored ``tokenizer_model`` then names the copy. ``parts`` are weights that other
    processes have already written.

    Raises CheckpointError for a non-empty ``root``, too little disk space, a weight that is unknown, added
    twice or of the wrong shape, and a missing weight.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        args: Mapping[str, Any],
        dtype: torch.dtype,
        pruning: Sequence[Mapping[str, Any]] | None = None,
        huggingface: Path | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        refuse_remote("--save", root)
        refuse_inside_checkpoint("--save", root)
        self.root = Path(root).absolute()
        self.dtype = dtype
        self.args = rewrite_args(args, dtype)
        self.args |= canonical(self.args)
        self.shape = ModelShape.from_args(self.args)
        if self.args.get(ENCODED) and not isinstance(self.shape, HeterogeneousShape):
            self.args |= dict.fromkeys((PATH, ENCODED))  # equal layers are stacked, and built so
        self._pruning = [dict(entry) for entry in pruning or ()]
        self._huggingface = huggingface
        self._parts = parts
        self._layouts = {layout.name: layout for layout in weights(self.shape)}
        self._added: set[str] = set()
        self._entries: dict[str, dcp.TensorStorageMetadata] = {}
        self._storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
        self._stack = contextlib.ExitStack()

    # -- life cycle -----------------------------------------------------------------------------

    def __enter__(self) -> CheckpointWriter:
        written = {piece.name for part in self._parts for piece in part.pieces}
        to_come = sum(layout.numel for layout in self._layouts.values() if layout.name not in written)
        check_space(self.root, to_come * self.dtype.itemsize)
        self._stack.enter_context(explain_full_disk(self.root))
        self._root_scratch = self._stack.enter_context(atomic_directory(self.root))
        self._directory = self._root_scratch / "release"
        self._directory.mkdir()
        self._files = RecordFiles(self._directory)
        self._stack.callback(self._files.shutdown)
        self._parts_adopted = 0
        self._adopted: dict[str, str] = {}  # file: SHA-256
        for part in self._parts:
            self._adopt(part)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is not None:
                raise error
            self._finish()

    # -- weights --------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        shape: Sequence[int],
        blocks: Iterable[torch.Tensor],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add a logical weight of ``shape`` as consecutive blocks of its rows, each [rows, ...].

        ``dtype`` is the stored type (default: the writer's); blocks of other types are cast. Blocks are hashed
        and written in the background, so they must not change after they are yielded.
        """
        layout = self._layouts.get(name)
        if layout is None:
            raise CheckpointError(f"{name}: expected a weight of the model that the stored args describe, got another")
        if tuple(shape) != layout.shape:
            raise CheckpointError(f"{name}: expected {list(layout.shape)} as the stored args say, got {list(shape)}")
        if name in self._added:
            raise CheckpointError(f"{name}: expected each weight once, got it twice")
        self._added.add(name)
        dtype = dtype or self.dtype
        most = max(1, RECORD_BYTES // max(1, torch.Size(layout.shape[1:]).numel() * dtype.itemsize))
        row = 0
        for block in blocks:
            if tuple(block.shape[1:]) != layout.shape[1:]:
                raise CheckpointError(
                    f"{name}: expected blocks of rows of {list(layout.shape)}, got one of {list(block.shape)}"
                )
            for part in torch.split(block.detach().to(device="cpu", dtype=dtype), most):
                self._submit(layout, row, part)
                row += len(part)
        if row != layout.shape[0]:
            raise CheckpointError(f"{name}: expected {layout.shape[0]} rows, got {row}")

    def add_all(self, blocks: Blocks, workers: int = 1) -> None:
        """Add every weight of the model from ``blocks``, in this process or in ``workers`` processes."""
        workers = check_workers(workers)
        if workers == 1:
            sizes = (layout.numel * blocks.dtype(layout.name).itemsize for layout in self._layouts.values())
            with screen.Bar(sum(sizes), f"writing {self.root}", "B") as bar:
                for layout in self._layouts.values():
                    rows = bar.over(blocks.checked_rows(layout.name), None)
                    self.add(layout.name, layout.shape, rows, dtype=blocks.dtype(layout.name))
            return
        folder = self._root_scratch / ".shares"
        for part in write_shares(folder, list(self._layouts.values()), blocks, workers):
            self._adopt(part)
        shutil.rmtree(folder)

    def _submit(self, layout: WeightLayout, row: int, block: torch.Tensor) -> None:
        index, sizes = self._enter(layout, (row, *(0 for _ in layout.shape[1:])), block.shape, block.dtype)
        self._write(index, tensor_record, block.reshape(sizes).contiguous())

    def _enter(
        self, layout: WeightLayout, offsets: Sequence[int], sizes: Sequence[int], dtype: torch.dtype
    ) -> tuple[dcp.MetadataIndex, torch.Size]:
        """Add a rectangle of a weight to the index; returns its index key and stored size."""
        apart = layout.layer is None or isinstance(self.shape, HeterogeneousShape)
        layer, key = ((), layout.name) if apart else ((layout.layer,), stacked_name(layout.suffix))
        stored_offsets = torch.Size((*layer, *offsets))
        stored_sizes = torch.Size((*(1 for _ in layer), *sizes))
        entry = self._entries.get(key)
        if entry is None:
            size = torch.Size((*((self.shape.num_layers,) if layer else ()), *layout.shape))
            entry = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), size, [])
            self._entries[key] = entry
        if entry.properties.dtype != dtype:
            raise CheckpointError(
                f"{layout.name}: all layers must have the same type, got {dtype} and {entry.properties.dtype}"
            )
        entry.chunks.append(dcp.ChunkStorageMetadata(stored_offsets, stored_sizes))
        return dcp.MetadataIndex(key, stored_offsets), stored_sizes

    def _adopt(self, part: Part) -> None:
        """Add the pieces of a part to this checkpoint by hard-linking its files."""
        self._parts_adopted += 1
        number, names = self._parts_adopted, {}
        for position, (file, digest) in enumerate(part.hashes.items()):
            names[file] = f"__{number}_{position}.distcp"
            _link(part.folder / file, self._directory / names[file])
            self._adopted[names[file]] = digest
        for piece in part.pieces:
            layout = self._layouts.get(piece.name)
            if layout is None:
                raise CheckpointError(
                    f"{part.folder}: expected weights of this model, got {piece.name}; delete the folder"
                )
            index, _ = self._enter(layout, piece.offsets, piece.sizes, piece.dtype)
            self._storage[index] = _StorageInfo(names[piece.file], piece.start, piece.length)
            self._added.add(piece.name)

    def _write(self, index: dcp.MetadataIndex, make: Callable[[Any, int], list[Segment]], value: Any) -> None:
        self._storage[index] = _StorageInfo(*self._files.append(make, value))

    def add_file(self, name: str, payload: bytes) -> None:
        """Write a small file next to the tracker; ``name`` is its path under ``root`` (e.g. ``pruning/plan.json``)."""
        path = self._root_scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)

    def beside(self, name: str) -> Path:
        """The temporary path at which to write ``name`` (e.g. ``masks``), which ends up next to the tracker."""
        return self._root_scratch / name

    # -- finishing ------------------------------------------------------------------------------

    def _finish(self) -> None:
        missing = [name for name in self._layouts if name not in self._added]
        if missing:
            raise CheckpointError(
                f"expected every weight of the model, got none for {missing[0]} and {len(missing) - 1} more"
            )
        if self._huggingface is not None:
            self._carry_along(self._huggingface)
        self._write_objects()
        self._files.close()
        metadata = dcp.Metadata(
            state_dict_metadata={
                **self._entries,
                **{key: dcp.BytesStorageMetadata() for key in self._objects},
            },
            storage_data=self._storage,
            storage_meta=dcp.StorageMeta(),
            version="1.0.0",
        )
        (self._directory / ".metadata").write_bytes(pickle.dumps(metadata))
        write_json(self._directory / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        # Reading it back checks index and coverage before the final rename.
        written = open_checkpoint(self._directory)
        write_json(
            self._directory / PRUNING_FILE,
            {
                "version": 1,
                "fingerprint": written.fingerprint(),
                "chain": self._pruning,
                "versions": versions(),
            },
        )
        hashes = self._adopted | self._files.hashes
        for path in self._directory.iterdir():
            if path.name not in hashes:
                hashes[path.name] = sha256_file(path)
        write_json(
            self._directory / INTEGRITY_FILE,
            {"algorithm": "sha256", "files": dict(sorted(hashes.items()))},
        )
        (self._root_scratch / TRACKER_FILE).write_text("release")

    def _carry_along(self, source: Path) -> None:
        """Copy tokenizer and config, and make the stored args name the copy."""
        folder = self._root_scratch / HUGGINGFACE_FOLDER
        folder.mkdir()
        copy_side_files(source, folder)
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            self.args |= {
                "tokenizer_type": "HuggingFaceTokenizer",
                "tokenizer_model": str(self.root / HUGGINGFACE_FOLDER),
            }

    def _write_objects(self) -> None:
        """Write the common state, and one empty record shared by every module's `_extra_state`."""
        common = dcp.MetadataIndex("common_state/shard_0_1")
        self._write(common, object_record, [common_state(self.args)])
        extra = extra_state_keys(self.shape)
        self._write(dcp.MetadataIndex(extra[0]), object_record, [torch.empty(0, dtype=torch.uint8)])
        for key in extra[1:]:
            self._storage[dcp.MetadataIndex(key)] = self._storage[dcp.MetadataIndex(extra[0])]
        self._objects = (common.fqn, *extra)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer and config of a Hugging Face model. MegatronPruneError for links that lead out of ``source``."""
    for file in _side_files(source):
        shutil.copyfile(file, target / file.name)


def _side_files(source: Path) -> list[Path]:
    found = [source / name for name in SIDE_FILES if (source / name).is_file()]
    for file in found:
        refuse_link_outside(file, source)
    return found


def refuse_uncarried(parent: Checkpoint) -> None:
    """Read what a checkpoint that is made from ``parent`` takes over from it in the end, after hours of work: the chain
    of prunings and the files of Hugging Face. MegatronPruneError for what cannot be read, or must not be copied."""
    _ = parent.pruning
    if parent.huggingface is not None:
        _side_files(parent.huggingface)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


# The other objects of a checkpoint: arguments, counters, and the empty state of every module.


# Arguments of the run that saved the parent, not of the model.
_RUN_ARGUMENTS = (
    "load",
    "save",
    "pretrained_checkpoint",
    "rank",
    "local_rank",
    "ckpt_step",
    "finetune",
    "exit_interval",
)
# Modules whose `_extra_state` Transformer Engine or Megatron's local layers read when loading.
_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def rewrite_args(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Stored arguments for training from the start: no consumed samples, no paths of the old run.

    Values of Megatron's own classes (enumerations that Megatron does not restore) are left out, so that
    the result loads anywhere with ``weights_only``.
    """
    kept = {key: value for key, value in args.items() if key not in _RUN_ARGUMENTS and _plain(value)}
    return kept | {
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "ckpt_format": "torch_dist",
    }


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str, torch.dtype)


def common_state(args: Mapping[str, Any]) -> dict[str, Any]:
    """The common state that Megatron expects, with these (rewritten) arguments, for training from the start."""
    return {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def extra_state_keys(shape: ModelShape) -> list[str]:
    """Keys of every module's `_extra_state` in the index of a checkpoint."""
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm") if shape.qk_norm else ()
    layers = shape.num_layers
    if isinstance(shape, HeterogeneousShape):
        here = [(n, module) for n in range(layers) for module in (*_EXTRA_STATE, *norms) if shape.layers[n].has(module)]
        return [
            *(f"{layer_name(n, module)}._extra_state/shard_0_1" for n, module in here),
            "decoder.final_layernorm._extra_state/shard_0_1",
        ]
    in_blocks = [
        f"{stacked_name(module)}._extra_state/shard_{layer}_{layers}"
        for module in (*_EXTRA_STATE, *norms)
        for layer in range(layers)
    ]
    return [*in_blocks, "decoder.final_layernorm._extra_state/shard_0_1"]
