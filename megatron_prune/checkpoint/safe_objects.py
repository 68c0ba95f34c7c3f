"""Read the objects that a checkpoint stores, and legacy files, without executing code from them.

``torch.load`` reads them with ``weights_only`` and an allow-list: classes on Megatron's own list become inert
``Opaque`` objects, so that Megatron need not be imported. The result is checked to be a tree of bounded size, so that
traversing it terminates.

A module's ``_extra_state`` is a nested pickle: Transformer Engine stores it as the bytes of a tensor, and unpickles
them when the model is loaded. It is checked here against a separate allow-list.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import pickle
import reprlib
import threading
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from megatron_prune.checkpoint.pickle_limits import refuse_absurd
from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import reason, show_text

_ALLOWING = threading.Lock()
_MOST_VALUES, _DEEPEST = 1_000_000, 64  # limits on the values and the depth of a loaded object
_MOST_ENTRIES = 100_000  # of an archive: torch.save writes one per tensor, and a few
MOST_PICKLE_BYTES = 64 << 20  # of the part of a stored object that is not tensors
_ENTRY_BYTES = 512  # of an archive's directory, per entry
MOST_OBJECT_BYTES = 1 << 30  # of a stored object that is read whole


class Opaque:
    """Inert placeholder for an object of a checkpoint that this package does not use."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"Opaque{reprlib.repr(getattr(self, 'arguments', ()))}"


class _Stream(Opaque):
    """Placeholder for an ``io.BytesIO`` that keeps its bytes."""

    content = b""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and state and isinstance(state[0], bytes):
            self.content = state[0]


# Classes that Megatron (megatron.core.safe_globals) allows in the common state. Here they become ``Opaque``.
_COMMON_IGNORED = (
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
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

# Names in Transformer Engine's module states, as allowed by Megatron's SafeUnpickler.
_IN_MODULE_STATE = {
    *(("builtins", name) for name in ("dict", "list", "tuple", "int", "float", "bool", "bytes", "str")),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.storage", "UntypedStorage"),
    *(
        ("transformer_engine.common.recipe", name)
        for name in (
            "DelayedScaling",
            "Float8CurrentScaling",
            "Float8BlockScaling",
            "MXFP8BlockScaling",
            "NVFP4BlockScaling",
            "Format",
            "_FormatHelper",
            "MMParams",
            "QParams",
        )
    ),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
_STORAGE_IN_MODULE_STATE = {
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
}


def load_common(payload: bytes, origin: str) -> dict[str, Any]:
    """Read the common state of a checkpoint (a ``torch.save`` payload) with ``weights_only``.

    Its ``args`` become a plain dictionary; values of Megatron's own classes are ``Opaque``.
    ``origin`` names the source in errors.
    """
    what = f"{origin}: the common state"
    return _as_state(_load(io.BytesIO(payload), what), what)


def vet(payload: bytes, key: str, origin: str) -> None:
    """Raise CheckpointError unless Megatron can safely load the object record ``key``: it must be in the format of
    ``torch.save`` and hold only classes on the allow-list, also in a nested module state."""
    what = f"{origin}: the record {key}"
    value = _load(io.BytesIO(payload), what)
    if is_module_state(key):
        _vet_module_state(value, what)


def is_module_state(key: str) -> bool:
    """True for the key of a module state, which Transformer Engine stores besides the weights."""
    return "_extra_state" in key


def load_legacy(path: Path) -> dict[str, Any]:
    """Open one ``model_optim_rng.pt``: ``args`` as a plain dictionary, tensors memory-mapped.

    Raises CheckpointError if it is missing or truncated, asks for code, or is not a dictionary.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so the checkpoint is incomplete: copy it again")
    return _as_state(_load(path, str(path)), str(path))


def vet_file(path: Path) -> None:
    """Raise CheckpointError if a ``torch.save`` file asks for code."""
    _load(path, str(path))


def vet_module_states(value: Any, what: str) -> None:
    """Raise CheckpointError if a module's ``_extra_state`` in a loaded state asks for code, because Transformer
    Engine would unpickle it. ``value`` is a tree of bounded size."""
    if isinstance(value, dict):
        for key, part in value.items():
            if isinstance(key, str) and is_module_state(key):
                _vet_module_state(part, f"{what}: {key}")
            else:
                vet_module_states(part, what)
    elif isinstance(value, (list, tuple)):
        for part in value:
            vet_module_states(part, what)


def _vet_module_state(value: Any, what: str) -> None:
    if isinstance(value, torch.Tensor):
        _vet_pickle(value, what)
    elif isinstance(value, (_Stream, io.BytesIO)):  # of Transformer Engine before 2.0
        content = value.content if isinstance(value, _Stream) else value.getvalue()
        if content:
            _load(io.BytesIO(content), what)
    elif isinstance(value, dict):
        for part in value.values():
            _vet_module_state(part, what)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _vet_module_state(part, what)


def _vet_pickle(tensor: torch.Tensor, what: str) -> None:
    """Check the bytes of a tensor of any type; Transformer Engine ignores the type."""
    try:
        if not tensor.numel():
            return
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        refuse_absurd(content)
        _ModuleStateUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{what} is refused: {reason(error)}") from error


class _ModuleStateUnpickler(pickle.Unpickler):
    """Replaces every allowed name with ``Opaque``, so that nothing is built."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGE_IN_MODULE_STATE:
            return _storage
        if (module, name) in _IN_MODULE_STATE:
            return Opaque
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no module's state needs")


def _storage(content: bytes) -> Opaque:
    with _only_allowing([]):
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return Opaque()


@contextlib.contextmanager
def open_archive(source: IO[bytes], most_entries: int = _MOST_ENTRIES) -> Iterator[zipfile.ZipFile]:
    """The archive that ``torch.save`` wrote. Raises ValueError for one with too many entries or two of one name, and
    for a compressed entry: ``torch.save`` never compresses, and small files could expand hugely."""
    end = zipfile._EndRecData(source)  # type: ignore[attr-defined]  # before ZipFile reads a directory of any size
    if end is None:
        raise ValueError("it is not an archive")
    size, entries = end[zipfile._ECD_SIZE], end[zipfile._ECD_ENTRIES_TOTAL]  # type: ignore[attr-defined]
    if entries > most_entries or size > _ENTRY_BYTES * (entries + 1):
        raise ValueError(f"its directory has {size:,} bytes and {entries:,} entries")
    with zipfile.ZipFile(source) as archive:
        if len(archive.NameToInfo) != len(archive.filelist):
            raise ValueError("it has two entries of one name")
        for entry in archive.filelist:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename} in it is compressed")
        yield archive


def _refuse_absurd_pickles(archive: zipfile.ZipFile) -> None:
    for entry in archive.filelist:
        if entry.filename.endswith(".pkl"):
            if entry.file_size > MOST_PICKLE_BYTES:
                raise ValueError(f"{entry.filename} in it has {entry.file_size:,} bytes")
            refuse_absurd(archive.read(entry))


def _load(source: Path | io.BytesIO, what: str) -> Any:
    allowed: list[Any] = [
        (argparse.Namespace, "argparse.Namespace"),
        (types.SimpleNamespace, "types.SimpleNamespace"),
        (_Stream, "_io.BytesIO"),
        *((Opaque, name) for name in _COMMON_IGNORED),
    ]
    try:
        with open(source, "rb") if isinstance(source, Path) else contextlib.nullcontext(source) as stream:
            with open_archive(stream) as archive:
                _refuse_absurd_pickles(archive)
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with _only_allowing(allowed):
            mapped = isinstance(source, Path)
            value = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        _check_tree(value)
        vet_module_states(value, what)
    except CheckpointError:
        raise
    except Exception as error:  # refused globals, broken archives
        # torch's own advice, to load it without ``weights_only``, is not passed on.
        lines = [line.strip() for line in str(error).splitlines() if not line.startswith("Weights only load failed")]
        named = (line for line in lines if "GLOBAL" in line or "Unpickler" in line)
        detail = next(named, next(filter(None, lines), type(error).__name__))
        raise CheckpointError(f"{what} is refused: {show_text(detail, 200)}") from error
    return value


@contextlib.contextmanager
def _only_allowing(allowed: list[Any]) -> Iterator[None]:
    """Replace torch's safe globals with ``allowed`` for the block, so that Megatron's real classes do not mix in.

    The list is global to the process. The lock makes sure that Megatron's classes are restored.
    """
    with _ALLOWING:
        registered = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # it asks users to file an issue
                yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(registered)


def _check_tree(value: Any) -> None:
    """Raise ValueError for cycles and for shared references that expand to too many values."""
    waiting, met = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        met += 1
        if met > _MOST_VALUES or depth > _DEEPEST:
            raise ValueError("it contains itself, or is too large or too deeply nested")
        if isinstance(value, dict):
            waiting.extend((part, depth + 1) for pair in value.items() for part in pair)
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting.extend((part, depth + 1) for part in value)
        elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
            waiting.append((vars(value), depth + 1))
        elif isinstance(value, torch.Tensor):
            if math.prod(value.shape) * value.itemsize > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of shape {list(value.shape)} in it shows the same numbers again and again")


def _as_state(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: expected a dictionary, got a {type(value).__name__}")
    if isinstance(value.get("args"), (argparse.Namespace, types.SimpleNamespace)):
        value["args"] = vars(value["args"])
    args = value.get("args")
    if args is not None and not (isinstance(args, dict) and all(isinstance(key, str) for key in args)):
        raise CheckpointError(f"{what} is refused: args: expected a dictionary of names, got something else")
    return value
