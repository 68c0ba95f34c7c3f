"""Makes Megatron load a checkpoint without executing its content.

Our reader checks every object of a checkpoint before Megatron reads it (``checkpoint/torch_dist.py``), to give a good
error. The protection itself is here, and also covers bytes that change between the two reads: the index is unpickled
through the reader's allow-list, and objects are loaded with ``weights_only``, which accepts what Megatron registered
as safe (``megatron.core.safe_globals``). Megatron's planner inherits torch's, which does neither.
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prune import storage
from megatron_prune.checkpoint import safe, safe_objects
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import iteration_directory
from megatron_prune.errors import CheckpointError, MegatronPruneError


def install() -> None:
    """Make this process load checkpoints safely from now on, after ``megatron.training`` is imported. A second call
    does nothing."""
    from megatron.training import checkpointing

    # For every other torch.load in Megatron and Transformer Engine: legacy files, optimizer files of ranks.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    # Transformer Engine 2.20 refuses its own state of delayed scaling, a pickle, unless told that it can be trusted: a
    # run under it could not resume. It is vetted below.
    os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
    install_index_reader(setattr)
    default_planner.DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    if not hasattr(checkpointing._load_base_checkpoint, "__wrapped__"):
        checkpointing._load_base_checkpoint = _vetted(checkpointing._load_base_checkpoint)


def install_index_reader(replace: Callable[[Any, str, Any], None]) -> None:
    """Make torch's readers of an index load it through the allow-list; ``replace`` works as ``setattr``."""
    reader = filesystem.FileSystemReader
    replace(filesystem, "pickle", _IndexPickle())
    if not hasattr(reader.read_metadata, "__wrapped__"):
        replace(reader, "read_metadata", _in_its_directory(reader.read_metadata))


_DIRECTORY: ContextVar[Path | None] = ContextVar("directory", default=None)  # of the index that is being read


def _in_its_directory(read: Any) -> Any:
    """torch's ``read_metadata``; a stream of an object store does not know its directory, but the reader does."""

    @functools.wraps(read)
    def reading(self: Any, *positional: Any, **named: Any) -> Any:
        token = _DIRECTORY.set(storage.path(str(self.path)))
        try:
            return read(self, *positional, **named)
        finally:
            _DIRECTORY.reset(token)

    return reading


class _IndexPickle:
    """A replacement for ``pickle`` in torch's readers of an index that loads through the allow-list."""

    def load(self, stream: Any) -> Any:
        name = str(getattr(stream, "name", "the index of a checkpoint"))
        return safe.read_metadata(stream.read(), name, _planning(), directory=_DIRECTORY.get())

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)


@functools.cache
def _planning() -> dict[tuple[str, str], Any]:
    """The real classes of saving plans, which Megatron compares with those of its next save."""
    found = {}
    for module, name in safe.PLANNING:
        try:
            found[module, name] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue  # absent in another version of torch or Python
    return found


def _load_bytes(self: default_planner.DefaultLoadPlanner, read_item: Any, value: Any) -> None:
    """torch's ``DefaultLoadPlanner.load_bytes``, with ``weights_only``."""
    key = read_item.dest_index.fqn
    try:
        loaded = torch.load(value, weights_only=True)
    except Exception as error:  # a broken record can raise anything
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error)[:200])
        raise CheckpointError(f"the record {key} is refused: {reason.strip()}") from error
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


def _vetted(load: Any) -> Any:
    """Megatron's ``_load_base_checkpoint``: vets what it loaded before any module gets its state, and names what it
    refused."""

    @functools.wraps(load)
    def loading(load_dir: Any, args: Any, *positional: Any, **named: Any) -> Any:
        try:
            found = load(load_dir, args, *positional, **named)
        except CheckpointException as error:
            raise _refusal(error, load_dir, args) from error
        state, name, *_ = found
        if state:
            safe_objects.vet_module_states(state, str(name))
        return found

    return loading


def _refusal(error: CheckpointException, load_dir: Any, args: Any) -> BaseException:
    """The reason as a CheckpointError if the checkpoint is at fault; else torch's own exception."""
    for reason, _ in error.failures.values():
        if isinstance(reason, MegatronPruneError):
            return CheckpointError(f"{load_dir}: {reason}")
        if isinstance(
            reason, (pickle.UnpicklingError, RuntimeError)
        ):  # of a tensor's record, which torch does not name
            step = getattr(args, "ckpt_step", None)
            try:
                open_checkpoint(iteration_directory(load_dir, step) if step else load_dir).refuse_damaged()
            except MegatronPruneError as refusal:
                return refusal
    return error
