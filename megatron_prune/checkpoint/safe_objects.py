"""Read the arguments that a checkpoint stores, and legacy files, without running what they hold.

``torch.load`` reads them with ``weights_only``, through an allow-list: what Megatron's own list allows becomes an inert
``Opaque``, so that Megatron need not be imported. What comes back is checked to be a tree of bounded size, so that
nobody who walks it walks for ever.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import reprlib
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_prune.errors import CheckpointError

_MOST_VALUES, _DEEPEST = 1_000_000, 64  # of what a walk through a loaded object may meet


class Opaque:
    """Stands for an object that a checkpoint mentions and that nothing here looks at."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"Opaque{reprlib.repr(getattr(self, 'arguments', ()))}"


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


def load_common(payload: bytes, origin: str) -> dict[str, Any]:
    """The common state of a checkpoint (a ``torch.save`` payload), read with ``weights_only``.

    ``args`` in it comes back as a plain dictionary; values of Megatron's own classes in it are
    ``Opaque``. ``origin`` names the source in errors.
    """
    what = f"{origin}: the common state"
    return _as_state(_load(io.BytesIO(payload), what), what)


def load_legacy(path: Path) -> dict[str, Any]:
    """One ``model_optim_rng.pt``: ``args`` as a plain dictionary, tensors mapped into memory and not read.

    Raises CheckpointError when it is missing, truncated, asks for code, or is no dictionary.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
    return _as_state(_load(path, str(path)), str(path))


def refuse_compression(archive: zipfile.ZipFile) -> None:
    """``torch.save`` never compresses. What is compressed may be a thousand times as large as its file."""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{entry.filename} in it is compressed")


def _load(source: Path | io.BytesIO, what: str) -> Any:
    allowed: list[Any] = [
        (argparse.Namespace, "argparse.Namespace"),
        (types.SimpleNamespace, "types.SimpleNamespace"),
        *((Opaque, name) for name in _COMMON_IGNORED),
    ]
    try:
        with zipfile.ZipFile(source) as archive:
            refuse_compression(archive)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with _only_allowing(allowed):
            mapped = isinstance(source, Path)
            value = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        _check_tree(value)
    except Exception as error:  # refused globals, broken archives
        reason = str(error).strip().splitlines() or ["unreadable"]
        detail = next((line.strip() for line in reason if "GLOBAL" in line), reason[0])
        raise CheckpointError(f"{what} is refused: {detail}") from error
    return value


@contextlib.contextmanager
def _only_allowing(allowed: list[Any]) -> Iterator[None]:
    """Megatron registers its real classes with torch; mixed with inert ones, a pickle would meet some of both."""
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)


def _check_tree(value: Any) -> None:
    """Refuse what contains itself, or says a few things so many times over that a walk through it never ends."""
    waiting, met = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        met += 1
        if met > _MOST_VALUES or depth > _DEEPEST:
            raise ValueError("it contains itself, or is nested without end")
        if isinstance(value, dict):
            waiting.extend((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting.extend((part, depth + 1) for part in value)
        elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
            waiting.append((vars(value), depth + 1))


def _as_state(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is a {type(value).__name__}, expected a dictionary")
    if isinstance(value.get("args"), (argparse.Namespace, types.SimpleNamespace)):
        value["args"] = vars(value["args"])
    args = value.get("args")
    if args is not None and not (isinstance(args, dict) and all(isinstance(key, str) for key in args)):
        raise CheckpointError(f"{what} is refused: its args are no arguments")
    return value
