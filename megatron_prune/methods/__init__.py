"""The pruning methods: one file per method, and ``get`` and ``get_sparse``, which find a method by its name.

A method's file defines ``METHOD``, a structured ``Method``, or ``SPARSE``, a ``SparseMethod``, or both
(random does); the file's name with dashes is the method's name (``minitron_width.py`` is
``minitron-width``). Its settings, and so its name in help and errors, are in ``options.py``; the interfaces
are in ``base.py``. Files are imported when they are asked for: this package itself imports no torch.
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


def get(name: str) -> Method:
    """The structured method of that name; UsageError lists the names there are."""
    if name in STRUCTURED:
        method: Method = _module(name).METHOD
        return method
    why = f"{name} is sparse: run it with sparsify" if name in SPARSE else ""
    raise UsageError("--method", got=name, expected="one of " + ", ".join(names()), why=why)


def get_sparse(name: str) -> SparseMethod:
    """The sparse method of that name; UsageError lists the names there are."""
    if name in SPARSE:
        method: SparseMethod = _module(name).SPARSE
        return method
    why = f"{name} is structured: run it with plan and apply, or prune" if name in STRUCTURED else ""
    raise UsageError("--method", got=name, expected="one of " + ", ".join(sparse_names()), why=why)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
