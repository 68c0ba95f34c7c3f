"""The pruning methods: one file per method, and ``get`` and ``get_sparse``, which find a method by name.

A method's file defines ``METHOD`` (a structured ``Method``), ``SPARSE`` (a ``SparseMethod``) or both, as random
does. The file's name with dashes is the method's name: ``minitron_width.py`` is ``minitron-width``. The names and
settings are listed in ``options.py``, the interfaces are in ``base.py``. Method files are imported on demand, so
importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import UsageError
from megatron_prune.methods.options import SPARSE, STRUCTURED

if TYPE_CHECKING:
    from megatron_prune.methods.base import Method, SparseMethod


def names() -> list[str]:
    """Names of the structured methods, sorted."""
    return sorted(STRUCTURED)


def sparse_names() -> list[str]:
    """Names of the sparse methods, sorted."""
    return sorted(SPARSE)


def get(name: str) -> Method[Any]:
    """The structured method ``name``; UsageError lists the names that exist."""
    if name in STRUCTURED:
        method: Method[Any] = _module(name).METHOD
        return method
    why = f"{name} is sparse: run it with sparsify" if name in SPARSE else ""
    raise UsageError("--method", got=name, expected="one of " + ", ".join(names()), why=why)


def get_sparse(name: str) -> SparseMethod:
    """The sparse method ``name``; UsageError lists the names that exist."""
    if name in SPARSE:
        method: SparseMethod = _module(name).SPARSE
        return method
    why = f"{name} is structured: run it with plan and apply, or prune" if name in STRUCTURED else ""
    raise UsageError("--method", got=name, expected="one of " + ", ".join(sparse_names()), why=why)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
