"""Corpora for tests, written by Megatron's own builder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_corpus(prefix: str | Path, documents: Iterable[np.ndarray], dtype: type = np.uint16) -> str:
    """One sequence per document, as ``preprocess`` makes them; the prefix as text."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)
